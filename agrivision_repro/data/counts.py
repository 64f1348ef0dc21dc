"""Counts over the valid pixels of tiles: one table, one row per tile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from agrivision_repro.data.tiles import Tile, unpack_labels

CHANNEL_NAMES = ("R", "G", "B", "NIR")


def count_tile(
    tile: Tile,
    classes: Sequence[str],  # background first
) -> list:  # valid pixels; pixels of each class; sums of the bytes of each channel, and of their squares: JSON types
    "Count the valid pixels of one tile."
    masks, values = unpack_labels(tile.labels, len(classes)) & tile.valid, np.arange(256)
    histogram = np.stack([np.bincount(channel[tile.valid], minlength=256) for channel in tile.image])
    return [int(tile.valid.sum()), *(found.tolist() for found in (masks.sum((1, 2)), histogram @ values, histogram @ values**2))]


def count_table(
    counts: Iterable[Sequence],  # of `count_tile`, one per tile
    classes: Sequence[str],  # background first
    names: Sequence[str],  # of the tiles
) -> pd.DataFrame:  # int64; columns `valid`, and `pixels` by class, `sums` and `squares` by channel
    "Tabulate the counts of tiles."
    groups = {"valid": ("",), "pixels": classes, "sums": CHANNEL_NAMES, "squares": CHANNEL_NAMES}
    columns = pd.MultiIndex.from_tuples([(group, name) for group, members in groups.items() for name in members])
    return pd.DataFrame(np.array([np.hstack(row) for row in counts], np.int64), list(names), columns)


def mean_and_std(
    counts: pd.DataFrame,  # of `count_table`
) -> tuple[np.ndarray, np.ndarray]:  # of values in [0, 1], `(4,)` float64
    "Compute mean and standard deviation of R, G, B, NIR over all valid pixels; 0 if there are none."
    n = max(counts["valid"].sum(), 1)
    sums, squares = (counts[name].sum().to_numpy() for name in ("sums", "squares"))
    return sums / n / 255, np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0)) / 255
