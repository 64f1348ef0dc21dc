"""A trained model on image files: maps, pictures and class shares."""

from __future__ import annotations

import hashlib
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from agrivision_repro import __version__
from agrivision_repro.core import move_file
from agrivision_repro.data.tiles import pack_labels
from agrivision_repro.plots import paint_classes, show_panels
from agrivision_repro.predict.bands import BYTES, Raster, Reading
from agrivision_repro.predict.scenes import Scene, find_rasterio, open_scene
from agrivision_repro.predict.windows import predict_strips

NODATA = 255  # in a class map: the image has no data there


_ENDINGS = {"bits": "png", "pictures": "png", "georeferenced": "tif", "labels": "png"}  # folder of each map → ending of its files


def _write_georeferenced(
    path: Path,
    labels: np.ndarray,  # class per pixel, `(H, W)` uint8
    place: dict,  # of `Raster`
    n_classes: int,  # background included
) -> None:
    "Write a cloud-optimized GeoTIFF of one band with an image's georeferencing."
    height, width = labels.shape
    form = {"driver": "COG", "height": height, "width": width, "count": 1, "dtype": "uint8", "nodata": NODATA}
    rasterio = find_rasterio()
    with (
        warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning),  # control points are no transform
        rasterio.open(path, "w", **form, **place, compress="deflate", overview_resampling="nearest") as image,
    ):
        colors = paint_classes(np.arange(n_classes)[None])[0].tolist()
        image.write_colormap(1, dict(enumerate(map(tuple, colors))))
        image.write(labels, 1)


PICTURED = 512  # maximum length of an image's longer side in its picture, pixels


class Prediction(NamedTuple):
    "The size and class counts of one predicted image."

    name: str
    size: tuple[int, int]  # height, width, pixels
    pixels: np.ndarray  # of each class, `(C,)` int64, without those that have no data
    note: str = ""  # of `Raster`, or that the maps were kept

    def as_text(self, classes: Sequence[str]) -> str:
        "Format the classes found in one line, largest share first."
        share = 100 * self.pixels / max(self.pixels.sum(), 1)
        found = [f"{classes[k]} {share[k]:.1f} %" for k in np.argsort(-share, kind="stable") if self.pixels[k]]
        empty = 100 * (1 - self.pixels.sum() / math.prod(self.size))
        parts = [f"{self.size[1]}×{self.size[0]}", *[f"{empty:.1f} % without data"] * bool(empty > 0), *found]
        return f"{self.name}: {', '.join(parts)}" + f" ({self.note})" * bool(self.note)


def predict_scene(
    scene: Scene,
    predictor: Callable[[Tensor], Tensor],
    out: Path,  # folder of all maps
    classes: Sequence[str],  # C names, background first
    window: int = 512,  # side, pixels
    overlap: float = 0.5,  # share of the window
    *,
    reading: Reading = BYTES,
    has_picture: bool = True,
    origin: str = "",  # title of the picture, from `describe_model`
    settings: str = "",  # names the model and its options: maps of the same settings and file are kept; "": none are
    advance: Callable[[float], object] = lambda share: None,  # called with the share of the image predicted since the last call
) -> Prediction:
    "Predict one image and write its maps, each atomically."
    inputs = _hash_inputs(scene, (settings, window, overlap, reading)) if settings else ""
    if inputs and (kept := _read_finished(scene.name, out, inputs, len(classes), has_picture)):
        return kept
    out.mkdir(parents=True, exist_ok=True)
    with open_scene(scene, reading) as raster, tempfile.TemporaryDirectory(prefix=".predicting-", dir=out) as workshop:
        strips = predict_strips(predictor, raster.rows, raster.size, window, overlap)
        pixels, panels = _write_maps(scene.name, raster, _count(strips, raster.size[0], advance), Path(workshop), len(classes), inputs)
        if has_picture:
            (Path(workshop) / "pictures").mkdir()
            figure = show_panels(panels, tuple(classes), size=2.6)
            figure.suptitle(origin, fontsize="medium")
            figure.savefig(Path(workshop) / "pictures" / f"{scene.name}.png")
        _move_maps(scene.name, Path(workshop), out)
    return Prediction(scene.name, raster.size, pixels, raster.note)


