"""Scores of a model on a stream of tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from agrivision_repro.data.batches import INVERSE, TileDataset, apply_d4, scoring_loader
from agrivision_repro.metrics import AveragePrecision, ChallengeIoU, ClassMetric, MultilabelIoU, tile_overlap
from agrivision_repro.training.engine import Engine

METRICS: dict[str, Callable[[int], ClassMetric]] = {  # name → metric of a number of classes
    "multilabel": MultilabelIoU,
    "challenge": ChallengeIoU,
    "gated": partial(ChallengeIoU, reading="gated"),
    "average_precision": AveragePrecision,
}


TTA = {"none": (0,), "d4": tuple(range(8))}  # elements of D4 whose logits are averaged


def predict_turned(
    model: nn.Module,  # in evaluation mode
    x: Tensor,  # `(B, 3 or 4, H, W)` float32, normalized
    engine: Engine,
    tta: str,  # a key of `TTA`
) -> Tensor:  # logits `(B, C, H, W)` float32
    "Predict rotated and flipped images, and average the logits."
    turned = [apply_d4(engine.predict(model, apply_d4(x, e)).float(), INVERSE[e]) for e in TTA[tta]]
    logits: Tensor = sum(turned)
    return logits / len(turned)


@torch.no_grad()
def score_tiles(
    model: nn.Module,  # unwrapped: processes have different numbers of batches and must not synchronize
    feed: TileDataset,
    engine: Engine,
    tta: str = "none",  # a key of `TTA`
) -> tuple[dict[str, dict], Tensor]:  # as `score_model`; multi-label intersection and union, pixels, `(N, C, 2)` int64, on the CPU
    "Compute all metrics of a model on whole tiles, and the intersection and union of each tile."
    if tta not in TTA:
        raise ValueError(f"tta is {tta!r}: wanted one of {', '.join(TTA)}")
    metrics = {name: kind(feed.n_classes).to(engine.device) for name, kind in METRICS.items()}
    tiles = torch.zeros(len(feed.tiles), feed.n_classes, 2, dtype=torch.int64, device=engine.device)
    share = {"rank": engine.accelerator.process_index, "n_processes": engine.accelerator.num_processes}
    model.eval().to(memory_format=torch.channels_last)  # as in training: other layouts change the logits' last bits, and so the ranking
    for batch in scoring_loader(feed.tiles, prepare=feed.prepare(engine.device), **share):
        logits = predict_turned(model, batch.x, engine, tta)
        for metric in metrics.values():
            metric.update(logits, batch.targets, batch.valid)
        tiles[batch.index] = tile_overlap(logits, batch.targets, batch.valid)
    scores = {name: _summarize(metric) for name, metric in metrics.items()}
    return scores, engine.accelerator.reduce(tiles, "sum").cpu()  # 0 for the tiles of other processes


def score_model(
    model: nn.Module,
    feed: TileDataset,
    engine: Engine,
    tta: str = "none",  # a key of `TTA`
) -> dict[str, dict]:  # metric → `per_class` (None: absent), `mean`, `background_only`
    "Compute all metrics of a model on whole tiles."
    return score_tiles(model, feed, engine, tta)[0]


def _summarize(metric: ClassMetric) -> dict:  # plain numbers, for a JSON file
    "Return a metric's result as plain numbers."
    per_class = [None if value != value else value for value in metric.per_class().tolist()]
    return {"per_class": per_class, "mean": float(metric.compute()), "background_only": float(metric.background_only())}
