"""Pictures and colors: tiles, classes, and curves over the layers of a net."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

CLASS_COLORS = (
    "#22313f", "#56b4e9", "#e69f00", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#f0e442", "#999999",
)  # index = class; 0 is background


def paint_classes(
    classes: np.ndarray,  # class of each pixel, `(H, W)` int in `[0, 9)`
) -> np.ndarray:  # `(H, W, 3)` uint8
    "Paint each pixel in the color of its class."
    palette = np.array([to_rgb(c) for c in CLASS_COLORS])
    return (palette[classes] * 255).round().astype(np.uint8)


def draw_panel(ax, title: str, image: np.ndarray) -> None:
    "Draw one `(H, W)` or `(H, W, 3)` array with its title and without ticks."
    is_byte = image.dtype == np.uint8
    ax.imshow(image, cmap="gray", interpolation="nearest", **({"vmin": 0, "vmax": 255} if is_byte else {}))
    ax.set_title(title, fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])


def add_class_legend(fig: Figure, classes: tuple[str, ...]) -> None:
    "Add a legend of the class colors below the figure."
    patches = [Patch(facecolor=CLASS_COLORS[k], label=name.replace("_", " ")) for k, name in enumerate(classes)]
    n_columns = max(min(len(classes), int(fig.get_figwidth() / 1.5)), 1)
    fig.legend(handles=patches, loc="outside lower center", ncols=n_columns, fontsize=8, frameon=False)


def show_panels(
    rows: dict[str, np.ndarray] | list[dict[str, np.ndarray]],  # title → `(H, W)` or `(H, W, 3)`; a list draws one row each
    classes: tuple[str, ...] = (),  # names for a legend of class colors; empty: no legend
    size: float = 1.7,  # side of a panel, inches
) -> Figure:
    "Draw arrays side by side."
    rows = [rows] if isinstance(rows, dict) else rows
    if not rows or not all(rows):
        raise ValueError("show_panels got nothing to draw: pass a dictionary from title to array, or a list of such rows")
    n_cols = max(map(len, rows))
    fig, axes = plt.subplots(
        len(rows), n_cols, squeeze=False, layout="constrained",
        figsize=(size * n_cols, (size + 0.25) * len(rows) + 0.3 * bool(classes)), dpi=100,
    )
    for ax in axes.flat:
        ax.axis("off")
    for row, row_axes in zip(rows, axes, strict=True):
        for (title, image), ax in zip(row.items(), row_axes, strict=False):
            ax.axis("on")
            draw_panel(ax, title, image)
    if classes:
        add_class_legend(fig, classes)
    plt.close(fig)  # otherwise a notebook draws it twice
    return fig


CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # distinguishable for color-blind readers


def stage_of(layer: str) -> str:
    "Return the stage that a layer belongs to: `layer3` of `backbone.layer3.5`, `stem` of `act1`."
    if layer.rsplit(".", 1)[-1] in ("act1", "relu") and not re.search(r"\d\.", layer):
        return "stem"
    stage = re.sub(r"(\.blocks)?\.\d+(\.\D[^.]*)*$", "", layer)
    return re.search(r"([^.]+\.)?[^.]+$" if stage[-1:].isdigit() and "." in stage[-3:] else r"[^.]+$", stage)[0]


def mark_stages(ax, layers: Sequence[str]) -> None:
    "Draw a line and a label at each stage, unless there are more than eight."
    stages = list(map(stage_of, layers))
    starts = [k for k, stage in enumerate(stages) if k == 0 or stage != stages[k - 1]]
    if len(starts) > 8:
        return
    for start, end in zip(starts, [*starts[1:], len(stages)], strict=True):
        ax.axvline(start - 0.5, color="0.8", linewidth=0.8, zorder=0)
        x, side = (start + 0.3, "right") if end - start == 1 < len(stages) / 12 else ((start + end - 1) / 2, "center")
        ax.text(x, 1.01, stages[start], transform=ax.get_xaxis_transform(), ha=side, fontsize=7, color="0.4")


def limit_height(
    axes: Sequence,  # with a shared, logarithmic y axis
    values: np.ndarray,  # values of all curves
) -> None:
    "Limit the axis to nearly all values; layers beyond it, dominated by a nearly dead channel, are marked at the top."
    top = 20 * np.nanquantile(values, 0.97)
    if np.nanmax(values) > top:
        axes[0].set_ylim(top=top)
        for ax in axes:
            for line in [line for line in ax.lines if line.get_marker() == "o"]:
                beyond = [(x, y) for x, y in line.get_xydata() if y > top]
                ax.plot([x for x, _ in beyond], [top / 1.5 for _ in beyond], "^", color=line.get_color(), markersize=5)


def shrink_png(
    png: bytes,
    n_colors: int = 256,
) -> bytes:
    "Reduce a PNG to a palette, thin lines included: a third to a fifth of its size; its description stays."
    picture, small, described = PngImageFile(io.BytesIO(png)), io.BytesIO(), PngInfo()
    for key, text in picture.text.items():
        described.add_text(key, text)
    picture.convert("RGB").quantize(n_colors, Image.Quantize.MAXCOVERAGE, kmeans=1).save(small, "png", optimize=True, pnginfo=described)
    return small.getvalue()


def shrink_outputs(
    cells: Sequence[dict],  # of an executed notebook; changed in place
    n_colors: int = 256,
) -> None:
    "Reduce the PNGs that a notebook shows to palettes."
    for data in (output.get("data", {}) for cell in cells for output in cell.get("outputs", [])):
        if "image/png" in data:
            data["image/png"] = base64.b64encode(shrink_png(base64.b64decode(data["image/png"]), n_colors)).decode()
