"""The inputs of a model that is read: batches, channels, and the model's mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def check_channels(x: Tensor, n_channels: int) -> int:  # number of channels of x
    "Check that an input has as many channels as the previous ones; raise ValueError otherwise."
    if n_channels and x.shape[1] != n_channels:
        raise ValueError(f"inputs have {n_channels} channels, then {x.shape[1]}: both streams must have as many as the model expects")
    return x.shape[1]


def check_evaluates(model: nn.Module) -> None:
    "Check that no module of a model is in training mode; raise ValueError otherwise."
    if training := [name or type(model).__name__ for name, module in model.named_modules() if module.training]:
        raise ValueError(f"{training[0]} is in training mode, where its output depends on the batch: call model.eval() first")


def split_batch(
    batch: Tensor | Sequence[Tensor],  # x, or (x,), or (x, valid)
) -> tuple[Tensor, Tensor | None]:  # `(B, …)`, `(B, H, W)` bool
    "Return the input and the valid pixels of a batch."
    x, *rest = [batch] if isinstance(batch, Tensor) else batch
    if rest and (len(rest) > 1 or rest[0].dtype != torch.bool or rest[0].shape != (len(x), *x.shape[2:])):
        got = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in rest)
        raise ValueError(f"besides x {tuple(x.shape)} a batch has {got}: wanted x, or (x, valid) with valid bool (B, H, W)")
    return x, rest[0] if rest else None
