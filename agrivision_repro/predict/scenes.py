"""Image files of several kinds, found in folders and opened as rows of red, green, blue and near-infrared bytes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile

from agrivision_repro.core import how_to_install, notes_stream
from agrivision_repro.data.tiles import SUFFIXES, BadFile, decode_image, list_images, missing_file, read_image
from agrivision_repro.predict.bands import BYTES, Raster, Reading, Stored, as_raster, describe_color

_WANTED = "a TIFF, JPEG or PNG, images/rgb/NAME.jpg with images/nir/NAME.jpg beside it, or a folder of these"


_IGNORED = ("Thumbs.db", "desktop.ini")  # files of operating systems, as hidden ones


_TIFF = (".tif", ".tiff")


_GDAL_METADATA, _GDAL_NODATA, _RPCS = 42112, 42113, 50844  # numbers of TIFF tags


class Scene(NamedTuple):
    "An image to predict, not opened yet."

    name: str  # without a suffix
    path: Path  # an image file, or the RGB image of a pair
    nir: Path | None = None  # the NIR image of a pair, which may be missing; None: not a pair

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.path, self.nir) if path and path.is_file()]


def find_scenes(
    paths: Sequence[str | Path],  # files and folders
) -> list[Scene]:  # each once
    "List the images in files and folders."
    scenes = [scene for path in paths for scene in _scenes_of(Path(path).expanduser())]
    scenes = list(dict.fromkeys(scenes))  # both images of a pair may be given
    if not scenes:
        raise ValueError(f"no image among {', '.join(Path(path).name for path in paths[:8])}: wanted {_WANTED}")
    twice = [name for name, n in Counter(scene.name for scene in scenes).items() if n > 1]
    if twice:
        raise ValueError(f"several inputs have the same name, {', '.join(twice[:8])}: predict them into different folders, one call each")
    return scenes


def _scenes_of(path: Path) -> list[Scene]:
    "List the images in one file or folder."
    if path.is_dir():
        homes = [home for home in (path / "images", path / "test" / "images", path) if all((home / c).is_dir() for c in ("rgb", "nir"))]
        found = list_images(homes[0] / "rgb" if homes else path)
        if not found:
            raise ValueError(f"{path} contains no images: wanted {_WANTED}")
        return [_as_scene(image) for image in found]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: wanted {_WANTED}")
    if path.name.startswith(".") or path.name in _IGNORED:
        return []
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is not a supported image: wanted {_WANTED}")
    return [_as_scene(path)]


def _as_scene(path: Path) -> Scene:
    "Return a pair if a file is in one of two neighboring folders rgb and nir, else the single file."
    rgb, nir = (path.parent.parent / c for c in ("rgb", "nir"))
    if path.parent.name not in ("rgb", "nir") or not (rgb.is_dir() and nir.is_dir()):
        return Scene(path.stem, path)
    return Scene(path.stem, _find_file(rgb, path), _find_file(nir, path))


def _find_file(folder: Path, like: Path) -> Path:
    "Return the image of the same name in a folder, whatever its suffix."
    same = [path for path in sorted(folder.glob(f"{escape(like.stem)}.*")) if path.suffix.lower() in SUFFIXES]
    return folder / like.name if folder / like.name in same or not same else same[0]


def find_rasterio() -> ModuleType | None:
    "Import rasterio; return None if it is not installed."
    if find_spec("rasterio") is None:
        return None
    import rasterio

    return rasterio


@contextmanager
def open_scene(scene: Scene, reading: Reading = BYTES) -> Iterator[Raster]:
    "Open an image; raise BadFile or FileNotFoundError if that fails."
    if scene.nir or scene.path.suffix.lower() not in _TIFF:
        yield as_raster(_decode(scene, reading), reading)
        return
    rasterio = find_rasterio()
    with _open_georeferenced(scene.path, rasterio) if rasterio else open_tiff(scene.path) as stored:
        yield as_raster(stored, reading)


def _decode(scene: Scene, reading: Reading) -> Stored:
    "Decode a pair, a JPEG or a PNG; a pair may lack the image that the model does not use."
    colors = ("red", "green", "blue")
    if scene.nir is None:
        with _refusing(scene.path, "fetch it again, or convert it"):
            pixels = decode_image(scene.path.read_bytes())
        bands = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
        colors = (*colors, "alpha")[: len(bands)] if len(bands) > 2 else ("", "alpha")[: len(bands)]
        return _as_stored(scene.path, bands, colors, _find_place(scene.path))
    needs_nir, needs_rgb = 3 in reading.planes, set(reading.planes) != {3}
    if needs_nir and not scene.nir.is_file():
        raise missing_file(scene.nir)
    rgb = read_image(scene.path, "RGB") if needs_rgb or scene.path.is_file() else None
    nir = read_image(scene.nir, "L", rgb.shape[:2] if rgb is not None else None) if scene.nir.is_file() else None
    bands = [*(rgb.transpose(2, 0, 1) if rgb is not None else ()), *([nir] if nir is not None else [])]
    return _as_stored(scene.path, bands, (*colors[: len(bands) // 3 * 3], "nir")[: len(bands)], _find_place(scene.files[0]))


def _as_stored(path: Path, bands: Sequence[np.ndarray], colors: Sequence[str], place: dict) -> Stored:
    "Describe bands in memory or memory-mapped."
    return Stored(
        path,
        (len(bands), *bands[0].shape),
        bands[0].dtype,
        colors,
        lambda chosen, top, end: np.stack([bands[k][top:end] for k in chosen]),
        place=place,
    )


def _find_place(path: Path) -> dict:  # of `Raster`
    "Return the georeferencing of a JPEG or PNG, which is in a file beside it; print a note if it cannot be read."
    suffix = path.suffix
    endings = (f".{suffix[1]}{suffix[-1]}w", f"{suffix}w", ".wld", f"{suffix}.aux.xml")
    if not any(path.with_suffix(ending).is_file() for ending in endings):
        return {}
    rasterio = find_rasterio()
    if rasterio is None:
        _say_dropped(path)
        return {}
    with _open_georeferenced(path, rasterio) as stored:
        return stored.place


def _say_dropped(path: Path) -> None:
    print(f"{path}: georeferencing is dropped, rasterio is not installed ({how_to_install('geo')})", file=notes_stream())


@contextmanager
def _refusing(path: Path, remedy: str, errors: type[Exception] = Exception) -> Iterator[None]:
    "Raise BadFile with the first cause of any error; a decoder may raise anything."
    try:
        yield
    except errors as error:
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        raise BadFile("unreadable", f"{path} cannot be read ({' '.join(str(cause).split())}): {remedy}") from error


@contextmanager
def open_tiff(path: Path) -> Iterator[Stored]:
    "Open a TIFF with tifffile, memory-mapped if it can be."
    with _refusing(path, f"fetch it again, or {how_to_install('geo')}"), tifffile.TiffFile(path) as file:
        page = file.pages[0]
        pixels = page.asarray(out="memmap")
        pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0) if page.axes.endswith("S") else pixels
        masks = [other.asarray() for other in file.pages[1:] if other.is_mask and other.shape == pixels.shape[1:]]
        colors, nodata = _declared_colors(page, len(pixels)), [_declared_nodata(page)] * len(pixels)
        is_placed = page.is_geotiff or _RPCS in page.tags
    if is_placed:
        _say_dropped(path)
    stored = _as_stored(path, pixels, colors, {})
    yield replace(stored, nodata=nodata, mask=(lambda top, end: masks[0][top:end]) if masks else None)


def _declared_colors(page: tifffile.TiffPage, n_bands: int) -> list[str]:  # of `bands.describe_color`, one per band
    "Return the colors that a TIFF declares by its photometric interpretation, its extra samples and GDAL's metadata."
    n_extra = len(page.extrasamples)
    rgb = ["red", "green", "blue"]
    colors = {2: rgb, 3: ["palette"], 5: ["cyan", "magenta", "yellow", "black"], 6: rgb}.get(int(page.photometric), [])
    colors = (colors + [""] * n_bands)[: n_bands - n_extra] + ["alpha" if kind in (1, 2) else "" for kind in page.extrasamples]
    texts = [""] * n_bands
    for item in ElementTree.fromstring(page.tags.valueof(_GDAL_METADATA, "<none/>")):
        sample, kinds = int(item.get("sample", n_bands)), {"COLORINTERP": colors, "DESCRIPTION": texts}
        if sample < n_bands and item.get("name") in kinds:
            kinds[item.get("name")][sample] = item.text or ""
    return list(map(describe_color, colors, texts))


def _declared_nodata(page: tifffile.TiffPage) -> float | None:
    "Return the value that GDAL's tag declares as nodata; None if there is none."
    with suppress(ValueError):
        return float(page.tags.valueof(_GDAL_NODATA, ""))
    return None


@contextmanager
def _open_georeferenced(path: Path, rasterio: ModuleType) -> Iterator[Stored]:
    "Open an image with rasterio, with its georeferencing."

    def guarded(work: Callable, *given: object, **named: object):
        errors = rasterio.errors.RasterioError
        with warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning):
            with _refusing(path, "fetch it again, or convert it", errors):
                return work(*given, **named)

    with guarded(rasterio.open, path) as image:
        flags = rasterio.enums.MaskFlags
        has_mask = flags.per_dataset in image.mask_flag_enums[0] and flags.alpha not in image.mask_flag_enums[0]
        width = (0, image.width)
        yield Stored(
            path,
            (image.count, *image.shape),
            image.dtypes[0],
            [describe_color(color.name, text) for color, text in zip(image.colorinterp, image.descriptions, strict=True)],
            lambda bands, top, end: guarded(image.read, [k + 1 for k in bands], window=((top, end), width)),
            image.nodatavals,
            (lambda top, end: guarded(image.read_masks, 1, window=((top, end), width))) if has_mask else None,
            _place_of(image),
        )


def _place_of(image) -> dict:  # of `Raster`
    "Return how a file opened by rasterio is placed: by a transform, by ground control points, or by rational polynomials."
    points, crs = image.gcps
    rpcs = {"rpcs": image.rpcs} if image.rpcs else {}
    if image.crs is not None or not image.transform.is_identity:
        return {"crs": image.crs, "transform": image.transform} | rpcs
    return ({"crs": crs, "gcps": points} if points else {}) | rpcs
