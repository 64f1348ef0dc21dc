"""The tree of synthetic tiles: its parameters, names and files, in the layout of Agriculture-Vision 2020."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from agrivision_repro.data.editions import AGRIVISION_2020
from agrivision_repro.data.synthetic import RECIPES, FieldRaster, make_field, tiles_across

_GENERATOR = 2  # increment it when any pixel changes, so that an old tree is not mistaken for a new one
SPLITS = ("train", "val", "test")
_ALPHABET, _STEP = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", 62_767_505_117_291  # no factor 2 or 3: coprime to 36⁹


@dataclass(frozen=True)
class SyntheticConfig:
    "Parameters of a tree of synthetic tiles."

    size: int = 512  # side of a tile, pixels: a multiple of 16, at least 32
    train_fields: int = 24
    val_fields: int = 8
    test_fields: int = 2
    tiles_per_field: int = 4  # a square number
    seed: int = 0  # at least 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < (0 if name == "seed" else 1):
                raise ValueError(f"{name} is {value!r}: wanted an integer, {int(name != 'seed')} or more")
        if self.size < 32 or self.size % 16:
            raise ValueError(f"size is {self.size}: wanted a multiple of 16, at least 32, such as 128 or 512")
        tiles_across(self.tiles_per_field)

    def describe(self) -> dict[str, int]:
        "Return the parameters that determine every byte, as they are written to farmland.json."
        return {"generator": _GENERATOR, **asdict(self)}


def field_name(config: SyntheticConfig, split: str, field: int) -> str:
    "Return the name of a field, nine characters of A-Z and 0-9."
    start = int(np.random.SeedSequence(config.seed).generate_state(1, np.uint64)[0])
    number = (start + (len(SPLITS) * field + SPLITS.index(split)) * _STEP) % 36**9
    return "".join(_ALPHABET[number // 36**k % 36] for k in reversed(range(9)))


def _tile_files(
    raster: FieldRaster,
    rows: slice,  # of the tile in the raster
    columns: slice,
    has_labels: bool,
) -> dict[str, np.ndarray]:  # folder → `(H, W)` or `(H, W, 3)` uint8
    "Cut out one tile and return the pixels of each of its files."
    image, bits = raster.image[:, rows, columns], raster.labels[rows, columns]
    labels = {f"labels/{name}": bits >> k & 1 for k, name in enumerate(AGRIVISION_2020)} if has_labels else {}
    masks = {"boundaries": raster.boundary[rows, columns], "masks": raster.mask[rows, columns], **labels}
    pictures = {"images/rgb": image[:3].transpose(1, 2, 0), "images/nir": image[3]}
    return pictures | {folder: mask.astype(np.uint8) * 255 for folder, mask in masks.items()}


def _write_tile(folder: Path, name: str, files: dict[str, np.ndarray]) -> None:
    "Write the files of one tile under the folder of its split."
    for place, pixels in files.items():
        image = Image.fromarray(np.ascontiguousarray(pixels))
        (folder / place).mkdir(parents=True, exist_ok=True)
        if place.startswith("images/"):
            image.save(folder / place / f"{name}.jpg", quality=92, subsampling=0)  # rows of 4 pixels keep their color
        else:
            image.save(folder / place / f"{name}.png", compress_level=1)


def _write_split(folder: Path, config: SyntheticConfig, split: str) -> None:
    "Write every tile of one split."
    starts = range(0, config.size * tiles_across(config.tiles_per_field), config.size)
    for field in range(getattr(config, f"{split}_fields")):
        seed = (config.seed, SPLITS.index(split), field)
        raster = make_field(seed, config.size, config.tiles_per_field, RECIPES[field % len(RECIPES)])
        for y, x in ((y, x) for y in starts for x in starts):
            name = f"{field_name(config, split, field)}_{x}-{y}-{x + config.size}-{y + config.size}"
            files = _tile_files(raster, slice(y, y + config.size), slice(x, x + config.size), split != "test")
            _write_tile(folder / split, name, files)


def _is_written(root: Path, config: SyntheticConfig) -> bool:
    "Return True if a folder has this data set already; raise ValueError if it has anything else."
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    note = root / "farmland.json"
    found = note.read_text() if note.is_file() else "no farmland.json"
    if found != json.dumps(config.describe()):
        raise ValueError(f"{root} holds something other than this synthetic data set ({found[:200]}): choose another folder or remove it")
    return True


def write_synthetic(root: str | Path, config: SyntheticConfig) -> Path:
    "Write synthetic data in the layout of Agriculture-Vision 2020, unless they exist."
    root = Path(root).absolute()
    if _is_written(root, config):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workshop:
        tree = Path(workshop) / root.name
        for split in SPLITS:
            _write_split(tree, config, split)
        (tree / "farmland.json").write_text(json.dumps(config.describe()))
        try:
            os.rename(tree, root)
        except OSError:
            if not _is_written(root, config):  # no other process wrote it first
                raise
    return root
