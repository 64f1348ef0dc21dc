"""Check a copy of a data set: missing, damaged and repeated files, and places in two splits."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from agrivision_repro.core import worker_pool
from agrivision_repro.data.editions import detect_edition, find_edition, open_splits
from agrivision_repro.data.tiles import BadFile, Tile, Tiles, places_in_both, unpack_labels

FAULTS = {
    "missing": "a tile lacks one of its files",
    "unreadable": "not an image, or not of the type that its name implies",
    "truncated": "ends too early",
    "wrong mode": "wrong number of channels or data type",
    "wrong size": "not the size of the tile's first file",
    "not binary": "a label or mask with values other than 0 and 255",
    "unknown code": "a label with a code that the data set's table lacks",
    "bad name": "not FIELD_x1-y1-x2-y2",
    "without image": "a label or mask without a tile",
    "duplicate": "the same image under two names",
    "name in two splits": "one name in two splits",
    "field in two splits": "tiles of one field in two splits: the splits are not independent",
    "place in two splits": "the published splits show one place at different times: validation leaves such tiles out",
    "same place?": "tiles of two splits that look alike: a hint",
    "no valid pixel": "nothing to train on or score",
}


_HARMLESS = ("place in two splits", "same place?", "no valid pixel")


@dataclass(frozen=True)
class Fault:
    "One fault and its location."

    kind: str  # a key of `FAULTS`
    where: str  # path or name
    message: str


@dataclass
class SplitStatistics:
    "Counts over the valid pixels of a set of tiles."

    classes: tuple[str, ...]
    labeled: bool = True  # False: the classes were never published
    n_tiles: int = 0
    fields: set[str] = field(default_factory=set)
    sizes: Counter = field(default_factory=Counter)  # (height, width) → tiles
    n_pixels: int = 0  # valid or not
    n_valid: int = 0
    n_overlapping: int = 0  # valid pixels of two or more classes
    pixels: np.ndarray | int = 0  # of each class, `(C,)` int64
    tiles: np.ndarray | int = 0  # in which each class occurs, `(C,)` int64
    sums: np.ndarray | int = 0  # of the bytes of R, G, B, NIR, `(4,)` int64
    squares: np.ndarray | int = 0  # of their squares

    def add(self, other: SplitStatistics) -> None:
        "Add the counts of another set."
        for name in ("n_tiles", "n_pixels", "n_valid", "n_overlapping", "pixels", "tiles", "sums", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.fields |= other.fields
        self.sizes += other.sizes

    def class_table(self) -> pd.DataFrame:
        "Return pixels, share of the valid pixels in %, and tiles per class."
        pixels, tiles = (np.zeros(len(self.classes), np.int64) + counts for counts in (self.pixels, self.tiles))  # 0 where no tile was read
        share = 100 * pixels / max(self.n_valid, 1)
        return pd.DataFrame({"pixels": pixels, "share, %": share.round(3), "tiles": tiles}, index=list(self.classes))

    def channel_table(self) -> pd.DataFrame:
        "Return mean and standard deviation of each channel, of values in [0, 1]."
        mean, std = mean_and_std(self.n_valid, np.zeros(4) + self.sums, np.zeros(4) + self.squares)
        return pd.DataFrame({"mean": mean, "std": std}, index=["R", "G", "B", "NIR"]).round(4)


def mean_and_std(
    n: int,  # pixels
    sums: np.ndarray,  # of the bytes, per channel, `(4,)` int64
    squares: np.ndarray,  # of their squares
) -> tuple[np.ndarray, np.ndarray]:  # of values in [0, 1]
    "Compute mean and standard deviation of each channel; 0 if there are no pixels."
    n = max(n, 1)
    return sums / n / 255, np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0)) / 255


def count_tile(
    tile: Tile,
    classes: tuple[str, ...],  # background first
    labeled: bool = True,
) -> SplitStatistics:
    "Count the pixels of one tile."
    masks = unpack_labels(tile.labels, len(classes)) & tile.valid
    pixels, values = masks.sum((1, 2)), np.arange(256)
    histogram = np.stack([np.bincount(channel[tile.valid], minlength=256) for channel in tile.image])
    return SplitStatistics(
        classes, labeled, 1, set(), Counter([tile.labels.shape]), tile.valid.size, int(tile.valid.sum()),
        int((masks[1:].sum(0) > 1).sum()), pixels, (pixels > 0).astype(np.int64), histogram @ values, histogram @ values**2,
    )  # fmt: skip


_CELLS, _AROUND = 16, 5  # cells per side of a thumbnail, and of the neighborhood that is subtracted


ALIKE = 0.5  # correlation of details above which two tiles may show one place


def thumbnail(
    tile: Tile,
) -> np.ndarray:  # `(256,)` float32 of mean 0 and length 1; all 0 where there are no details
    "Compute the details of a tile: 16×16 cells of gray minus the cells around."
    gray = tile.image[:3].mean(0, dtype=np.float32)
    gray[~tile.valid] = gray[tile.valid].mean() if tile.valid.any() else 0
    cells = np.asarray(Image.fromarray(gray).resize((_CELLS, _CELLS), Image.Resampling.BOX))
    around = sliding_window_view(np.pad(cells, _AROUND // 2, "reflect"), (_AROUND, _AROUND)).mean((2, 3))
    details = (cells - around).reshape(-1)
    details = np.clip(details, -2 * details.std(), 2 * details.std())
    details -= details.mean()
    length = np.linalg.norm(details)
    return details / length if length > 1e-3 else 0 * details


_TILE_NAME = re.compile(r"[^_]+_\d+-\d+-\d+-\d+")


@dataclass(frozen=True)
class TileReport:
    "Faults and counts of one tile."

    name: str
    faults: tuple[Fault, ...]
    census: SplitStatistics | None  # None if a fault prevents reading the tile
    digest: str  # of its first file: equal for equal images
    details: np.ndarray | None = None  # of `thumbnail`; None like `census`


def _read_parts(tiles: Tiles, name: str) -> tuple[dict[str, np.ndarray], list[Fault]]:
    "Read every readable file of a tile; list the faults of the others."
    parts, faults, size = {}, [], None
    for role, path in tiles.files(name).items():
        where = str(path.relative_to(tiles.root))
        try:
            parts[role] = tiles.load(role, path, size)
            size = size or parts[role].shape[:2]
        except FileNotFoundError as error:
            faults.append(Fault("missing", where, str(error)))
        except BadFile as error:
            faults.append(Fault(error.kind, where, str(error)))
    return parts, faults


def check_tile(tiles: Tiles, name: str) -> TileReport:
    "Read, check and count one tile."
    parts, faults = _read_parts(tiles, name)
    if tiles.is_by_field and not _TILE_NAME.fullmatch(name):
        faults.append(Fault("bad name", name, f"{name} is not FIELD_x1-y1-x2-y2: its field is unknown, so rename or remove it"))
    files = tiles.files(name)
    is_whole = parts.keys() == files.keys()
    census = details = None
    if is_whole:
        tile = tiles.assemble(name, parts)
        census, details = count_tile(tile, tiles.classes, tiles.labeled), thumbnail(tile)
        census.fields = {tiles.field(name)}
    if census is not None and not census.n_valid:
        faults.append(Fault("no valid pixel", name, f"{name} has no valid pixel: it is used neither for training nor for scoring"))
    first = next(iter(files.values()))
    digest = hashlib.blake2b(first.read_bytes()).hexdigest() if first.is_file() else ""
    return TileReport(name, tuple(faults), census, digest, details)


@dataclass
class SplitReport:
    "Counts and faults of a split."

    census: SplitStatistics
    faults: list[Fault] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # tile → digest of its first file
    details: dict[str, np.ndarray] = field(default_factory=dict)  # tile → details of `thumbnail`, of the tiles that can be read


def _check_split(
    tiles: Tiles,
    n_workers: int = 1,  # processes
    shows_progress: bool = False,  # a progress bar on stderr
) -> SplitReport:
    "Check every tile of a split, several at a time."
    report, check = SplitReport(SplitStatistics(tiles.classes, tiles.labeled)), partial(check_tile, tiles)
    with worker_pool(n_workers) as pool:
        found = pool.map(check, tiles.names, chunksize=16) if pool else map(check, tiles.names)
        bar = tqdm(found, f"checking {tiles.split}", len(tiles.names), unit="tile", disable=not shows_progress)
        for tile_report in bar:
            report.faults += tile_report.faults
            report.digests[tile_report.name] = tile_report.digest
            if tile_report.census is not None:
                report.census.add(tile_report.census)
                report.details[tile_report.name] = tile_report.details
    report.faults += _find_strays(tiles)
    return report


def _find_strays(tiles: Tiles) -> list[Fault]:
    "Find labels and masks that belong to no tile."
    if not tiles.binary_roles:
        return []
    known = {path for name in tiles.names for role, path in tiles.files(name).items() if role in tiles.binary_roles}
    found = {path for folder in {path.parent for path in known} for path in folder.glob("[!.]*.png")}
    strays = sorted(path for path in found - known if tiles.holds(path.stem))
    message = "belongs to no tile of this split: its RGB image is missing, or it is a leftover"
    return [Fault("without image", str(path.relative_to(tiles.root)), f"{path} {message}") for path in strays]


def _find_repeats(digests: dict[str, dict[str, str]]) -> list[Fault]:
    "Find equal images and equal names, in one split or in two; `digests` by split and tile."
    faults, by_digest, by_name = [], {}, {}
    for split, name, digest in ((s, n, d) for s, found in digests.items() for n, d in found.items()):
        where = f"{split}/{name}"
        twin = by_digest.setdefault(digest, where) if digest else where
        if twin != where:
            faults.append(Fault("duplicate", where, f"{where} is the same image as {twin}: remove one of them"))
        other = by_name.setdefault(name, split)
        if other != split:
            faults.append(Fault("name in two splits", where, f"{name} is in {other} and in {split}: remove one of them"))
    return faults


def _find_shared_fields(splits: Sequence[Tiles]) -> list[Fault]:
    "Find places with tiles in two splits."
    kind, message = "field in two splits", "field {} has tiles in {} and in {}: a score on one is not independent of the other"
    if splits[0].shares_places:
        kind = "place in two splits"
        message = "place {0} has tiles in {1} and in {2}, of different times: leave them out of {2} for a score that is independent of {1}"
    return [
        Fault(kind, place, message.format(place, one.split, two.split))
        for one, two in combinations(splits, 2)
        for place in sorted(places_in_both(one, two))
    ]


def alike_pairs(
    one: np.ndarray,  # details, one row per tile, `(N, 256)`
    two: np.ndarray,  # `(M, 256)`
    n_rows: int = 512,  # compared at a time, so that memory does not grow with N × M
) -> Iterator[tuple[int, int, float]]:  # row in one, row in two, correlation
    "Yield the pairs whose details correlate above `ALIKE`."
    for start in range(0, len(one), n_rows):
        likeness = one[start : start + n_rows] @ two.T
        for i, j in np.argwhere(likeness > ALIKE):
            yield start + int(i), int(j), float(likeness[i, j])


def _find_alike(
    splits: Sequence[Tiles],
    details: dict[str, dict[str, np.ndarray]],  # by split and tile
) -> list[Fault]:
    "Find tiles of two splits that look like one place although their names are of different places."
    faults = []
    hint = "look at both; this finds 95 % of NAIP's repeated places and not all elsewhere"
    for one, two in combinations([tiles for tiles in splits if details[tiles.split]], 2):
        names, rows = zip(*((list(d), np.stack(list(d.values()))) for d in (details[one.split], details[two.split])), strict=True)
        for i, j, likeness in alike_pairs(*rows):
            here, there = names[0][i], names[1][j]
            if one.field(here) != two.field(there):
                message = f"{one.split}/{here} and {two.split}/{there} may show one place (details correlate by {likeness:.2f}): {hint}"
                faults.append(Fault("same place?", f"{two.split}/{there}", message))
    return faults


@dataclass(frozen=True)
class CheckReport:
    "Counts and faults of a data set."

    edition: str
    root: str
    splits: dict[str, SplitStatistics]
    faults: tuple[Fault, ...]

    @property
    def is_trustworthy(self) -> bool:
        "Return True if all faults are harmless, so that the tables can be trusted."
        return all(fault.kind in _HARMLESS for fault in self.faults)

    def as_json(self) -> dict:
        "Return the report as plain numbers and strings."
        splits = {}
        for split, census in self.splits.items():
            classes = census.class_table().to_dict("index") if census.labeled else None
            splits[split] = {
                "tiles": census.n_tiles, "fields": len(census.fields), "pixels": census.n_pixels, "valid": census.n_valid,
                "overlapping": census.n_overlapping, "sizes": {f"{h}x{w}": n for (h, w), n in census.sizes.items()},
                "classes": classes, "channels": census.channel_table().to_dict("index"),
            }  # fmt: skip
        faults = [vars(fault) for fault in self.faults]
        return {"edition": self.edition, "root": self.root, "trustworthy": self.is_trustworthy, "splits": splits, "faults": faults}

    def as_text(self) -> str:
        "Return the report as text."
        lines = [f"{self.root}: {find_edition(self.edition).title} ({self.edition})"]
        for split, census in self.splits.items():
            sizes = ", ".join(f"{h}×{w}" for h, w in census.sizes)
            valid, overlap = (100 * n / max(d, 1) for n, d in ((census.n_valid, census.n_pixels), (census.n_overlapping, census.n_valid)))
            lines += ["", f"{split}: {census.n_tiles} tiles of {sizes} pixels, {len(census.fields)} fields, {valid:.1f} % valid"]
            labelled = [census.class_table().to_string(), f"{overlap:.2f} % of the valid pixels in two classes or more"]
            lines += labelled if census.labeled else ["without labels"]
        lines += [""] + [f"{fault.kind}: {fault.message}" for fault in self.faults]
        verdict = "the tables can be trusted" if self.is_trustworthy else "the tables could NOT be trusted"
        n_harmless = sum(fault.kind in _HARMLESS for fault in self.faults)
        return "\n".join([*lines, f"{len(self.faults)} faults{f', {n_harmless} harmless' if n_harmless else ''}: {verdict}"])


def check_data(
    root: str | Path,  # the folder of a data set
    data: str = "",  # its edition; "": detected
    n_workers: int = 0,  # processes; 0: one per core
    shows_progress: bool = False,  # a progress bar on stderr
) -> CheckReport:
    "Check every split of a data set."
    data = data or detect_edition(root)
    splits = open_splits(data, root)
    reports = {tiles.split: _check_split(tiles, n_workers or os.cpu_count() or 1, shows_progress) for tiles in splits}
    digests = {split: report.digests for split, report in reports.items()}
    faults = [fault for report in reports.values() for fault in report.faults] + _find_repeats(digests)
    faults += _find_shared_fields(splits) + _find_alike(splits, {split: report.details for split, report in reports.items()})
    return CheckReport(data, str(root), {split: report.census for split, report in reports.items()}, tuple(faults))
