"Data sets on disk, in every layout: synthetic farmland, moved to where each edition keeps its files."

import json
import shutil
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from agrivision_repro.data.editions import field_of
from agrivision_repro.data.readers import CDL_CODES, AgNet
from agrivision_repro.data.synthetic_files import SyntheticConfig, write_synthetic

FARM = SyntheticConfig(size=64, train_fields=3, val_fields=2, test_fields=1)
CLASSES_2021 = {  # each class of 2021 → the synthetic class that plays it
    "double_plant": "double_plant", "drydown": "cloud_shadow", "endrow": "planter_skip", "nutrient_deficiency": "weed_cluster",
    "planter_skip": "planter_skip", "storm_damage": "standing_water", "water": "standing_water", "waterway": "waterway",
    "weed_cluster": "weed_cluster",
}  # fmt: skip


def farm_2020(folder: Path) -> Path:
    "The layout of the challenge of 2020."
    root = folder / "Agriculture-Vision"
    shutil.copytree(write_synthetic(folder / "farm", FARM), root)
    (root / "farmland.json").unlink()
    return folder


def farm_2021(folder: Path) -> Path:
    "The layout and classes of 2021."
    old = farm_2020(folder) / "Agriculture-Vision"
    for split in ("train", "val"):
        labels = old / split / "labels"
        labels.rename(labels.with_name("labels_2020"))
        for name, played_by in CLASSES_2021.items():
            shutil.copytree(labels.with_name("labels_2020") / played_by, labels / name)
        shutil.rmtree(labels.with_name("labels_2020"))
    old.rename(folder / "Agriculture-Vision-2021")
    return folder


def farm_cvpr2020(folder: Path) -> Path:
    "The layout of the dataset paper: two years, splits by fields, none of them for test."
    old, names = farm_2021(folder) / "Agriculture-Vision-2021", {"boundaries": "field_bounds", "masks": "field_masks"}
    splits = {year: {"train": [], "val": [], "test": []} for year in (2017, 2019)}
    for split in ("train", "val"):
        for path in [p for p in (old / split).rglob("*") if p.is_file()]:
            field, part = field_of(path.stem), path.relative_to(old / split)
            year = (2017, 2019)[sum(map(ord, field)) % 2]
            if field not in splits[year][split]:
                splits[year][split].append(field)
            top = names.get(part.parts[0], f"field_{part.parts[0]}")
            new = folder / f"data{year}_miniscale" / top / Path(*part.parts[1:])
            new.parent.mkdir(parents=True, exist_ok=True)
            path.rename(new)
    for year, fields in splits.items():
        (folder / f"data{year}_splits.json").write_text(json.dumps(fields))
    shutil.rmtree(old)
    return folder


AG_NET_TILES = {"train": ("3_7", "4_8", "30_39"), "val": ("3_44", "9_51"), "test": ("5_54",)}
AG_NET_GAP = ("3_40", "3_43", "3_52")  # between the splits


def ag_net_reflectance(name: str) -> np.ndarray:
    "R, G, B, NIR of a generated tile, reflectance × 10,000, from below nodata to beyond the white points."
    return np.random.default_rng(sum(map(ord, name))).integers(-20, 6500, (4, 128, 128), np.int32)


def ag_net_codes(name: str) -> np.ndarray:
    "Crop codes of a generated tile, every known code among them."
    codes = np.resize(np.array(sorted(CDL_CODES), np.uint8), (128, 128))
    return np.random.default_rng(sum(map(ord, name))).permuted(codes)


def ag_net(folder: Path) -> Path:
    "The layout of Ag-Net: 32-bit bands and LZW-compressed labels, with tiles of no split."
    for name in sum(AG_NET_TILES.values(), AG_NET_GAP):
        *bands, crops = (folder / pattern.format(name) for pattern in AgNet.files_of.values())
        for path in (*bands, crops):
            path.parent.mkdir(parents=True, exist_ok=True)
        for path, band in zip(bands, ag_net_reflectance(name), strict=True):
            tifffile.imwrite(path, band)
        Image.fromarray(ag_net_codes(name)).save(crops, compression="tiff_lzw")
    return folder


def naip_chips(folder: Path, chips: dict[str, tuple[str, ...]], size: int = 64) -> Path:
    "The layout of NAIP with trees: blobs that depend on the place alone, light and grain on the year."
    for split, names in chips.items():
        for name in names:
            path = folder / f"images/{name}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, naip_pixels(name, size), photometric="rgb", extrasamples=["unspecified"])
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "csv").mkdir()
    return folder


def naip_pixels(name: str, size: int) -> np.ndarray:
    "R, G, B, NIR of a generated chip."
    city, year, index = name.rsplit("_", 2)
    blobs = np.random.default_rng([*map(ord, city), int(index)]).integers(0, 120, (16, 16))
    grain = np.random.default_rng(int(year)).normal(0, 20, (size, size, 4))
    gray = np.kron(blobs, np.ones((size // 16, size // 16)))[..., None]
    return np.clip(gray * 0.8 + int(year) % 100 + grain, 0, 255).astype(np.uint8)
