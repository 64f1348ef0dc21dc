"""Image files of several kinds as rows of red, green, blue and near-infrared bytes."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import tifffile

from agrivision_repro.core import how_to_install
from agrivision_repro.data.tiles import BadFile, read_image

_WANTED = "a four-band TIFF, images/rgb/NAME.jpg with images/nir/NAME.jpg beside it, or a folder with images/rgb and images/nir"


class Scene(NamedTuple):
    "An image to predict, not opened yet."

    name: str  # without a suffix
    path: Path  # a TIFF, or the RGB image of a pair


def find_scenes(
    paths: Sequence[str | Path],  # files and folders
) -> list[Scene]:  # each once
    "List the images in files and folders."
    scenes = [scene for path in paths for scene in _scenes_of(Path(path).expanduser())]
    scenes = list(dict.fromkeys(scenes))  # both images of a pair may be given
    twice = [name for name, n in Counter(scene.name for scene in scenes).items() if n > 1]
    if twice:
        raise ValueError(f"several inputs have the same name, {', '.join(twice[:8])}: predict them into different folders, one call each")
    return scenes


def _scenes_of(path: Path) -> list[Scene]:
    "List the images in one file or folder."
    if path.is_dir():
        homes = [home for home in (path, path / "test") if all((home / "images" / c).is_dir() for c in ("rgb", "nir"))]
        found = sorted((homes[0] / "images" / "rgb").glob("[!.]*.jpg")) if homes else []
        if not found:
            raise ValueError(f"{path} contains no image pairs: wanted {_WANTED}")
        return [Scene(rgb.stem, rgb) for rgb in found]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: wanted {_WANTED}")
    if path.suffix.lower() in (".tif", ".tiff"):
        return [Scene(path.stem, path)]
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png") or path.parent.name not in ("rgb", "nir"):
        raise ValueError(f"{path} is not a supported image: wanted {_WANTED}")
    return [Scene(path.stem, path.parent.parent / "rgb" / path.name)]


@dataclass(frozen=True)
class Raster:
    "An open image."

    size: tuple[int, int]  # height, width, pixels
    rows: Callable[[int, int], np.ndarray]  # first row, row to stop before → R, G, B, NIR, `(4, h, W)` uint8
    place: dict = field(default_factory=dict)  # rasterio's `crs` and `transform`; empty: unknown


def find_rasterio() -> ModuleType | None:
    "Import rasterio; return None if it is not installed."
    if find_spec("rasterio") is None:
        return None
    import rasterio

    return rasterio


@contextmanager
def open_scene(scene: Scene) -> Iterator[Raster]:
    "Open an image; raise BadFile or FileNotFoundError if that fails."
    if scene.path.suffix.lower() not in (".tif", ".tiff"):
        rgb = read_image(scene.path, "RGB")
        nir = read_image(scene.path.parent.parent / "nir" / scene.path.name, "L", rgb.shape[:2])
        yield Raster(nir.shape, lambda top, end: np.concatenate([rgb[top:end].transpose(2, 0, 1), nir[None, top:end]]))
        return
    rasterio = find_rasterio()
    with _open_georeferenced(scene.path, rasterio) if rasterio else open_tiff(scene.path) as raster:
        yield raster


def _check_bands(path: Path, shape: tuple[int, ...], dtype: object) -> None:
    "Check that an image has four bands of bytes, as its first axis; raise BadFile if not."
    if len(shape) != 3 or shape[0] != 4 or np.dtype(dtype) != np.uint8 or not all(shape):
        remedy = "convert it, with values scaled to 0 to 255"
        raise BadFile("wrong mode", f"{path} is (bands, height, width) = {shape} {dtype}, wanted (4, H, W) uint8, R, G, B, NIR: {remedy}")


@contextmanager
def open_tiff(path: Path) -> Iterator[Raster]:
    "Open a four-band TIFF with tifffile, memory-mapped if it can be."
    try:
        with tifffile.TiffFile(path) as file:
            pixels, is_placed = file.pages[0].asarray(out="memmap"), file.pages[0].is_geotiff
            pixels = np.moveaxis(pixels, -1, 0) if file.pages[0].axes.endswith("S") else pixels
    except Exception as error:  # a decoder may raise anything
        reason = " ".join(str(error).split())
        raise BadFile("unreadable", f"{path} cannot be read ({reason}): fetch it again, or {how_to_install('geo')}") from error
    _check_bands(path, pixels.shape, pixels.dtype)
    if is_placed:
        print(f"{path}: georeferencing is dropped, rasterio is not installed ({how_to_install('geo')})", file=sys.stderr)
    yield Raster(pixels.shape[1:], lambda top, end: np.ascontiguousarray(pixels[:, top:end]))


@contextmanager
def _open_georeferenced(path: Path, rasterio: ModuleType) -> Iterator[Raster]:
    "Open a four-band TIFF with rasterio, with its georeferencing."

    def guarded(work: Callable, *given: object, **named: object):
        try:
            with warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning):
                return work(*given, **named)
        except rasterio.errors.RasterioError as error:
            reason = " ".join(str(error).split())
            raise BadFile("unreadable", f"{path} cannot be read ({reason}): fetch it again, or convert it") from error

    with guarded(rasterio.open, path) as image:
        _check_bands(path, (image.count, *image.shape), image.dtypes[0])
        place = {"crs": image.crs, "transform": image.transform}
        is_placed = image.crs is not None or not image.transform.is_identity
        width = (0, image.width)
        yield Raster(image.shape, lambda top, end: guarded(image.read, window=((top, end), width)), place if is_placed else {})