def _move_maps(name: str, workshop: Path, out: Path) -> None:
    "Move an image's maps in place and remove an earlier call's others; it is finished when its labels are there."
    maps = [Path(kind) / f"{name}.{ending}" for kind, ending in _ENDINGS.items()]
    for path in maps:
        if path.parent.name == "labels" or not (workshop / path).is_file():
            (out / path).unlink(missing_ok=True)
    for path in maps:
        if (workshop / path).is_file():
            move_file(workshop / path, out / path)


def _hash_inputs(scene: Scene, settings: object) -> str:  # 64 hexadecimal digits
    "Hash what maps depend on: files by size and time, settings and version."
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*scene.files, *scene.sidecars)]
    return hashlib.sha256(repr((files, settings, __version__, find_rasterio() is None)).encode()).hexdigest()


def _read_finished(name: str, out: Path, inputs: str, n_classes: int, has_picture: bool) -> Prediction | None:
    "Return the prediction of an earlier call with the same inputs; None if there is none."
    path = out / "labels" / f"{name}.png"
    if not path.is_file() or has_picture and not (out / "pictures" / f"{name}.png").is_file():
        return None
    with suppress(OSError, SyntaxError), PngImagePlugin.PngImageFile(path) as image:  # Image.open refuses large ones
        if image.info.get("inputs") == inputs:
            pixels = np.array(image.histogram()[:n_classes], np.int64)
            return Prediction(name, image.size[::-1], pixels, "kept from an earlier call")
    return None  # of other inputs, or damaged


def _count(strips: Iterator[tuple[int, np.ndarray]], height: int, advance: Callable[[float], object]) -> Iterator[tuple[int, np.ndarray]]:
    "Report each strip after it was used."
    for top, logits in strips:
        yield top, logits
        advance(logits.shape[1] / height)


def _write_maps(
    name: str,
    raster: Raster,
    strips: Iterator[tuple[int, np.ndarray]],  # of `predict_strips`
    folder: Path,  # a new one
    n_classes: int,  # background included
    inputs: str = "",  # stored in the class map
) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # pixels of each class `(C,)` int64; title → picture of every few pixels
    "Reduce predicted strips to maps of one byte per pixel as they arrive, and write these."
    labels, bits = np.empty(raster.size, np.uint8), np.empty(raster.size, np.uint8)
    counts, seen, step = np.zeros(n_classes, np.int64), [], math.ceil(max(raster.size) / PICTURED)
    for top, logits in strips:
        end = top + logits.shape[1]
        labels[top:end], bits[top:end] = logits.argmax(0), pack_labels(list(logits[1:] > 0))
        seen.append(raster.rows(top, end)[:, -top % step :: step, ::step].copy())  # a view would keep every pixel
        if raster.valid is not None:
            valid = raster.valid(top, end)
            labels[top:end][~valid], bits[top:end][~valid] = NODATA, 0
        counts += np.bincount(labels[top:end].ravel(), minlength=NODATA + 1)[:n_classes]
    text = PngImagePlugin.PngInfo()
    text.add_text("inputs", inputs)
    for kind, pixels in {"labels": labels, "bits": bits}.items():
        (folder / kind).mkdir()
        Image.fromarray(pixels).save(folder / kind / f"{name}.png", pnginfo=text)
    if raster.place:
        (folder / "georeferenced").mkdir()
        _write_georeferenced(folder / "georeferenced" / f"{name}.tif", labels, raster.place, n_classes)
    return counts, _as_panels(np.concatenate(seen, 1), labels[::step, ::step], raster.planes)


def _as_panels(
    image: np.ndarray,  # R, G, B, NIR, `(4, h, w)` uint8
    labels: np.ndarray,  # class per pixel, or NODATA, `(h, w)` uint8
    planes: Sequence[int],  # indices of those that the file has
) -> dict[str, np.ndarray]:  # title → `(h, w)` or `(h, w, 3)` uint8
    "Return pictures of what the file has, and of the classes, black where there is no data."
    has_data = labels != NODATA
    panels = {"RGB": image[:3].transpose(1, 2, 0)} if 0 in planes else {}
    panels |= {"NIR": image[3]} if 3 in planes else {}
    return panels | {"prediction": paint_classes(labels * has_data) * has_data[..., None]}
