"""Batches ready for the model, from files and from a pack: python benchmarks/data.py

200 synthetic tiles of 512² pixels in the layout of Agriculture-Vision 2020. "plain" is the straightforward Dataset: ten files per
tile read with Pillow, floats from the start. "files" reads the same files with our loader, "packed" reads the pack. All yield shuffled,
augmented, normalized float32 batches of 8 with one mask per class; each runs once to warm the disk cache, then they alternate.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pandas as pd
from PIL import Image
from timing import set_up, show
from torch.utils.data import DataLoader, Dataset

from agrivision_repro.data.batches import IMAGENET, SampleStream, make_batch, training_loader
from agrivision_repro.data.editions import open_tiles
from agrivision_repro.data.pack import pack_split
from agrivision_repro.data.synthetic_files import SyntheticConfig, write_synthetic
from agrivision_repro.data.tiles import Tiles

FARM = SyntheticConfig(size=512, train_fields=50, val_fields=1, test_fields=1)
BATCH = 8


class PlainDataset(Dataset):
    "Load one tile at a time, as such datasets usually do."

    def __init__(self, tiles: Tiles):
        self.tiles = tiles
        self.mean, self.std = (np.array(s, np.float32)[:, None, None] for s in IMAGENET)

    def __len__(self) -> int:
        return len(self.tiles.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        files = self.tiles.files(self.tiles.names[index])
        pixels = {role: np.array(Image.open(path)) for role, path in files.items()}
        image = np.concatenate([pixels["rgb"], pixels["nir"][..., None]], 2).transpose(2, 0, 1).astype(np.float32) / 255
        masks = [pixels[c] == 255 for c in self.tiles.classes[1:]]
        labels = np.stack([~np.any(masks, 0), *masks]).astype(np.float32)
        valid = (pixels["boundaries"] == 255) & (pixels["masks"] == 255)
        turns, flips = np.random.randint(4), np.random.randint(2)
        arrays = ((image - self.mean) / self.std, labels, valid)
        turned = (np.rot90(a, turns, (-2, -1))[..., :: -1 if flips else 1] for a in arrays)
        return tuple(np.ascontiguousarray(a) for a in turned)


def plain_epoch(tiles: Tiles) -> int:
    loader = DataLoader(PlainDataset(tiles), BATCH, shuffle=True, num_workers=2)
    return sum(len(image) for image, _, _ in loader)


def our_epoch(tiles, epoch: int) -> int:
    n_batches = len(tiles) // BATCH
    prepare = partial(make_batch, channels="rgbn", n_classes=len(tiles.classes))
    loader = training_loader(SampleStream(tiles), BATCH, epoch * n_batches, (epoch + 1) * n_batches, prepare=prepare)
    return sum(len(batch.x) for batch in loader)


if __name__ == "__main__":
    given = set_up(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        root = write_synthetic(Path(folder) / "farm", FARM)
        tiles = open_tiles("synthetic", root, "train")
        packed = pack_split(tiles, root / "packed")
        ways = {"plain": lambda e: plain_epoch(tiles), "files": lambda e: our_epoch(tiles, e), "packed": lambda e: our_epoch(packed, e)}
        rates = {name: [] for name in ways}
        for epoch in range(max(given.rounds // 5, 2)):
            for name, way in ways.items():
                start = perf_counter()
                n_tiles = way(epoch)
                if epoch:  # the first warms the cache
                    rates[name].append(n_tiles / (perf_counter() - start))
        table = pd.DataFrame({"tiles/s": {name: median(found) for name, found in rates.items()}})
        table["MB/s of pixels"] = table["tiles/s"] * 4 * FARM.size**2 / 1e6
        table["times plain"] = table["tiles/s"] / table["tiles/s"]["plain"]
        show(given, f"{len(tiles)} tiles of {FARM.size}², batches of {BATCH}", table.round(1))
