"""Table 1: scores and predictions on both modalities, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from agrivision_repro.data.batches import CHANNEL_LABELS, IMAGENET, Statistics, select_channels, thin_out
from agrivision_repro.data.tiles import Tile, as_panels, pack_labels, paint_labels, unpack_labels
from agrivision_repro.plots import show_panels
from agrivision_repro.report.render import format_score, spread
from agrivision_repro.runs.store import Result, metric_label
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.compare import score_gain, tabulate_gains
from agrivision_repro.study.paper import TABLE1
from agrivision_repro.training.evaluate import METRICS


MODALITIES = ("rgb", "nir3")
OTHER = {"rgb": "nir3", "nir3": "rgb"}

def modality_scores(
    results: Sequence[Result],  # of `tables.table1`
) -> pd.DataFrame:  # means over classes in %; metric, trained_on, tested_on, mean, sd, n, background_only, decay, decay_sd; on the paper's data, paper
    "Average Table 1's scores, and the decay on the other modality, over seeds."
    rows = []
    for metric in METRICS:
        for trained in MODALITIES:
            own = [r for r in results if r.run.channels == trained]
            for tested in MODALITIES:
                values = np.array([100 * r.score(tested, metric) for r in own])
                decays = np.array([100 * r.score(trained, metric) for r in own]) - values
                background = 100 * own[0].scores[tested][metric]["background_only"]
                paper = TABLE1.loc[tested, trained] if metric == "multilabel" else np.nan
                row = (metric, trained, tested, values.mean(), spread(values), len(values), background, decays.mean(), spread(decays), paper)
                rows.append(row)
    columns = ["metric", "trained_on", "tested_on", "mean", "sd", "n", "background_only", "decay", "decay_sd", "paper"]
    table = pd.DataFrame(rows, columns=columns)
    return table if results[0].run.edition.is_papers else table.drop(columns="paper")


def modality_table(
    scores: pd.DataFrame,  # of `modality_scores`
) -> pd.DataFrame:  # text cells; rows (metric, test), columns ours and, on the paper's data, the paper's
    "Format Table 1 in the paper's layout, mean ± standard deviation over seeds."
    here: dict[str, dict] = {}
    paper: dict[str, dict] = {}
    for (trained, metric), cells in scores.groupby(["trained_on", "metric"], sort=False):
        own, title = cells.set_index("tested_on"), metric_label(metric)
        ours = {(title, f"Test on {CHANNEL_LABELS[m]}"): format_score(*own.loc[m, ["mean", "sd"]]) for m in MODALITIES}
        ours[title, "Perf. decay"] = format_score(*own.loc[OTHER[trained], ["decay", "decay_sd"]])
        ours[title, "Baseline: background everywhere"] = format_score(own.loc[trained, "background_only"])
        here.setdefault(f"Here: train on {CHANNEL_LABELS[trained]}", {}).update(ours)
        if "paper" in own:
            printed = [own.paper[m] for m in MODALITIES] + [own.paper[trained] - own.paper[OTHER[trained]], np.nan]
            theirs = dict(zip(ours, map(format_paper, printed), strict=True))
            paper.setdefault(f"Paper: train on {CHANNEL_LABELS[trained]}", {}).update(theirs)
    return pd.DataFrame(here | paper)


def modality_decays(
    results: Sequence[Result],  # of `tables.table1`
    workspace: Workspace,
) -> pd.DataFrame:  # of `compare.tabulate_gains`
    "Compare the score on the own modality with the score on the other one."
    decays = {}
    for trained in MODALITIES:
        own = sorted((r for r in results if r.run.channels == trained), key=lambda r: r.run.seed)
        name, other = CHANNEL_LABELS[trained], CHANNEL_LABELS[OTHER[trained]]
        decays[f"trained on {name}, {name}", other] = score_gain(own, own, workspace, others_on=OTHER[trained])
    return tabulate_gains(decays)


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
    trained = {c: next(r for r in results if r.run.channels == c) for c in MODALITIES}
    models = {c: (result.model(), result.statistics) for c, result in trained.items()}
    candidates = thin_out(workspace.tiles(run, "val"), 200)
    for tile in _most_varied(candidates, len(run.edition.classes), n_tiles):
        row = as_panels(tile)
        for own, (model, statistics) in models.items():
            for shown in MODALITIES:
                labels = predict_labels(model, tile, shown, statistics)
                row[f"{CHANNEL_LABELS[own]} model on {CHANNEL_LABELS[shown]}"] = paint_labels(labels, tile.valid)
        rows.append(row)
    return show_panels(rows, classes=run.edition.classes)
