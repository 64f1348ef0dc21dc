"""Forward and backward of each norm against its textbook form: python benchmarks/norms.py

The textbook form of Switchable Normalization computes the three statistics in separate operations on the whole image; that
of IBN-a splits the channels, normalizes the halves and joins them.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from timing import alternate, peak_bytes, set_up, show, table_of
from torch import Tensor, nn

from agrivision_repro.models.norms import InstanceBatchNorm2d, SwitchNorm2d

SHAPES = {"cpu": ((8, 64, 64, 64), (8, 256, 32, 32)), "cuda": ((32, 64, 128, 128), (32, 256, 128, 128))}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}  # of activations in training


class PlainSwitchNorm2d(SwitchNorm2d):
    "Compute three full-size statistics, then the formula as printed."

    def forward(self, x: Tensor) -> Tensor:
        dims = ((2, 3), (1, 2, 3), (0, 2, 3))
        means = [x.mean(dim, keepdim=True) for dim in dims]
        variances = [x.var(dim, keepdim=True) for dim in dims]
        with torch.no_grad():
            self.BN.running_mean.lerp_(means[2].flatten(), self.BN.momentum)
            self.BN.running_var.lerp_(variances[2].flatten(), self.BN.momentum)
        mean = sum(w * m for w, m in zip(self.mean_weight.softmax(0), means, strict=True))
        variance = sum(w * v for w, v in zip(self.var_weight.softmax(0), variances, strict=True))
        weight, bias = (parameter[:, None, None] for parameter in (self.BN.weight, self.BN.bias))
        return (x - mean) / (variance + self.BN.eps).sqrt() * weight + bias


class SplitInstanceBatchNorm2d(InstanceBatchNorm2d):
    "Split, normalize, join."

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, [self.n_instance, x.shape[1] - self.n_instance], 1)
        return torch.cat([self.IN(first.contiguous()), self.BN(second.contiguous())], 1)


def step(norm: nn.Module, x: Tensor, gradient: Tensor):
    "Return a function that does one forward and backward pass."

    def run() -> None:
        norm(x).backward(gradient)
        x.grad = None

    return run


def compare(shape: tuple[int, ...], layout: torch.memory_format, given: Namespace) -> None:
    channels = shape[1]
    dtype = DTYPE[given.device]
    x, gradient = (torch.randn(shape).to(dtype, memory_format=layout) for _ in range(2))
    x.requires_grad_()
    torch.compiler.reset()
    switched = {
        "plain": PlainSwitchNorm2d(channels),
        "ours": SwitchNorm2d(channels),
        "ours, compiled": torch.compile(SwitchNorm2d(channels)),
        "nn.BatchNorm2d": nn.BatchNorm2d(channels),
    }
    halves = {
        "split and concat": SplitInstanceBatchNorm2d(channels),
        "ours": InstanceBatchNorm2d(channels),
        "ours, compiled": torch.compile(InstanceBatchNorm2d(channels)),
    }
    for title, norms, against in (("SwitchNorm", switched, "plain"), ("IBN-a", halves, "split and concat")):
        medians = alternate({name: step(norm, x, gradient) for name, norm in norms.items()}, given.rounds)
        table = table_of(medians, against)
        table["peak of forward, inputs"] = [round(peak_bytes(lambda norm=norm: norm(x)) / x.nbytes, 2) for norm in norms.values()]
        show(given, f"{title}, {shape}, {str(dtype).removeprefix('torch.')}, {str(layout).removeprefix('torch.')}", table)


if __name__ == "__main__":
    given = set_up(__doc__)
    for shape in SHAPES[given.device]:
        for layout in (torch.contiguous_format, torch.channels_last):
            compare(shape, layout, given)
