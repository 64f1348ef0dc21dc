"""Overhead of measuring divergence with all three estimators: python benchmarks/divergence.py

A bare forward pass of ResNet-101 (output stride 16, the paper's) on 8 tiles of 256 pixels; the same while recording the moments of its
34 ReLU layers; and the plain form, which keeps all activations and computes variances of their float64 copies afterwards.
"""

from __future__ import annotations

import pandas as pd
import torch
from timing import alternate, peak_bytes, set_up, show
from torch import Tensor, nn

from agrivision_repro.analysis.moments import batch_mean, find_relu_layers, measure
from agrivision_repro.models.backbones import create_backbone

SHAPE = (8, 3, 256, 256)
ESTIMATORS = ("sample", "pixel", batch_mean(2))


def keep_all(model: nn.Module, x: Tensor) -> list[tuple[Tensor, ...]]:
    "Keep every activation, then compute three variances per layer."
    kept = []
    hooks = [model.get_submodule(n).register_forward_hook(lambda m, i, out: kept.append(out)) for n in find_relu_layers(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    return [(a.mean((2, 3)).var(0), a.var((0, 2, 3)), a.unflatten(0, (-1, 2)).mean((1, 3, 4)).var(0)) for a in (k.double() for k in kept)]


if __name__ == "__main__":
    given = set_up(__doc__)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = create_backbone(101).eval().to(memory_format=layout)
        x = torch.randn(SHAPE).to(memory_format=layout)
        ways = {
            "bare forward": lambda m=model, x=x: m(x),
            "measured": lambda m=model, x=x: measure(m, [x], estimators=ESTIMATORS),
            "plain, all activations kept": lambda m=model, x=x: keep_all(m, x),
        }
        with torch.no_grad():
            medians = alternate(ways, given.rounds, warm_up=1)
            peaks = {name: peak_bytes(way) for name, way in ways.items()}
        table = pd.DataFrame({"ms": medians, "MB above bare": peaks})
        table.insert(1, "times bare", table["ms"] / table.loc["bare forward", "ms"])
        table["MB above bare"] = (table["MB above bare"] - peaks["bare forward"]) / 1e6
        show(given, str(layout).removeprefix("torch."), table.round(2))
