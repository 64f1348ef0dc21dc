"""Devices, precision, processes and torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

_PRECISIONS = ("auto", "bf16", "float32")


def has_bf16(device: torch.device) -> bool:
    "Return True if the device supports bf16 arithmetic natively."
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_device(device: str, precision: str = "auto") -> None:
    "Check that device and precision are among the supported values; raise ValueError otherwise."
    if device not in ("auto", "cpu"):
        raise ValueError(f"device is {device!r}: wanted auto or cpu (choose among GPUs with CUDA_VISIBLE_DEVICES)")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision is {precision!r}: wanted one of {', '.join(_PRECISIONS)}")


@dataclass(frozen=True)
class Engine:
    "Device, processes and precision of a run."

    accelerator: Accelerator
    precision: str  # "bf16" or "float32"

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def title(self) -> str:
        "Return device, processes and precision in words."
        n, kind = self.accelerator.num_processes, self.device.type
        processes = f", {n} processes{' (which share its cores: no faster than one)' if kind == 'cpu' else ''}" if n > 1 else ""
        return f"{kind}{processes}, {self.precision}"

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        "Compute logits in the layout and precision of the device."
        with self.autocast():
            return model(x.contiguous(memory_format=torch.channels_last))


def make_engine(
    device: str = "auto",  # "auto": a GPU if available; or "cpu"
    precision: str = "auto",  # "float32", "bf16"; "auto": bf16 if the device supports it
    trackers: Sequence = (),  # Accelerate's, as names or instances: "tensorboard", "wandb", …
    folder: Path | None = None,  # output folder of the trackers
) -> Engine:
    "Make an engine from device, precision and trackers."
    check_device(device, precision)
    is_cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=is_cpu, log_with=list(trackers) or None, project_dir=folder)
    chosen = "bf16" if has_bf16(accelerator.device) else "float32"
    return Engine(accelerator, chosen if precision == "auto" else precision)


_COMPILE_FROM = 2_000  # iterations


def speed_up(
    model: nn.Module,  # changed in place
    device: torch.device,
    iterations: int,
) -> str:  # what was done, in one line
    "Convert a model to the fastest memory layout for its device, and compile it if that pays off."
    model.to(device, memory_format=torch.channels_last)  # about a tenth faster on a CPU, more on a GPU
    if device.type != "cuda" or iterations < _COMPILE_FROM:
        return "channels_last; not compiled, which pays off only in a long run on a GPU"
    return "channels_last; " + compile_model(model, device)


def compile_model(model: nn.Module, device: torch.device) -> str:
    "Compile a model if a short test shows that a compiler works."
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a toolchain may raise anything; training does not depend on it
        return f"not compiled, no compiler works here ({str(error).strip().splitlines()[0][:120]})"
    model.compile()
    return "compiled"
