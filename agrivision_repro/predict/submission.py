"""The challenge's zip of label maps: write it and check it."""

from __future__ import annotations

import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from agrivision_repro.core import move_file
from agrivision_repro.data.editions import AGRIVISION_2020, find_edition, open_tiles

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


CHALLENGE_CLASSES = ("background", *AGRIVISION_2020)


_CHALLENGE_SIZE = (512, 512)  # height, width of every tile


_LARGEST = 4 << 20  # bytes of a PNG; a tile's has at most 0.3 million


class Violation(NamedTuple):
    "One fault of a submission."

    kind: str  # "missing", "extra", "nested", "duplicate", "not a PNG", "damaged", "wrong size", "wrong mode", "wrong value", "not a zip"
    where: str  # name in the folder or zip
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where!r} {self.message}"


@contextmanager
def _open_entries(path: Path) -> Iterator[list[tuple[str, Callable[[], bytes]]]]:  # name, and a function that reads it; folders end in "/"
    "List the entries of a folder or a zip; raise zipfile.BadZipFile if it is neither."
    if path.is_dir():
        files = sorted(path.rglob("*"))
        yield [(p.relative_to(path).as_posix() + "/" * p.is_dir(), partial(_read_some, partial(p.open, "rb"))) for p in files]
        return
    with zipfile.ZipFile(path) as archive:
        entries = {info: info.filename or "(an entry without a name)" for info in archive.infolist()}
        yield [(name, partial(_read_some, partial(archive.open, info))) for info, name in entries.items()]


def _read_some(opener: Callable) -> bytes:
    "Read a file, up to one byte more than the limit."
    with opener() as file:
        return file.read(_LARGEST + 1)


def _check_png(
    content: bytes,
    size: tuple[int, int],  # wanted height, width, pixels
) -> tuple[str, str] | None:  # kind of violation and message; None: no fault
    "Check one PNG of a submission."
    if content[:8] != _SIGNATURE or content[12:16] != b"IHDR" or len(content) < 33:
        return "not a PNG", f"begins with {content[:8]!r}: save it as PNG"
    width, height, depth, color = struct.unpack(">IIBB", content[16:26])
    if (depth, color) != (8, 0):
        kind = {0: "gray", 2: "RGB", 3: "palette", 4: "gray and alpha", 6: "RGB and alpha"}.get(color, f"color type {color}")
        return "wrong mode", f"is {kind} of {depth} bits, wanted gray of 8 bits: one byte per pixel, the class index"
    if (height, width) != tuple(size):
        return "wrong size", f"is {width}×{height} pixels, wanted {size[1]}×{size[0]}, the size of its image"
    try:
        with Image.open(BytesIO(content)) as image:
            values = np.unique(np.asarray(image))
    except Exception as error:  # a decoder may raise anything on an untrusted file
        return "damaged", f"cannot be decoded ({' '.join(str(error).split())}): write it again"
    bad = [int(value) for value in values if value >= len(CHALLENGE_CLASSES)]
    if bad:
        shown = ", ".join(map(str, bad[:8])) + ", …" * (len(bad) > 8)
        return "wrong value", f"contains {shown}: wanted 0 (background) to {len(CHALLENGE_CLASSES) - 1} ({CHALLENGE_CLASSES[-1]}) only"
    return None


def _check_entry(
    name: str,  # in the folder or zip
    read: Callable[[], bytes],
    sizes: Mapping[str, tuple[int, int]] | None,  # wanted names → height, width; None: any name
) -> tuple[str, str] | None:  # kind of violation and message; None: no fault
    "Check one entry of a submission."
    if "/" in name or "\\" in name:
        return "nested", "is in a folder: put all PNGs at the top level"
    if not name.endswith(".png"):
        return "extra", "is not named NAME.png: remove or rename it"
    if sizes is not None and name.removesuffix(".png") not in sizes:
        return "extra", "matches no image of the test set: remove it"
    try:
        content = read()
    except Exception as error:  # encrypted or damaged
        return "damaged", f"cannot be read ({' '.join(str(error).split())}): write it again"
    if len(content) > _LARGEST:
        return "wrong size", f"has more than {_LARGEST:,} bytes, too many for the map of a tile"
    return _check_png(content, _CHALLENGE_SIZE if sizes is None else sizes[name.removesuffix(".png")])


def check_submission(
    path: str | Path,  # a folder or a zip
    names: Mapping[str, tuple[int, int]] | Sequence[str] | None = None,  # wanted, perhaps with height and width; None: any name
) -> list[Violation]:  # empty: no fault
    "Check a submission against the challenge's rules; list everything that breaks one."
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: wanted a folder of PNGs, or a zip of them")
    sizes = names if names is None or isinstance(names, Mapping) else dict.fromkeys(names, _CHALLENGE_SIZE)
    try:
        with _open_entries(path) as entries:
            found = [Violation(fault[0], name, fault[1]) for name, read in entries if (fault := _check_entry(name, read, sizes))]
            counts = Counter(name for name, _ in entries)
    except Exception as error:  # an untrusted file
        return [Violation("not a zip", path.name, f"cannot be opened ({' '.join(str(error).split())}): pass a folder, or zip it again")]
    found += [Violation("duplicate", name, f"occurs {n} times in the zip, wanted once") for name, n in counts.items() if n > 1]
    missing = [f"{name}.png" for name in sizes if f"{name}.png" not in counts] if sizes is not None else []
    found += [Violation("missing", name, "is missing: predict it, too") for name in missing]
    return found or ([] if counts else [Violation("missing", path.name, "is empty: wanted a PNG for every image of the test set")])


def tile_sizes(
    data: str,  # an edition, see `data.editions.find_edition`
    root: str | Path,  # its folder
) -> dict[str, tuple[int, int]]:  # name of each test tile → height, width, pixels
    "List the sizes of a test set's images, from their headers."
    if find_edition(data).classes != CHALLENGE_CLASSES:
        raise ValueError(f"data is {data!r}: wanted agrivision-2020, or data with the same classes")
    tiles, sizes = open_tiles(data, root, "test"), {}
    for name in tiles.names:
        with Image.open(tiles.files(name)["rgb"]) as image:
            sizes[name] = image.size[::-1]
    return sizes


def write_submission(
    labels: Path,  # folder of label maps, `NAME.png`
    path: Path,  # the zip
    sizes: Mapping[str, tuple[int, int]],  # name → height, width, pixels
) -> None:
    "Zip label maps for the challenge; raise ValueError listing the faults if they break its rules."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".zipping-", dir=path.parent) as workshop:
        made = Path(workshop) / path.name
        with zipfile.ZipFile(made, "w") as archive:  # PNGs are compressed already
            for name in sorted(sizes):
                if (labels / f"{name}.png").is_file():
                    archive.writestr(zipfile.ZipInfo(f"{name}.png"), (labels / f"{name}.png").read_bytes())
        faults = check_submission(made, sizes)
        if faults:
            shown = "; ".join(map(str, faults[:8])) + f"; and {len(faults) - 8} more" * (len(faults) > 8)
            raise ValueError(f"{path} was not written, {len(faults)} rules of the challenge are broken: {shown}")
        move_file(made, path)
