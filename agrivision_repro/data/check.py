"""Check a copy of a data set: missing, damaged and repeated files, and places in two splits."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from agrivision_repro.core import notes_stream, worker_pool
from agrivision_repro.data.counts import CHANNEL_NAMES, count_table, count_tile, mean_and_std
from agrivision_repro.data.editions import detect_edition, find_edition, open_splits
from agrivision_repro.data.tiles import BadFile, Tile, Tiles, list_images, places_in_both

FAULTS = {  # kind of fault → what it means
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


def check_tile(tiles: Tiles, name: str) -> dict:  # the tile's row in `CheckReport.tiles`; `counts` as of `count_tile`
    "Read, check and count one tile."
    files, (parts, faults) = tiles.files(name), _read_parts(tiles, name)
    first = next(iter(files.values()))
    row = {
        "field": tiles.field(name), "digest": hashlib.blake2b(first.read_bytes()).hexdigest() if first.is_file() else "",
        "is_read": parts.keys() == files.keys(), "height": 0, "width": 0, "overlapping": 0, "details": None, "faults": faults,
        "counts": [0, [0] * len(tiles.classes), [0] * 4, [0] * 4],
    }  # fmt: skip
    if tiles.is_by_field and not _TILE_NAME.fullmatch(name):
        faults.append(Fault("bad name", name, f"{name} is not FIELD_x1-y1-x2-y2: its field is unknown, so rename or remove it"))
    if row["is_read"]:
        tile = tiles.assemble(name, parts)
        row["height"], row["width"] = tile.labels.shape
        row["overlapping"] = int(((tile.labels & (tile.labels - 1) != 0) & tile.valid).sum())  # two bits or more
        row |= {"counts": count_tile(tile, tiles.classes), "details": thumbnail(tile)}
        if not tile.valid.any():
            faults.append(Fault("no valid pixel", name, f"{name} has no valid pixel: it is used neither for training nor for scoring"))
    return row


def _check_split(
    tiles: Tiles,
    n_workers: int = 1,  # processes
    shows_progress: bool = False,  # a progress bar on stderr
) -> pd.DataFrame:  # one row per tile
    "Check every tile of a split, several at a time."
    check = partial(check_tile, tiles)
    with worker_pool(n_workers) as pool:
        found = pool.map(check, tiles.names, chunksize=16) if pool else map(check, tiles.names)
        rows = list(tqdm(found, f"checking {tiles.split}", len(tiles.names), unit="tile", disable=not shows_progress, file=notes_stream()))
    table = pd.DataFrame(rows, tiles.names)
    counts = count_table(table.pop("counts"), tiles.classes, tiles.names)
    return pd.concat([table.set_axis(pd.MultiIndex.from_product([table.columns, [""]]), axis=1), counts], axis=1)


def _find_strays(tiles: Tiles) -> list[Fault]:
    "Find labels and masks that belong to no tile."
    if not tiles.binary_roles:
        return []
    known = {path for name in tiles.names for role, path in tiles.files(name).items() if role in tiles.binary_roles}
    found = {path for folder in {path.parent for path in known} for path in list_images(folder)}
    strays = sorted(path for path in found - known if tiles.holds(path.stem))
    message = "belongs to no tile of this split: its RGB image is missing, or it is a leftover"
    return [Fault("without image", str(path.relative_to(tiles.root)), f"{path} {message}") for path in strays]


def _find_repeats(table: pd.DataFrame) -> list[Fault]:
    "Find equal images and equal names, in one split or in two."
    faults, by_digest, by_name = [], {}, {}
    for (split, name), digest in table["digest"].items():
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


def _find_alike(splits: Sequence[Tiles], table: pd.DataFrame) -> list[Fault]:
    "Find tiles of two splits that look like one place although their names are of different places."
    faults, details = [], table.loc[table["is_read"], "details"]
    hint = "look at both; this finds 95 % of NAIP's repeated places and not all elsewhere"
    found = [split for split in dict.fromkeys(tiles.split for tiles in splits) if split in details.index]
    for one, two in combinations(found, 2):
        for i, j, likeness in alike_pairs(*(np.stack(details[split].to_list()) for split in (one, two))):
            here, there = details[one].index[i], details[two].index[j]
            if table["field"][one, here] != table["field"][two, there]:
                message = f"{one}/{here} and {two}/{there} may show one place (details correlate by {likeness:.2f}): {hint}"
                faults.append(Fault("same place?", f"{two}/{there}", message))
    return faults


@dataclass(frozen=True)
class CheckReport:
    "Counts and faults of a data set."

    edition: str
    root: str
    labeled: dict[str, bool]  # split → whether its classes were published
    tiles: pd.DataFrame  # rows by split and name; all counts are 0 where a fault prevents reading (`is_read` is False)
    faults: tuple[Fault, ...]

    @property
    def is_trustworthy(self) -> bool:
        "Return True if all faults are harmless, so that the tables can be trusted."
        return all(fault.kind in _HARMLESS for fault in self.faults)

    def class_table(self, split: str) -> pd.DataFrame:
        "Return pixels, share of the valid pixels in %, and tiles per class."
        pixels, n_valid = self.tiles.loc[split]["pixels"], self.tiles.loc[split]["valid"].sum()
        share = (100 * pixels.sum() / max(n_valid, 1)).round(3)
        return pd.DataFrame({"pixels": pixels.sum(), "share, %": share, "tiles": (pixels > 0).sum()})

    def channel_table(self, split: str) -> pd.DataFrame:
        "Return mean and standard deviation of each channel, of values in [0, 1]."
        return pd.DataFrame(dict(zip(("mean", "std"), mean_and_std(self.tiles.loc[split]), strict=True)), list(CHANNEL_NAMES)).round(4)

    def describe(self, split: str) -> dict:
        "Return the counts of a split as plain numbers and strings."
        tiles = self.tiles.loc[split]
        tiles = tiles[tiles["is_read"]]
        return {
            "tiles": len(tiles), "fields": tiles["field"].nunique(), "pixels": int((tiles["height"] * tiles["width"]).sum()),
            "valid": int(tiles["valid"].sum()), "overlapping": int(tiles["overlapping"].sum()),
            "sizes": Counter(f"{h}x{w}" for h, w in zip(tiles["height"], tiles["width"], strict=True)),
            "classes": self.class_table(split).to_dict("index") if self.labeled[split] else None,
            "channels": self.channel_table(split).to_dict("index"),
        }  # fmt: skip

    def as_json(self) -> dict:
        "Return the report as plain numbers and strings."
        splits, faults = {split: self.describe(split) for split in self.labeled}, [vars(fault) for fault in self.faults]
        return {"edition": self.edition, "root": self.root, "trustworthy": self.is_trustworthy, "splits": splits, "faults": faults}

    def as_text(self) -> str:
        "Return the report as text."
        lines = [f"{self.root}: {find_edition(self.edition).title} ({self.edition})"]
        for split, is_labeled in self.labeled.items():
            n = self.describe(split)
            sizes = ", ".join(n["sizes"]).replace("x", "×")
            valid, overlap = (100 * part / max(whole, 1) for part, whole in ((n["valid"], n["pixels"]), (n["overlapping"], n["valid"])))
            lines += ["", f"{split}: {n['tiles']} tiles of {sizes} pixels, {n['fields']} fields, {valid:.1f} % valid"]
            labels = [self.class_table(split).to_string(), f"{overlap:.2f} % of the valid pixels in two classes or more"]
            lines += labels if is_labeled else ["without labels"]
        lines += [""] + [f"{fault.kind}: {fault.message}" for fault in self.faults]
        verdict = "the tables can be trusted" if self.is_trustworthy else "the tables could NOT be trusted"
        n_harmless = sum(fault.kind in _HARMLESS for fault in self.faults)
        n_faults = f"{len(self.faults)} fault{'s' * (len(self.faults) != 1)}"
        return "\n".join([*lines, f"{n_faults}{f', {n_harmless} harmless' if n_harmless else ''}: {verdict}"])


def check_data(
    root: str | Path,  # the folder of a data set
    data: str = "",  # its edition; "": detected
    n_workers: int = 0,  # processes; 0: one per core
    shows_progress: bool = False,  # a progress bar on stderr
) -> CheckReport:
    "Check every split of a data set."
    data = data or detect_edition(root)
    splits = open_splits(data, root)
    table = pd.concat({tiles.split: _check_split(tiles, n_workers or os.cpu_count() or 1, shows_progress) for tiles in splits})
    faults = [fault for tiles in splits for fault in [*chain(*table["faults"][tiles.split]), *_find_strays(tiles)]]
    faults += _find_repeats(table) + _find_shared_fields(splits) + _find_alike(splits, table)
    return CheckReport(data, str(root), {tiles.split: tiles.labeled for tiles in splits}, table, tuple(faults))
