"""Image files of several kinds, found in folders and opened as rows of red, green, blue and near-infrared bytes."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import Image

from agrivision_repro.core import how_to_install, notes_stream
from agrivision_repro.data.tiles import LZW, SUFFIXES, BadFile, decode_image, list_images, missing_file
from agrivision_repro.predict.bands import BYTES, Raster, Reading, Stored, as_raster, describe_color

_WANTED = "a TIFF, JPEG or PNG, images/rgb/NAME.jpg with images/nir/NAME.jpg beside it, or a folder of these"


_IGNORED = ("Thumbs.db", "desktop.ini")  # files of operating systems, as hidden ones


_TIFF = (".tif", ".tiff")


_GDAL_METADATA, _GDAL_NODATA = 42112, 42113  # numbers of TIFF tags


_PLACING = (33550, 33922, 34264, 34735, 50844)  # numbers of TIFF tags: scale, points, matrix, projection, rational polynomials


class Scene(NamedTuple):
    "An image to predict, not opened yet."

    name: str  # without a suffix
    path: Path  # an image file, or the RGB image of a pair
    nir: Path | None = None  # the NIR image of a pair, which may be missing; None: not a pair

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.path, self.nir) if path and path.is_file()]

    @property
    def sidecars(self) -> list[Path]:  # files beside these that change their place, mask or nodata
        return [beside for path in self.files for beside in _find_beside(path, (f"{path.suffix}.msk", "_rpc.txt", ".rpb"))]


def find_scenes(
    paths: Sequence[str | Path],  # files and folders
) -> list[Scene]:  # each once
    "List the images in files and folders."
    scenes = [scene for path in paths for scene in _scenes_of(Path(os.path.expanduser(path)))]
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
    home = Path(os.path.abspath(path)).parent  # of "a.jpg" in the working folder, too; a link is not followed
    rgb, nir = (home.parent / c for c in ("rgb", "nir"))
    if home.name not in ("rgb", "nir") or not (rgb.is_dir() and nir.is_dir()):
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
    with _open_pair(scene, reading) if scene.nir else _open_file(scene.path) as stored:
        yield as_raster(stored, reading)


def _open_file(path: Path) -> AbstractContextManager[Stored]:
    "Open one image file."
    if path.suffix.lower() not in _TIFF:
        return nullcontext(_decode(path))
    rasterio = find_rasterio()
    return _open_georeferenced(path, rasterio) if rasterio else open_tiff(path)


@contextmanager
def _open_pair(scene: Scene, reading: Reading) -> Iterator[Stored]:
    "Open both images of a pair; one that the model does not use may be missing."
    needed = {scene.path: set(reading.planes) != {3}, scene.nir: 3 in reading.planes}
    for path, is_needed in needed.items():
        if is_needed and not path.is_file():
            raise missing_file(path)
    with ExitStack() as stack:
        yield _join([stack.enter_context(_open_file(path)) for path in scene.files], scene.nir)


def _join(
    halves: Sequence[Stored],  # of a pair, or one of them
    nir: Path,  # of the NIR image
) -> Stored:
    "Describe a pair as one image; raise BadFile if its parts do not fit together."
    names, bands = [], []
    for half in halves:
        colors, size = ("nir",) if half.path == nir else ("red", "green", "blue"), half.shape[1:]
        if half.shape[0] != len(colors):
            n = half.shape[0]
            raise BadFile("wrong mode", f"{half.path} has {n} band{'s' * (n > 1)}, wanted {', '.join(colors)} in a pair: convert it")
        if size != halves[0].shape[1:]:
            (height, width), (h, w) = size, halves[0].shape[1:]
            raise BadFile("wrong size", f"{half.path} is {width}×{height} pixels, but the tile's RGB image is {w}×{h}: unpack it again")
        names, bands = [*names, *colors], [*bands, *((half, k) for k in range(len(colors)))]
    masks = [half.mask for half in halves if half.mask]
    return Stored(
        max(halves, key=lambda half: np.dtype(half.dtype).itemsize).path,  # the one whose values a message is about
        (len(bands), *halves[0].shape[1:]),
        np.result_type(*(half.dtype for half in halves)),
        names,
        lambda chosen, top, end: np.concatenate([half.read([k], top, end) for half, k in (bands[i] for i in chosen)]),
        [half.nodata[k] if half.nodata else None for half, k in bands],
        (lambda top, end: np.all([mask(top, end) for mask in masks], 0)) if masks else None,
        next((half.place for half in halves if half.place), {}),
    )


def _decode(path: Path) -> Stored:
    "Decode a JPEG or a PNG."
    with _refusing(path, "fetch it again, or convert it"):
        pixels = _decode_file(path)
    bands = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
    colors = ("red", "green", "blue", "alpha")[: len(bands)] if len(bands) > 2 else ("", "alpha")[: len(bands)]
    return _as_stored(path, bands, colors, _find_place(path))


def _decode_file(path: Path) -> np.ndarray:  # `(H, W)` or `(H, W, bands)`
    "Decode an image file without Pillow's limit of pixels, which is for files that nobody asked for."
    usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return decode_image(path.read_bytes())
    finally:
        Image.MAX_IMAGE_PIXELS = usual


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


def _find_beside(path: Path, others: Sequence[str] = ()) -> list[Path]:
    "List an image's world files and GDAL's metadata, and files of other endings, in upper or lower case."
    suffix = path.suffix
    endings = (f".{suffix[1]}{suffix[-1]}w", f"{suffix}w", ".wld", f"{suffix}.aux.xml", *others)
    forms = dict.fromkeys(form for ending in endings for form in (ending, ending.lower(), ending.upper()))
    return [beside for form in forms if (beside := path.with_name(path.stem + form)).is_file()]


def _is_placed_beside(path: Path) -> bool:
    "Return True if a file beside an image places it; GDAL's metadata may be mere statistics."
    tags = (b"<GeoTransform", b"<SRS", b"<GCPList", b'domain="RPC"')
    found = _find_beside(path)
    return any(beside.suffix.lower() != ".xml" or any(tag in beside.read_bytes() for tag in tags) for beside in found)


def _find_place(path: Path) -> dict:  # of `Raster`
    "Return the georeferencing of a JPEG or PNG, which is in a file beside it; print a note if it cannot be read."
    if not _is_placed_beside(path):
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
        pixels = _read_page(path, page)
        masks = [other.asarray() for other in file.pages[1:] if other.is_mask and other.shape == pixels.shape[1:]]
        colors, nodata = _declared_colors(page, len(pixels)), [_declared_nodata(page)] * len(pixels)
        is_placed = any(tag in page.tags for tag in _PLACING)
    if is_placed or _is_placed_beside(path):
        _say_dropped(path)
    stored = _as_stored(path, pixels, colors, {})
    yield replace(stored, nodata=nodata, mask=(lambda top, end: masks[0][top:end]) if masks else None)


def _read_page(path: Path, page: tifffile.TiffPage) -> np.ndarray:  # `(bands, height, width)`
    "Read a page of a TIFF, memory-mapped if it can be; Pillow needs no other package for some that tifffile cannot read alone."
    is_for_pillow = page.compression == LZW and page.samplesperpixel <= 3 and page.dtype == np.uint8
    pixels = _decode_file(path) if is_for_pillow else page.asarray(out="memmap")
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0) if is_for_pillow or page.axes.endswith("S") else pixels


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
    points, crs = image.gcps  # of points without a reference system, `crs` is None, which rasterio cannot write
    rpcs = {"rpcs": image.rpcs} if image.rpcs else {}
    if image.crs is not None or not image.transform.is_identity:
        return {"crs": image.crs, "transform": image.transform} | rpcs
    return ({"crs": crs or find_rasterio().crs.CRS(), "gcps": points} if points else {}) | rpcs
