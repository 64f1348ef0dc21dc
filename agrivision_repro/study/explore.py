"""Two finished runs of one data set, side by side: a validation tile with both predictions, and the divergence in every layer of both."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from agrivision_repro.analysis.divergence import draw_divergence
from agrivision_repro.data.batches import TileDataset
from agrivision_repro.data.tiles import Tile, as_panels, pack_labels, paint_labels
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.plots import show_panels
from agrivision_repro.report.results import reproduce_command
from agrivision_repro.runs.store import Result, run_folders
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.figures import inputs_of, run_divergence
from agrivision_repro.study.modality import MODALITIES


def finished_runs(
    out: str | Path,  # folder of all results
) -> dict[str, list[Result]]:  # data set → its finished Runs, the oldest first
    "List the finished Runs that have their weights, by data set; records that cannot be read are left out."
    runs: dict[str, list[Result]] = {}
    for folder in run_folders(out):
        if folder.is_finished and folder.weights().is_file():
            with suppress(ValueError):
                result = folder.result()
                source = result.run.source
                made = vars(source.synthetic).items() if source.synthetic else ()
                runs.setdefault(", ".join([source.name, *(f"{k} {v}" for k, v in made)]), []).append(result)
    return runs


def what_to_train(out: str | Path) -> str:
    "Return the command that trains the nets of Figure 2 into a folder of results."
    command = reproduce_command({"scale": "laptop", "data": "ag-net", "seeds": [0]}, "fig2_divergence")
    return f"no finished run with weights in {out}; to train the nets of Figure 2 there:\n{command} --out {shlex.quote(str(out))}"


def label_run(result: Result) -> str:
    "Return what distinguishes a Run from others of its data set, and its multi-label mIoU."
    run, score = result.run, 100 * result.score(result.run.channels)
    schedule = f"λ1 = {run.dice:g}, λ2 = {run.lovasz:g}, {run.recipe.iterations:,} iterations"
    return f"{run.title}, {schedule}, mIoU {score:.1f} % ({result.folder.name})"


def shared_tiles(
    results: Sequence[Result],  # of one data set
    workspace: Workspace,
) -> list[str]:  # names
    "List the validation tiles that no Run leaves out."
    runs = {r.run.shared_places: r.run for r in results}.values()
    names = workspace.open(results[0].run.source, "val").names
    return [names[k] for k in sorted(set.intersection(*(set(workspace.kept(run, "val")) for run in runs)))]


def _check_data(result: Result, workspace: Workspace) -> None:
    "Raise ValueError if a Run was trained on other data than the workspace's."
    if workspace.folder(result.run).name != result.folder.name:
        root = workspace.root(result.run.source)
        raise ValueError(f"run {result.folder.name} was trained on other data than {root}: name the folder of its data (data_root)")


@lru_cache(maxsize=4)
def _load(result: Result, workspace: Workspace) -> tuple[DeepLabV3Plus, TileDataset]:
    "Load a trained model, and the settings of its input."
    _check_data(result, workspace)
    return result.model(), workspace.feed(result.run, "val")


@torch.no_grad()
def _predict(result: Result, tile: Tile, workspace: Workspace) -> np.ndarray:  # label bits, `(H, W)` uint8
    "Predict every anomaly with a positive logit, as in the multi-label metric, from the input that the Run is scored on."
    model, feed = _load(result, workspace)
    logits = model(next(inputs_of(replace(feed, tiles=[tile]))))[0]
    return pack_labels(list((logits[1:] > 0).numpy()))


def draw_comparison(
    first: Result,
    second: Result,  # of the same data set
    name: str,  # of a validation tile
    workspace: Workspace,
) -> Figure:
    "Draw RGB, NIR and labels of a tile, both predictions, and the valid pixels at which any class differs in them, white."
    tiles = workspace.open(first.run.source, "val")
    tile = tiles[tiles.names.index(name)]
    predicted = [_predict(result, tile, workspace) for result in (first, second)]
    differs = (predicted[0] != predicted[1]) & tile.valid
    panels = as_panels(tile)
    panels |= {f"{letter} predicts": paint_labels(bits, tile.valid) for letter, bits in zip("AB", predicted, strict=True)}
    panels[f"A and B differ: {100 * differs.sum() / max(tile.valid.sum(), 1):.1f} %"] = differs * np.uint8(255)
    return show_panels(panels, classes=first.run.edition.classes, size=2)


def most_different(a: pd.DataFrame, b: pd.DataFrame) -> int:  # row
    "Return the layer in which the divergences of two Runs have the largest ratio, either way round."
    return int(np.log(b.divergence / a.divergence).abs().argmax())


def draw_divergences(
    first: Result,  # both of a Run on `rgb` or `nir3`, of nets with the same layers
    second: Result,
    workspace: Workspace,
) -> Figure:
    "Draw the divergence of RGB and NIR in both models, with a dashed line at the layer in which they differ most; raise ValueError for other Runs."
    pair = (first, second)
    if not {r.run.channels for r in pair} <= set(MODALITIES) or first.run.depth != second.run.depth:
        raise ValueError("no divergence to compare: wanted two runs of one depth, each on RGB or on NIR")
    for result in pair:
        _check_data(result, workspace)
    curves = [table[table.estimator == "sample"].reset_index(drop=True) for table in (run_divergence(r, workspace) for r in pair)]
    row = most_different(*curves)
    values = ", ".join(f"{letter} {curve.divergence[row]:.3g}" for letter, curve in zip("AB", curves, strict=True))
    title = f"A and B differ most in {curves[0].layer[row]}: {values}"
    labels = [f"{letter}: {result.run.title}" for letter, result in zip("AB", pair, strict=True)]
    figure = draw_divergence({title: dict(zip(labels, curves, strict=True))})
    figure.axes[0].axvline(curves[0].depth[row], color="0.3", linestyle="--", linewidth=1)
    return figure
