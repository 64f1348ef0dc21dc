"""Bands of an image file as red, green, blue and near-infrared bytes, and a mask of the pixels that contain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agrivision_repro.data.batches import CHANNELS
from agrivision_repro.data.tiles import BadFile

COLORS = ("red", "green", "blue", "nir")  # in the order of the model's planes


_DESCRIBED = {"r": "red", "g": "green", "b": "blue", "n": "nir", "near infrared": "nir", "near ir": "nir", "nearinfrared": "nir"}


class Reading(NamedTuple):
    "What a model needs of an image file, and how to read it."

    planes: tuple[int, ...] = (0, 1, 2, 3)  # indices of R, G, B, NIR that the model uses, as in `batches.CHANNELS`
    bands: tuple[int, ...] = ()  # numbers of the file's R, G, B and perhaps NIR bands, from 1; empty: as declared
    scale: float = 0  # stored value that becomes 255; 0: the file has bytes


BYTES = Reading()  # R, G, B, NIR, as declared


def plan_reading(
    channels: str,  # of the model, a key of `batches.CHANNELS`
    bands: str = "",  # numbers of the R, G, B and perhaps NIR band, such as "3,2,1,4"; "": as declared
    scale: float = 0,  # stored value that becomes 255; 0: files have bytes
) -> Reading:
    "Check how to read files for a model; raise ValueError if its channels are not among the bands."
    words = [word.strip() for word in bands.split(",")] if bands else []
    numbers = tuple(int(word) for word in words if word.isdecimal() and int(word) > 0)
    if bands and not (len(words) == len(set(numbers)) in (3, 4)):
        raise ValueError(f"bands is {bands!r}: wanted the numbers of the red, green, blue and perhaps NIR band, such as 3,2,1,4")
    if bands and max(CHANNELS[channels]) >= len(numbers):
        raise ValueError(f"bands is {bands!r}: the model also needs the number of the NIR band, as the fourth")
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale is {scale}: wanted the stored value that becomes 255, such as 10000 or 1")
    return Reading(CHANNELS[channels], numbers, scale)


def describe_color(
    color: str,  # color interpretation, or ""
    description: str | None,  # of the band, written by a person or a program
) -> str:  # one of `COLORS`, "alpha", another interpretation such as "rededge", or "": none declared
    "Return the color that a band declares; its description takes precedence, because many programs write red, green, blue, alpha anyway."
    words = " ".join((description or "").lower().replace("_", " ").replace("-", " ").split())
    named, color = _DESCRIBED.get(words, words), color.lower()
    if named in (*COLORS, "alpha"):
        return named
    return "" if color in ("undefined", "gray") else color


@dataclass(frozen=True)
class Stored:
    "An open image file, its bands as they are stored."

    path: Path
    shape: tuple[int, int, int]  # bands, height, width
    dtype: object
    colors: Sequence[str]  # of each band, from `describe_color`
    read: Callable[[Sequence[int], int, int], np.ndarray]  # indices of bands, first row, row to stop before → `(bands, h, W)`
    nodata: Sequence[float | None] = ()  # of each band; empty: none
    mask: Callable[[int, int], np.ndarray] | None = None  # first row, row to stop before → `(h, W)`, 0 where there is no data
    place: dict = field(default_factory=dict)  # of `Raster`


@dataclass(frozen=True)
class Raster:
    "An open image."

    size: tuple[int, int]  # height, width, pixels
    rows: Callable[[int, int], np.ndarray]  # first row, row to stop before → R, G, B, NIR, `(4, h, W)` uint8; 0 where there is no data
    place: dict = field(default_factory=dict)  # rasterio's `crs` with `transform` or `gcps`, or `rpcs`; empty: unknown
    valid: Callable[[int, int], np.ndarray] | None = None  # as `rows` → `(h, W)` bool, False where there is no data; None: all are valid
    planes: tuple[int, ...] = (0, 1, 2, 3)  # indices of R, G, B, NIR that the file has; others are 0
    note: str = ""  # which bands were read, unless in the usual order


def as_raster(stored: Stored, reading: Reading) -> Raster:
    "Select bands, scale them to bytes and mask what is nodata; raise BadFile if a needed band or the scale is missing."
    kind = np.dtype(stored.dtype)
    if not all(stored.shape) or kind.kind not in "uif":
        raise BadFile("wrong mode", f"{stored.path} is (bands, height, width) = {stored.shape} {kind}: convert it to bytes")
    chosen, note = _choose_bands(stored, reading)
    _check_scale(stored.path, kind, reading.scale)
    alpha = [k for k, color in enumerate(stored.colors) if color == "alpha" and k not in chosen.values()]
    indices, planes = list(chosen.values()), [COLORS.index(color) for color in chosen]
    nodata = [stored.nodata[k] for k in indices] if stored.nodata else []

    @lru_cache(maxsize=1)  # maps need pixels and mask of the same rows
    def read(top: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        raw = stored.read(indices, top, end)
        valid = _find_data(raw, nodata)
        if alpha:
            valid &= (stored.read(alpha, top, end) != 0).all(0)
        if stored.mask:
            valid &= stored.mask(top, end) != 0
        pixels = np.zeros((4, *valid.shape), np.uint8)
        pixels[planes] = _as_bytes(raw, reading.scale) * valid
        return pixels, valid

    return Raster(stored.shape[1:], lambda *rows: read(*rows)[0], stored.place, lambda *rows: read(*rows)[1], tuple(planes), note)


def _choose_bands(
    stored: Stored, reading: Reading
) -> tuple[dict[str, int], str]:  # color → index of its band, in the order of `COLORS`; a note on an unusual order
    "Choose the bands to read: those given, else those declared, else the first three or four in the order R, G, B, NIR."
    if reading.bands:
        chosen = {color: band - 1 for color, band in zip(COLORS, reading.bands, strict=False)}
        if max(reading.bands) > stored.shape[0]:
            raise _lacks(stored, f"not all of {','.join(map(str, reading.bands))}", "name others with --bands")
    else:
        chosen = _find_declared(stored)
    lacking = [COLORS[k] for k in sorted(set(reading.planes)) if COLORS[k] not in chosen]
    if lacking:
        lacking = ["near-infrared" if color == "nir" else color for color in lacking]
        remedy = "name the red, green, blue and NIR bands with --bands if it has them, or choose another model"
        raise _lacks(stored, f"none known to be {' or '.join(lacking)}, which the model needs", remedy)
    chosen = {color: chosen[color] for color in COLORS if color in chosen}
    return chosen, "" if reading.bands else _note_order(stored, chosen)


def _note_order(stored: Stored, chosen: dict[str, int]) -> str:
    "Describe the order of bands, unless it is the usual one."
    if "nir" in chosen and stored.colors[chosen["nir"]] == "alpha":
        return f"band {chosen['nir'] + 1}, declared as alpha, varies: read as NIR"
    numbers = [k + 1 for k in chosen.values()]
    return f"bands {','.join(map(str, numbers))}" if numbers != list(range(1, len(numbers) + 1)) else ""


def _find_declared(stored: Stored) -> dict[str, int]:  # color → index of its band
    "Find bands by their declared colors; if none is declared, three or four are R, G, B, NIR, and a single one is NIR."
    chosen = {color: k for k, color in enumerate(stored.colors) if color in COLORS}
    free = [k for k, color in enumerate(stored.colors) if not color]
    alpha = [k for k, color in enumerate(stored.colors) if color == "alpha"]
    if not chosen.keys() & set(COLORS[:3]) and len(free) in (3, 4):
        chosen, free = chosen | dict(zip(COLORS, free[:3], strict=False)), free[3:]
    if "nir" not in chosen and (chosen.keys() >= set(COLORS[:3]) or len(stored.colors) == 1):
        free = free or [k for k in alpha if not _is_opacity(stored, k)]
        chosen |= {"nir": free[0]} if len(free) == 1 else {}
    return chosen


def _is_opacity(stored: Stored, band: int) -> bool:
    "Return True if most non-zero pixels of a band are opaque; many programs declare any fourth band as alpha."
    height, most = stored.shape[1], np.iinfo(stored.dtype).max if np.dtype(stored.dtype).kind in "ui" else 1
    sample = np.concatenate([stored.read([band], top, top + 1).ravel() for top in range(0, height, -(-height // 64))])
    return (sample == most).sum() >= (sample != 0).sum() / 2


def _lacks(stored: Stored, what: str, remedy: str) -> BadFile:
    n = stored.shape[0]
    declared = ", ".join(color or "undeclared" for color in stored.colors)
    return BadFile("wrong mode", f"{stored.path} has {n} band{'s' * (n > 1)} ({declared}), {what}: {remedy}")


def _check_scale(path: Path, kind: np.dtype, scale: float) -> None:
    if not scale and kind != np.uint8:
        remedy = "pass with --scale the value that becomes 255, such as 10000 or 1; models are trained on bytes"
        raise BadFile("wrong mode", f"{path} has {kind} values: {remedy}")


def _as_bytes(raw: np.ndarray, scale: float) -> np.ndarray:  # like `raw`, uint8
    "Scale stored values to bytes, rounded and clipped; NaN becomes 0."
    if not scale:
        return raw
    scaled = np.nan_to_num(raw.astype(np.float32)) * np.float32(255 / scale)
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _find_data(
    raw: np.ndarray,  # `(bands, h, W)`
    nodata: Sequence[float | None],  # of each band; empty: none
) -> np.ndarray:  # `(h, W)` bool
    "Find pixels that have data: not nodata in every band that declares it, and finite in all."
    valid = np.isfinite(raw).all(0) if raw.dtype.kind == "f" else np.ones(raw.shape[1:], bool)
    declared = [band != value for band, value in zip(raw, nodata, strict=True) if value is not None] if nodata else []
    if declared:
        valid &= np.any(declared, 0)
    return valid
