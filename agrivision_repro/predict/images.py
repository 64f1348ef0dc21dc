"""A trained model on image files: maps, pictures and class shares."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from agrivision_repro.core import replace_file
from agrivision_repro.data.tiles import pack_labels
from agrivision_repro.plots import paint_classes, show_panels
from agrivision_repro.predict.scenes import Raster, Scene, find_rasterio, open_scene
from agrivision_repro.predict.windows import predict_strips


def _write_georeferenced(
    path: Path,
    labels: np.ndarray,  # class per pixel, `(H, W)` uint8
    place: dict,  # of `Raster`
    n_classes: int,  # background included
) -> None:
    "Write a one-band GeoTIFF with an image's georeferencing."
    height, width = labels.shape
    form = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8", "compress": "deflate"}
    with find_rasterio().open(path, "w", **form, **place) as image:
        colors = paint_classes(np.arange(n_classes)[None])[0].tolist()
        image.write_colormap(1, dict(enumerate(map(tuple, colors))))
        image.write(labels, 1)


PICTURED = 512  # maximum length of an image's longer side in its picture, pixels


class Prediction(NamedTuple):
    "The size and class counts of one predicted image."

    name: str
    size: tuple[int, int]  # height, width, pixels
    pixels: np.ndarray  # of each class, `(C,)` int64

    def as_text(self, classes: Sequence[str]) -> str:
        "Format the classes found in one line, largest share first."
        share = 100 * self.pixels / self.pixels.sum()
        found = [f"{classes[k]} {share[k]:.1f} %" for k in np.argsort(-share, kind="stable") if self.pixels[k]]
        return f"{self.name}: {self.size[1]}×{self.size[0]}, {', '.join(found)}"


def predict_scene(
    scene: Scene,
    predictor: Callable[[Tensor], Tensor],
    out: Path,  # folder of all maps
    classes: Sequence[str],  # C names, background first
    window: int = 512,  # side, pixels
    overlap: float = 0.5,  # share of the window
    has_picture: bool = True,
    origin: str = "",  # title of the picture, from `describe_model`
) -> Prediction:
    "Predict one image and write its maps, each atomically."
    out.mkdir(parents=True, exist_ok=True)
    with open_scene(scene) as raster, tempfile.TemporaryDirectory(prefix=".predicting-", dir=out) as workshop:
        strips = predict_strips(predictor, raster.rows, raster.size, window, overlap)
        pixels, panels = _write_maps(scene.name, raster, strips, Path(workshop), len(classes))
        if has_picture:
            (Path(workshop) / "pictures").mkdir()
            figure = show_panels(panels | {"prediction": paint_classes(panels["prediction"])}, tuple(classes), size=2.6)
            figure.suptitle(origin, fontsize="medium")
            figure.savefig(Path(workshop) / "pictures" / f"{scene.name}.png")
        for made in sorted(Path(workshop).glob("*/*")):
            replace_file(out / made.relative_to(workshop), partial(os.replace, made))
    return Prediction(scene.name, raster.size, pixels)


def _write_maps(
    name: str,
    raster: Raster,
    strips: Iterator[tuple[int, np.ndarray]],  # of `predict_strips`
    folder: Path,  # a new one
    n_classes: int,  # background included
) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # pixels of each class `(C,)` int64; RGB, NIR and classes, every few pixels
    "Reduce predicted strips to maps of one byte per pixel as they arrive, and write these."
    labels, bits = np.empty(raster.size, np.uint8), np.empty(raster.size, np.uint8)
    counts, seen, step = np.zeros(n_classes, np.int64), [], math.ceil(max(raster.size) / PICTURED)
    for top, logits in strips:
        end = top + logits.shape[1]
        labels[top:end], bits[top:end] = logits.argmax(0), pack_labels(list(logits[1:] > 0))
        counts += np.bincount(labels[top:end].ravel(), minlength=n_classes)
        seen.append(raster.rows(top, end)[:, -top % step :: step, ::step].copy())  # a view would keep every pixel
    for kind, pixels in {"labels": labels, "bits": bits}.items():
        (folder / kind).mkdir()
        Image.fromarray(pixels).save(folder / kind / f"{name}.png")
    if raster.place:
        (folder / "georeferenced").mkdir()
        _write_georeferenced(folder / "georeferenced" / f"{name}.tif", labels, raster.place, n_classes)
    *rgb, nir = np.concatenate(seen, 1)
    return counts, {"RGB": np.stack(rgb, -1), "NIR": nir, "prediction": labels[::step, ::step]}
