"""Section 7, after its numbers were seen: which classes have the opposite contrast on the other modality, and what inversion gives each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from agrivision_repro.core import replace_file
from agrivision_repro.data.tiles import Tile, unpack_labels
from agrivision_repro.plots import CURVE_COLORS
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.section7 import ARMS, AS_IT_IS

INVERTED = next(name for name, arm in ARMS.items() if arm.experiment == "E9")  # and matched in mean and standard deviation
_LEAST = 30  # pixels of a class, and of the rest of its tile


def tile_contrasts(
    tile: Tile,
    n_classes: int,  # background included
) -> np.ndarray:  # `(C, 2)` in RGB (mean of its channels) and in NIR; NaN: too few pixels of the class or of the rest
    "Compute how much brighter each class of a tile is than the rest of the tile, in standard deviations of the tile."
    found = np.full((n_classes, 2), np.nan)
    views = [view[tile.valid] for view in (tile.image[:3].mean(0), tile.image[3].astype(float))]
    for k, mask in enumerate(unpack_labels(tile.labels, n_classes)[:, tile.valid]):
        if min(mask.sum(), (~mask).sum()) >= _LEAST:
            found[k] = [(view[mask].mean() - view[~mask].mean()) / max(view.std(), 1e-6) for view in views]
    return found


def measure_contrasts(
    tiles: Iterable[Tile],
    classes: tuple[str, ...],
) -> pd.DataFrame:  # per class: tiles with the class, mean contrast in RGB and in NIR, share of opposite signs in %
    "Measure the contrast of every class over tiles."
    contrasts = np.stack([tile_contrasts(tile, len(classes)) for tile in tiles])
    rows = []
    for name, own in zip(classes, contrasts.swapaxes(0, 1), strict=True):
        own = own[~np.isnan(own[:, 0])]
        means = own.mean(0) if len(own) else (np.nan, np.nan)
        rows.append((name, len(own), *means, 100 * (own.prod(1) < 0).mean() if len(own) else np.nan))
    return pd.DataFrame(rows, columns=["class", "tiles", "rgb", "nir", "opposite"])


def _run_contrasts(result: Result, workspace: Workspace) -> pd.DataFrame:
    "Measure the contrasts on the tiles that a Run is scored on, or load them."
    path = result.folder / "contrasts.csv"
    if not path.is_file():
        table = measure_contrasts(workspace.tiles(result.run, "val"), result.run.edition.classes)
        replace_file(path, lambda fresh: table.to_csv(fresh, index=False))
    return pd.read_csv(path)


def class_polarity(
    result: Result,  # whose scored tiles are looked at
    workspace: Workspace,
    scores: pd.DataFrame,  # of `section7.section7_classes`
) -> pd.DataFrame:  # of `measure_contrasts`, and means over nets and seeds in %: gain and gain_average_precision of inversion
    "Lay the gain of inversion on the other modality beside the contrasts of each class."
    table = _run_contrasts(result, workspace).set_index("class")
    for name, metric in {"gain": "iou", "gain_average_precision": "average_precision"}.items():
        means = scores.groupby(["class", "arm"])[metric].mean().unstack()
        table[name] = means[INVERTED] - means[AS_IT_IS]
    return table.reset_index()


def format_polarity(
    table: pd.DataFrame,  # of `class_polarity`
) -> pd.DataFrame:  # text cells
    "Format the contrasts and gains, the class with the most opposite signs first."
    table = table.sort_values("opposite", ascending=False)
    shown = {"contrast in RGB": ("rgb", "+.2f"), "contrast in NIR": ("nir", "+.2f"), "opposite, %": ("opposite", ".0f")}
    shown |= {"IoU gained": ("gain", "+.1f"), "average precision gained": ("gain_average_precision", "+.1f")}
    cells = {"tiles": table.tiles.astype(str).tolist()}
    cells |= {name: ["–" if np.isnan(v) else format(v, form) for v in table[column]] for name, (column, form) in shown.items()}
    return pd.DataFrame(cells, table["class"].str.replace("_", " ").rename(None))


def correlate_polarity(
    tables: Iterable[pd.DataFrame],  # of `class_polarity`
) -> tuple[float, int]:  # Spearman's correlation over classes, and their number
    "Correlate the share of opposite signs with the gain of inversion, in average precision."
    known = pd.concat(tables).dropna(subset=["opposite", "gain_average_precision"])
    return float(known.opposite.corr(known.gain_average_precision, "spearman")), len(known)


def _name_points(ax, points: list[tuple[float, float, str]]) -> None:
    "Write names beside points: at the first of eight places where a name overlaps no other one and no point, and stays within the frame."
    places = [(dx, dy, side) for dy in (4, -11, 13, -20) for dx, side in ((4, "left"), (-4, "right"))]
    ax.figure.draw_without_rendering()
    frame = ax.get_window_extent()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in ax.transData.transform([point[:2] for point in points])]
    for x, y, name in sorted(points, reverse=True):  # those at the right first: they have the least room
        for dx, dy, side in places:
            label = ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, fontsize=8)
            box = label.get_window_extent()
            if not box.count_overlaps(taken) and frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1:
                break
            label.remove()
        else:
            label = ax.annotate(name, (x, y), places[0][:2], textcoords="offset points", fontsize=8)
        taken.append(label.get_window_extent())


def draw_polarity(
    tables: Mapping[str, pd.DataFrame],  # name of the data → table of `class_polarity`
) -> Figure:
    "Draw the gain of inversion against the share of tiles in which a class has the opposite contrast: a point per class."
    fig, ax = plt.subplots(figsize=(7.5, 4), dpi=80, layout="constrained")
    for (name, table), color in zip(tables.items(), CURVE_COLORS, strict=False):
        ax.scatter(table.opposite, table.gain_average_precision, color=color, label=name, s=24)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.margins(y=0.1)
    ax.set(xlabel="tiles in which the contrast of the class is opposite in NIR, %", ylabel="average precision gained\nby inversion, points")
    ax.set_xlim(-4, 104)
    if len(tables) > 1:
        ax.legend(fontsize=8, frameon=False, loc="upper left")
    known = pd.concat(tables.values()).dropna(subset=["opposite", "gain_average_precision"])
    _name_points(ax, [(row.opposite, row.gain_average_precision, row[1].replace("_", " ")) for row in known.itertuples()])
    plt.close(fig)
    return fig
