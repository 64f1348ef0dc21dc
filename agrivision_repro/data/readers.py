"""Readers of the open data sets with a near-infrared channel: NAIP chips with trees, and Landsat tiles with crops."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from agrivision_repro.data.tiles import BadFile, Tile, Tiles, need_folders, read_image

TREE_RADIUS = 7  # pixels of 0.6 m
FARTHEST = 1e6  # pixels; a larger coordinate, or NaN, is a damaged number


def draw_disks(
    points: np.ndarray,  # centers x, y in pixels, `(N, 2)`
    size: tuple[int, int],  # (height, width), pixels
    radius: float = TREE_RADIUS,  # pixels
) -> np.ndarray:  # `(H, W)` bool
    "Mark every pixel whose center lies within `radius` of a point."
    mask = np.zeros(size, bool)
    reach = int(radius)
    for x, y in points:
        top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
        window = mask[top : int(y) + reach + 2, left : int(x) + reach + 2]
        rows, columns = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
        window |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return mask


class UrbanTrees(Tiles):
    "A split of the Urban Tree Detection Data, in its own layout: `images/*.tif`, `csv/*.csv`, `{train,val,test}.txt`."

    shares_places = True

    @classmethod
    def field(cls, name: str) -> str:
        found = re.fullmatch(r"(.+)_\d{4}_(\d+)", name)  # CITY_YEAR_INDEX
        return f"{found[1]}_{found[2]}" if found else name

    @classmethod
    def has_split(cls, root: Path, split: str) -> bool:
        return (root / f"{split}.txt").is_file()

    def find_names(self) -> list[str]:
        need_folders(self.root, ["images", "csv"], "naip-trees")
        listing = self.root / f"{self.split}.txt"
        if not listing.is_file():
            raise FileNotFoundError(f"{listing} is missing: it lists the chips of the split; get it from the repository")
        return sorted(listing.read_text().split())

    def files(self, name: str) -> dict[str, Path]:
        points = self.root / f"csv/{name}.csv"
        return {"image": self.root / f"images/{name}.tif", **({"points": points} if points.exists() else {})}

    def load(self, role: str, path: Path, size: tuple[int, int] | None) -> np.ndarray:
        return read_image(path, "RGBN", size) if role == "image" else self.read_points(path)

    def assemble(self, name: str, parts: dict[str, np.ndarray]) -> Tile:
        pixels = parts["image"]
        labels = draw_disks(parts.get("points", np.zeros((0, 2))), pixels.shape[:2])
        return Tile.of(name, pixels.transpose(2, 0, 1), labels.astype(np.uint8), np.ones(labels.shape, bool))

    def read_points(self, path: Path) -> np.ndarray:
        "Read tree centers `(N, 2)`."
        try:
            points = pd.read_csv(path)[["x", "y"]].to_numpy(float)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadFile("unreadable", f"{path} is not a table of tree points x,y ({error}): get it again") from error
        if not (np.abs(points) < FARTHEST).all():
            raise BadFile("unreadable", f"{path} has points with impossible coordinates: get it again")
        return points


CROPS = {  # class → codes of the Cropland Data Layer; every other code is background
    "wetland": (87, 190, 195), "soybeans": (5,), "small_grains": (*range(21, 26), *range(27, 30), 205), "water": (83, 111),
    "grass_hay": (36, 37, 58, 62, 176), "dry_beans_peas": (42, 51, 52, 53), "corn": (1,), "fallow": (61,),
}  # fmt: skip
RUNS_OF_CODES = (  # first and last code of each range in the table supplied with the tiles
    (1, 6), (10, 14), (21, 39), (41, 72), (74, 77), (81, 83), (87, 88), (92, 92), (111, 112), (121, 124), (131, 131), (141, 143),
    (152, 152), (176, 176), (190, 190), (195, 195), (204, 214), (216, 227), (229, 250), (254, 254),
)  # fmt: skip
CDL_CODES = frozenset(code for first, last in RUNS_OF_CODES for code in range(first, last + 1))
CROP_BITS = np.array([sum(1 << k for k, codes in enumerate(CROPS.values()) if code in codes) for code in range(256)], np.uint8)


WHITE = np.array([2200, 1800, 1800, 5500])[:, None, None]  # reflectance × 10,000 that maps to 255, of R, G, B, NIR
NODATA = -1


def to_bytes(
    reflectance: np.ndarray,  # R, G, B, NIR, × 10,000, `(4, H, W)` int32
) -> np.ndarray:  # `(4, H, W)` uint8
    "Scale reflectance linearly to bytes, clipped at 0 and at the white point of each channel."
    return np.rint(255 / WHITE * np.clip(reflectance, 0, WHITE)).astype(np.uint8)


class AgNet(Tiles):
    "A split of the Ag-Net dataset, in its own layout; see `CROPS` for the classes."

    files_of = {
        **{role: f"input_32bit/lc8_2015245_{{}}_{band}.tif" for role, band in {"red": 4, "green": 3, "blue": 2, "nir": 5}.items()},
        "crops": "target/cdl_2015245_{}.tif",
    }
    columns = {"train": (0, 39), "val": (44, 51), "test": (54, 999)}  # first and last of each split
    side, block = 128, 4  # pixels of a tile, tiles of a block

    @classmethod
    def has_split(cls, root: Path, split: str) -> bool:
        return any(cls.find(root, split).values())

    @classmethod
    def find(cls, root: Path, split: str) -> dict[str, set[str]]:  # role → names
        "List the tiles of a split that have each file."
        first, last = cls.columns[split]
        found: dict[str, set[str]] = {}
        for role, pattern in cls.files_of.items():
            head, tail = pattern.split("{}")
            names = {path.relative_to(root).as_posix()[len(head) : -len(tail)] for path in root.glob(pattern.format("*"))}
            found[role] = {n for n in names if re.fullmatch(r"\d+_\d+", n) and first <= int(n.split("_")[1]) <= last}
        return found

    def find_names(self) -> list[str]:
        if (self.root / "input").is_dir() and not (self.root / "input_32bit").is_dir():
            raise FileNotFoundError(f"{self.root} has input, clipped to 8 bits, but not input_32bit: only this has unclipped NIR, add it")
        need_folders(self.root, ["input_32bit", "target"], "ag-net")
        found = self.find(self.root, self.split)
        lacking = [self.files_of[role].format("ROW_COL") for role, names in found.items() if not names]
        if 0 < len(lacking) < len(found):
            raise FileNotFoundError(f"{self.root} has no {', no '.join(lacking)} of the split {self.split!r}: unpack the data set again")
        return sorted(set().union(*found.values()))  # a tile that lacks a file raises an error when it is read

    @classmethod
    def field(cls, name: str) -> str:
        row, column = map(int, name.split("_"))
        return f"{row // cls.block}_{column // cls.block}"

    def files(self, name: str) -> dict[str, Path]:
        return {role: self.root / pattern.format(name) for role, pattern in self.files_of.items()}

    def load(self, role: str, path: Path, size: tuple[int, int] | None) -> np.ndarray:
        try:
            pixels = read_image(path, "L" if role == "crops" else "I")
        except BadFile as error:
            if error.kind == "wrong mode" and role != "crops":
                remedy = "NIR is clipped in the 8-bit files, so unpack input_32bit, not input"
                raise BadFile(error.kind, f"{path} is not int32: {remedy}") from error
            raise
        if pixels.shape != (self.side, self.side):
            got = "×".join(map(str, pixels.shape))
            raise BadFile("wrong size", f"{path} is {got} pixels, wanted {self.side}×{self.side}: unpack it again")
        if role == "crops" and (unknown := set(np.unique(pixels).tolist()) - CDL_CODES):
            codes = ", ".join(map(str, sorted(unknown)))
            raise BadFile("unknown code", f"{path} has crop codes that cdlvalue.csv lacks ({codes}): unpack it again")
        return pixels

    def assemble(self, name: str, parts: dict[str, np.ndarray]) -> Tile:
        reflectance = np.stack([parts[role] for role in ("red", "green", "blue", "nir")])
        return Tile.of(name, to_bytes(reflectance), CROP_BITS[parts["crops"]], (reflectance != NODATA).all(0))
