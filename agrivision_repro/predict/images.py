"""A trained model on image files: maps, pictures and class shares."""

from __future__ import annotations

import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from agrivision_repro.core import replace_file
from agrivision_repro.data.tiles import pack_labels
from agrivision_repro.plots import paint_classes, show_panels
from agrivision_repro.predict.scenes import Raster, Scene, find_rasterio, open_scene
from agrivision_repro.predict.submission import SIGNATURE, png_chunk
from agrivision_repro.predict.windows import predict_strips


@contextmanager
def write_png(
    path: Path,
    size: tuple[int, int],  # height, width, pixels
) -> Iterator[Callable[[int, np.ndarray], None]]:  # takes the first row of a strip, and the strip, `(h, W)` uint8
    "Write a PNG with one byte per pixel, strip by strip from the top."
    squeeze = zlib.compressobj()
    with path.open("wb") as file:
        file.write(SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 0, 0, 0, 0)))

        def write(_top: int, strip: np.ndarray) -> None:
            file.write(png_chunk(b"IDAT", squeeze.compress(np.pad(strip, ((0, 0), (1, 0))).tobytes())))

        yield write
        file.write(png_chunk(b"IDAT", squeeze.flush()) + png_chunk(b"IEND", b""))


@contextmanager
def _write_georeferenced(
    path: Path,
    raster: Raster,  # georeferenced
    n_classes: int,  # background included
) -> Iterator[Callable[[int, np.ndarray], None]]:  # takes the first row of a strip, and the strip, `(h, W)` uint8
    "Write a one-band GeoTIFF with an image's georeferencing, strip by strip."
    height, width = raster.size
    form = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8", "compress": "deflate"}
    with find_rasterio().open(path, "w", **form, **raster.place) as image:
        colors = paint_classes(np.arange(n_classes)[None])[0].tolist()
        image.write_colormap(1, dict(enumerate(map(tuple, colors))))
        yield lambda top, strip: image.write(strip, 1, window=((top, top + len(strip)), (0, width)))


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
    "Write predicted strips as they arrive."
    pixels, seen, step = np.zeros(n_classes, np.int64), [], math.ceil(max(raster.size) / PICTURED)
    with ExitStack() as stack:
        for kind in ("labels", "bits", *["georeferenced"] * bool(raster.place)):
            (folder / kind).mkdir()
        labels, bits = (stack.enter_context(write_png(folder / kind / f"{name}.png", raster.size)) for kind in ("labels", "bits"))
        writers = [labels]
        if raster.place:
            writers.append(stack.enter_context(_write_georeferenced(folder / "georeferenced" / f"{name}.tif", raster, n_classes)))
        for top, logits in strips:
            best = logits.argmax(0).astype(np.uint8)
            bits(top, pack_labels(list(logits[1:] > 0)))
            for write in writers:
                write(top, best)
            pixels += np.bincount(best.ravel(), minlength=n_classes)
            image, some = raster.rows(top, top + len(best)), np.s_[-top % step :: step, ::step]
            seen.append(np.concatenate([image[:, *some], best[None, *some]]))
    *rgb, nir, best = np.concatenate(seen, 1)
    return pixels, {"RGB": np.stack(rgb, -1), "NIR": nir, "prediction": best}
