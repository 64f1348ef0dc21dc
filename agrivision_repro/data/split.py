"""Make train and val of a data set that is in one folder: whole fields, so that the two are independent."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from agrivision_repro.data.editions import field_of
from agrivision_repro.data.tiles import list_images, need_folders

_TOPS = ("images", "labels", "boundaries", "masks")


def _draw_fields(fields: list[str], share: float, seed: int) -> set[str]:
    "Draw the fields of val: at least one, and not all."
    if not 0 < share < 1:
        raise ValueError(f"the share of the validation fields is {share}: wanted more than 0 and less than 1")
    n_fields = min(max(round(share * len(fields)), 1), len(fields) - 1)
    return set(np.random.default_rng(seed).permutation(fields)[:n_fields].tolist())


def split_by_field(
    source: str | Path,  # contains `images/{rgb,nir}` and `labels/CLASS`, and perhaps `boundaries` and `masks`
    folder: str | Path,  # must not exist yet
    share: float = 0.2,  # of the fields, for val, in (0, 1)
    seed: int = 0,
) -> dict[str, list[str]]:  # split → names of its tiles
    "Copy a data set into a new folder with train and val, completely or not at all."
    source, folder = Path(source), Path(folder).expanduser().absolute()
    need_folders(source, ["images/rgb", "images/nir", "labels"], "images and labels in one folder")
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose a folder that does not")
    names = sorted(path.stem for path in list_images(source / "images/rgb"))
    fields = sorted(set(map(field_of, names)))
    if len(fields) < 2:
        which = f"all {len(names)} tiles are of one field, {fields[0]}" if names else "there is no tile"
        raise ValueError(f"{source} cannot be split: {which}: a tile's field is its name up to the first underscore")
    val = _draw_fields(fields, share, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        tree = Path(workshop) / "tree"
        for place in sorted({place for top in _TOPS for place in ((source / top), *(source / top).rglob("*")) if place.is_dir()}):
            for split in ("train", "val"):
                (tree / split / place.relative_to(source)).mkdir(parents=True, exist_ok=True)
            for path in list_images(place):
                shutil.copyfile(path, tree / ("val" if field_of(path.stem) in val else "train") / path.relative_to(source))
        os.rename(tree, folder)
    return {split: [name for name in names if (field_of(name) in val) == (split == "val")] for split in ("train", "val")}
