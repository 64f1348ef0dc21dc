"""Packed tiles: one memory-mapped file per array, written once and resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from agrivision_repro.core import notes_stream, worker_pool
from agrivision_repro.data.buffers import POOL
from agrivision_repro.data.counts import count_table, count_tile
from agrivision_repro.data.editions import find_edition, home_of, open_tiles
from agrivision_repro.data.tiles import Tile, Tiles


def _code_type(classes: Sequence[str]) -> np.dtype:
    "Return the type that has one bit per class, without background, and the valid bit."
    return np.dtype(np.uint8 if len(classes) <= 8 else np.uint16)


def encode_tile(
    tile: Tile,
    dtype: np.dtype,  # of `_code_type`
) -> np.ndarray:  # `(H, W)`
    "Encode labels and valid pixels as one integer per pixel."
    return tile.labels.astype(dtype) | tile.valid * dtype.type(1 << 8 * dtype.itemsize - 1)


def decode_tile(
    codes: np.ndarray,  # `(H, W)`
    planes: np.ndarray,  # receives labels and valid, `(2, H, W)` uint8
) -> None:
    "Decode labels and valid pixels."
    top = codes.dtype.type(1 << 8 * codes.itemsize - 1)
    np.bitwise_and(codes, top - 1, out=planes[0], casting="unsafe")
    np.greater_equal(codes, top, out=planes[1].view(bool))


class PackedTiles(Sequence):
    "A packed split: the same tiles as `Tiles`, without decoding."

    def __init__(
        self,
        folder: Path,  # `ROOT/packed/<split>`
    ):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        try:
            self.describe(index)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.folder / 'index.json'} has an unknown format ({error!r}): {_REPAIR}") from error
        self.is_checked = np.zeros(len(self.names), bool)
        self.images = _EntryReader(self.folder / "images.npy", (len(self), 4, *self.shape), np.dtype(np.uint8))
        self.labels = _EntryReader(self.folder / "labels.npy", (len(self), *self.shape), self.dtype)

    def describe(self, index: dict) -> None:
        "Set the attributes from an index."
        self.split, self.classes, self.labeled = index["split"], tuple(index["classes"]), index["labeled"]
        self.shape, self.dtype, self.fingerprint = tuple(index["shape"]), np.dtype(index["dtype"]), index["fingerprint"]
        self.names = [tile["name"] for tile in index["tiles"]]
        self.fields = [tile["field"] for tile in index["tiles"]]  # that each tile was cut from
        self.place = {name: i for i, name in enumerate(self.names)}
        self.sizes = [{role: size for role, (size, _) in tile["files"].items()} for tile in index["tiles"]]
        self.counts = count_table((tile["counts"] for tile in index["tiles"]), self.classes, self.names)
        self.crc = [tile["crc"] for tile in index["tiles"]]

    def file_sizes(self, name: str) -> dict[str, int]:
        "Return the size in bytes of every source file of one tile by role."
        return self.sizes[self.place[name]]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Tile:
        i = range(len(self))[i]
        tile = Tile(self.names[i], POOL.lease((6, *self.shape), np.uint8))
        codes = POOL.lease(self.shape, self.dtype)
        self.images.read(i, tile.image)
        self.labels.read(i, codes)
        if not self.is_checked[i]:
            if tile_checksum(tile.image, codes) != self.crc[i]:
                raise ValueError(f"tile {self.names[i]} in {self.folder} is damaged: {_REPAIR}")
            self.is_checked[i] = True
        decode_tile(codes, tile.planes[4:])
        return tile


_REPAIR = "make the pack again with agrivision data pack"


class _EntryReader:
    "Reader of the entries of an `.npy` file; pages mapped from it would count as memory of the process."

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):  # the shape and type that the whole array must have
        try:
            found = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be opened ({error}): {_REPAIR}") from error
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(f"{path} is {found.shape} {found.dtype}, wanted {shape} {dtype}: {_REPAIR}")
        self.path, self.start = path, found.offset

    def read(self, i: int, entry: np.ndarray) -> None:
        "Read the i-th entry into an array of its shape and type."
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + i * entry.nbytes)
            if file.readinto(entry.reshape(-1).view(np.uint8)) < entry.nbytes:
                raise ValueError(f"{self.path} ends before its entry {i}: {_REPAIR}")


def tile_checksum(image: np.ndarray, codes: np.ndarray) -> int:
    "Compute the CRC-32 of a tile's bytes."
    return zlib.crc32(codes, zlib.crc32(image))


def identify(index: dict) -> str:  # 12 hexadecimal digits
    "Compute the fingerprint of a pack from its whole index, which covers every source file and every tile."
    described = json.dumps({key: value for key, value in index.items() if key != "fingerprint"}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def _read_index(folder: Path) -> dict:
    "Read and check a pack's index."
    try:
        index = json.loads((folder / "index.json").read_text())
        is_whole = index["fingerprint"] == identify(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a complete pack ({error}): {_REPAIR}") from error
    if not is_whole:
        raise ValueError(f"{folder / 'index.json'} does not match its fingerprint: {_REPAIR}")
    return index


def pack_tile(
    tiles: Tiles,
    folder: Path,  # contains images.npy and labels.npy
    i: int,
) -> dict:  # the tile's entry in the index
    "Decode one tile and write it to the arrays."
    tile, name = tiles[i], tiles.names[i]
    images, labels = (np.load(folder / f"{kind}.npy", mmap_mode="r+") for kind in ("images", "labels"))
    if tile.image.shape != images.shape[1:]:
        raise ValueError(f"tile {name} is {tile.image.shape}, the first one {images.shape[1:]}: a pack holds tiles of one size")
    images[i], labels[i] = tile.image, encode_tile(tile, labels.dtype)
    files = {role: path.read_bytes() for role, path in tiles.files(name).items()}
    sums = {role: (len(content), hashlib.blake2b(content, digest_size=8).hexdigest()) for role, content in files.items()}
    known = {"name": name, "field": tiles.fields[i], "counts": count_tile(tile, tiles.classes)}
    return {**known, "crc": tile_checksum(images[i], labels[i]), "files": sums}


def start_pack(tiles: Tiles, folder: Path) -> dict:  # the index without its tiles
    "Create empty arrays, unless the folder has an unfinished pack of the same tiles."
    first = tiles[0]
    dtype, shape = _code_type(tiles.classes), first.labels.shape
    plan = {
        "split": tiles.split, "classes": list(tiles.classes), "labeled": tiles.labeled,
        "shape": list(shape), "dtype": dtype.name, "names": list(tiles.names),
    }  # fmt: skip
    with suppress(OSError, ValueError):  # missing, or incomplete because its process was killed
        if json.loads((folder / "plan.json").read_text()) == plan:
            return plan
    shutil.rmtree(folder, ignore_errors=True)
    needed = len(tiles) * int(np.prod(shape)) * (4 + dtype.itemsize)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        room = f"packing {tiles.split} needs {needed / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB left"
        raise ValueError(f"{room}: make room, or train from the files as they are")
    folder.mkdir()
    for kind, entry, kept in (("images", (4, *shape), np.dtype(np.uint8)), ("labels", shape, dtype)):
        np.lib.format.open_memmap(folder / f"{kind}.npy", "w+", kept, (len(tiles), *entry))
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def _read_journal(tiles: Tiles, folder: Path) -> dict[str, dict]:  # name → entry
    "Return the finished tiles whose bytes match the journal and whose files have not changed since."
    path, done = folder / "journal.jsonl", {}
    if not path.is_file():
        return done
    images, labels = (np.load(folder / f"{kind}.npy", mmap_mode="r") for kind in ("images", "labels"))
    place = {name: i for i, name in enumerate(tiles.names)}
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            i, sizes = place[entry["name"]], {role: size for role, (size, _) in entry["files"].items()}
            is_same = sizes == tiles.file_sizes(entry["name"]) and entry["field"] == tiles.fields[i]
            is_done = is_same and tile_checksum(images[i], labels[i]) == entry["crc"]
        except (ValueError, KeyError, TypeError, AttributeError):  # a line left incomplete by a killed process
            continue
        if is_done:
            done[entry["name"]] = entry
    return done


def _decode_missing(tiles: Tiles, folder: Path, done: dict[str, dict], n_workers: int, shows_progress: bool) -> Iterator[dict]:
    "Yield the entries of the unfinished tiles, decoded several at a time."
    todo = [i for i, name in enumerate(tiles.names) if name not in done]
    work = partial(pack_tile, tiles, folder)
    with worker_pool(n_workers) as pool:
        found = pool.map(work, todo, chunksize=4) if pool else map(work, todo)
        options = {"total": len(tiles), "initial": len(done), "unit": "tile", "disable": not shows_progress, "file": notes_stream()}
        yield from tqdm(found, f"packing {tiles.split}", **options)


def pack_split(
    tiles: Tiles,
    folder: Path,  # `ROOT/packed`
    n_workers: int = 0,  # processes; 0: one per core
    shows_progress: bool = False,  # a progress bar on stderr
) -> PackedTiles:
    "Pack one split, resuming where a killed process stopped; keep an undamaged pack of the same files."
    final, partly = folder / tiles.split, folder / f".{tiles.split}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{tiles.split}.lock"):
        if _is_sound(final, tiles):
            return PackedTiles(final)
        plan = start_pack(tiles, partly)
        done = _read_journal(tiles, partly)
        with (partly / "journal.jsonl").open("a") as journal:
            for entry in _decode_missing(tiles, partly, dict(done), n_workers or os.cpu_count() or 1, shows_progress):
                done[entry["name"]] = entry
                journal.write("\n" + json.dumps(entry))
                journal.flush()
        index = {key: value for key, value in plan.items() if key != "names"}
        index["tiles"] = [done[name] for name in tiles.names]
        index = json.loads(json.dumps(index))  # as it will be read back
        (partly / "index.json").write_text(json.dumps(index | {"fingerprint": identify(index)}))
        for leftover in ("plan.json", "journal.jsonl"):
            (partly / leftover).unlink()
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partly, final)
    return PackedTiles(final)


def _is_sound(folder: Path, tiles: Tiles) -> bool:
    "Return True if a pack contains these tiles, of files of these sizes, with correct checksums."
    try:
        packed = PackedTiles(folder)
        is_same = packed.names == tiles.names and packed.classes == tiles.classes and packed.fields == tiles.fields
        return is_same and all(packed[i] and packed.file_sizes(n) == tiles.file_sizes(n) for i, n in enumerate(tiles.names))
    except ValueError:
        return False


def count_tiles(
    tiles: Tiles | PackedTiles,
    n_workers: int = 0,  # processes; 0: one per core
    shows_progress: bool = False,  # a progress bar on stderr
) -> pd.DataFrame:  # of `count_table`
    "Return the counts of every tile of a split."
    if isinstance(tiles, PackedTiles):
        return tiles.counts
    with worker_pool(n_workers or os.cpu_count() or 1) as pool:
        work = partial(_count_one, tiles)
        found = pool.map(work, range(len(tiles)), chunksize=16) if pool else map(work, range(len(tiles)))
        bar = tqdm(found, f"counting {tiles.split}", len(tiles), unit="tile", disable=not shows_progress, file=notes_stream())
        return count_table(bar, tiles.classes, tiles.names)


def _count_one(tiles: Tiles, i: int) -> list:
    "Read and count one tile."
    return count_tile(tiles[i], tiles.classes)


def open_split(
    edition: str,  # a key of `EDITIONS`, or `classes:NAME,NAME,…`
    root: str | Path,  # the folder of the data set, or its parent
    split: str,  # `train`, `val` or `test`
) -> Tiles | PackedTiles:
    "Open a split from its pack if there is one, else from its files."
    folder = pack_folder(edition, root) / split
    if not folder.is_dir():
        return open_tiles(edition, root, split)
    packed, found = PackedTiles(folder), find_edition(edition)
    if packed.classes != found.classes:
        raise ValueError(f"{folder} holds {', '.join(packed.classes)}, not the classes of {edition}: remove it or pack again")
    if packed.fields != [found.reader.field(name) for name in packed.names]:
        raise ValueError(f"{folder} records other places than {edition} has now: {_REPAIR}")
    if changed := _find_changed(packed, edition, root):
        raise ValueError(f"{folder} was packed before its files changed ({changed}): {_REPAIR}")
    return packed


def _find_changed(packed: PackedTiles, edition: str, root: str | Path) -> str:  # empty: none, or the files are not there any more
    "Return the name of a tile that was added, removed or changed since its split was packed."
    try:
        with warnings.catch_warnings(action="ignore"):
            tiles = open_tiles(edition, root, packed.split)
    except (OSError, ValueError):
        return ""
    moved = set(tiles.names) ^ set(packed.names)
    changed = (name for name in tiles.names if _is_changed(tiles.files(name), packed.file_sizes(name)))
    return str(min(moved, key=str)) if moved else next(changed, "")


def _is_changed(files: dict[str, Path], sizes: dict[str, int]) -> bool:
    "Return True if some files of a tile exist, and not all in the sizes that they had."
    found = {}
    for role, path in files.items():
        with suppress(OSError):
            found[role] = os.stat(path).st_size
    return bool(found) and found != sizes


def pack_folder(edition: str, root: str | Path) -> Path:
    "Return the folder of a data set's packs."
    return home_of(find_edition(edition), Path(root)) / "packed"
