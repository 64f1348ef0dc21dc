"""Table 1 and Figure 3: scores and predictions on both modalities, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from agrivision_repro.data.batches import IMAGENET, Statistics, select_channels, thin_out
from agrivision_repro.data.tiles import Tile, as_panels, pack_labels, paint_labels, unpack_labels
from agrivision_repro.plots import show_panels
from agrivision_repro.report.render import format_score, spread
from agrivision_repro.runs.store import METRIC_NAMES, Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.paper import TABLE1
from agrivision_repro.training.evaluate import METRICS


def modality_scores(
    results: Sequence[Result],  # of `tables.table1`
) -> pd.DataFrame:  # means over classes in %; columns metric, trained_on, tested_on, mean, sd, n, background_only, paper
    "Average Table 1's scores over seeds."
    rows = []
    for metric in METRICS:
        for trained in TABLE1:
            own = [r for r in results if r.run.channels == trained]
            for tested in TABLE1.index:
                values = [100 * r.score(tested, metric) for r in own]
                background = 100 * own[0].scores[tested][metric]["background_only"]
                paper = TABLE1.loc[tested, trained] if metric == "multilabel" else np.nan
                rows.append((metric, trained, tested, np.mean(values), spread(values), len(values), background, paper))
    return pd.DataFrame(rows, columns=["metric", "trained_on", "tested_on", "mean", "sd", "n", "background_only", "paper"])


MODALITY = {"rgb": "RGB", "nir3": "NIR"}


def modality_table(
    scores: pd.DataFrame,  # of `modality_scores`
) -> pd.DataFrame:  # text cells; rows (metric, test), columns ours and the paper's
    "Format Table 1 in the paper's layout, with separate columns for our numbers and the paper's."
    columns = {}
    for trained, name in MODALITY.items():
        own = scores[scores.trained_on == trained].set_index(["metric", "tested_on"])
        here, papers = {}, {}
        for metric in scores.metric.unique():
            title, cells = METRIC_NAMES[metric], own.loc[metric]
            other = next(m for m in MODALITY if m != trained)
            for tested in MODALITY:
                here[title, f"Test on {MODALITY[tested]}"] = format_score(cells.loc[tested, "mean"], cells.loc[tested, "sd"])
                papers[title, f"Test on {MODALITY[tested]}"] = format_paper(cells.loc[tested, "paper"])
            here[title, "Perf. decay"] = format_score(cells.loc[trained, "mean"] - cells.loc[other, "mean"])
            papers[title, "Perf. decay"] = format_paper(cells.loc[trained, "paper"] - cells.loc[other, "paper"])
            here[title, "Baseline: background everywhere"], papers[title, "Baseline: background everywhere"] = (
                format_score(cells.loc[trained, "background_only"]),
                "–",
            )
        columns |= {f"Here: train on {name}": here, f"Paper: train on {name}": papers}
    return pd.DataFrame(columns)[sorted(columns, key=lambda name: str(name).startswith("Paper"))]


def format_paper(value: float) -> str:
    "Format a number of the paper with its two decimals."
    return "–" if np.isnan(value) else f"{value:.2f}"


@torch.no_grad()
def predict_labels(
    model: nn.Module,  # in evaluation mode, on the CPU
    tile: Tile,
    channels: str,  # the model's input: a key of `batches.CHANNELS`
    statistics: Statistics = IMAGENET,  # for normalizing its channels
) -> np.ndarray:  # label bits, `(H, W)` uint8
    "Predict every anomaly with a positive logit, as in the multi-label metric."
    image = torch.from_numpy(tile.image)[None]
    logits = model(select_channels(image, channels, statistics))[0]
    return pack_labels(list((logits[1:] > 0).numpy()))


def _most_varied(
    tiles: Sequence[Tile],
    n_classes: int,  # background included
    n: int,
) -> list[Tile]:
    "Select tiles one by one, each for the classes that the previous ones lack."
    shares = np.array([unpack_labels(t.labels, n_classes)[:, t.valid].mean(1) if t.valid.any() else np.zeros(n_classes) for t in tiles])
    shares, seen, chosen = shares.clip(max=0.05), np.zeros(n_classes), []  # 5 % of a tile suffices to show a class
    for _ in range(min(n, len(tiles))):
        gain = np.maximum(shares, seen).sum(1)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        seen = np.maximum(seen, shares[chosen[-1]])
    return [tiles[k] for k in chosen]


def modality_picture(
    results: Sequence[Result],  # of `tables.table1`; the first seed is drawn
    workspace: Workspace,
    n_tiles: int = 3,
) -> Figure:
    "Draw RGB and NIR of validation tiles beside the predictions of both models on both modalities."
    run, rows = results[0].run, []
    trained = {c: next(r for r in results if r.run.channels == c) for c in MODALITY}
    models = {c: (result.model(), result.statistics) for c, result in trained.items()}
    candidates = thin_out(workspace.tiles(run, "val"), 200)
    for tile in _most_varied(candidates, len(run.edition.classes), n_tiles):
        row = as_panels(tile)
        for own, (model, statistics) in models.items():
            for shown, name in MODALITY.items():
                labels = predict_labels(model, tile, shown, statistics)
                row[f"{MODALITY[own]} model on {name}"] = paint_labels(labels, tile.valid)
        rows.append(row)
    return show_panels(rows, classes=run.edition.classes)
