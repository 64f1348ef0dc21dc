"""One complete training step of DeepLabV3+ ResNet-101: python benchmarks/network.py

Forward, loss, backward and optimizer step on 2 tiles of 256 pixels, four channels, seven classes. "plain" is float32, NCHW, eager;
"default" is the precision and memory layout that the project trains with on this device;
"nn.InstanceNorm2d" is IBN-b with PyTorch's instance norm, whose output is NCHW whatever its input.
"""

from __future__ import annotations

from contextlib import nullcontext

import segmentation_models_pytorch
import torch
from timing import alternate, set_up, show, table_of
from torch import nn

from agrivision_repro.losses import HybridLoss
from agrivision_repro.models.backbones import NORMS
from agrivision_repro.models.deeplab import DeepLabV3Plus, count_gmacs
from agrivision_repro.training.engine import has_bf16

SHAPE = (2, 4, 256, 256)
N_CLASSES = 7


def training_step(model: nn.Module, is_default: bool = False):
    "Return a function that does one step on fixed data."
    layout = torch.channels_last if is_default else torch.contiguous_format
    device = torch.get_default_device()
    precision = torch.autocast(device.type, torch.bfloat16) if is_default and has_bf16(device) else nullcontext()
    model = model.train().to(memory_format=layout)
    images = torch.randn(SHAPE).to(memory_format=layout)
    targets = torch.rand(SHAPE[0], N_CLASSES, *SHAPE[2:]) < 0.1
    valid = torch.ones(SHAPE[0], *SHAPE[2:], dtype=torch.bool)
    loss, optimizer = HybridLoss(), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)

    def run() -> None:
        with precision:
            logits = model(images)
        loss(logits, targets, valid).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def with_torch_instance_norm(model: nn.Module) -> nn.Module:
    "Let a model's instance norms forget their input's layout, as PyTorch's do."
    for module in model.modules():
        if isinstance(module, nn.InstanceNorm2d):
            module._forward_hooks.clear()
    return model


if __name__ == "__main__":
    given = set_up(__doc__)
    models = {norm: DeepLabV3Plus(N_CLASSES, 101, norm) for norm in NORMS}
    peer = segmentation_models_pytorch.DeepLabV3Plus("resnet101", in_channels=4, encoder_weights=None, classes=N_CLASSES)
    ways = {f"{norm}, plain": training_step(model) for norm, model in models.items()}
    ways["smp DeepLabV3Plus, plain"] = training_step(peer)
    medians = alternate(ways, given.rounds, warm_up=1)
    table = table_of(medians, "bn, plain")
    table["GMACs, 512² tile"] = [round(count_gmacs(model, (1, 4, 512, 512)), 2) for model in (*models.values(), peer)]
    show(given, "float32, NCHW, eager", table)

    ways = {"ibn_s, plain": training_step(models["ibn_s"]), "ibn_s, default": training_step(DeepLabV3Plus(N_CLASSES, 101, "ibn_s"), True)}
    default = f"default: channels_last, {'bfloat16' if has_bf16(torch.get_default_device()) else 'float32 (no bfloat16 units here)'}"
    show(given, default, table_of(alternate(ways, given.rounds, warm_up=1), "ibn_s, plain"))

    ours, torchs = (DeepLabV3Plus(N_CLASSES, 101, "ibn_b") for _ in range(2))
    ways = {"ibn_b, ours": training_step(ours, True), "ibn_b, nn.InstanceNorm2d": training_step(with_torch_instance_norm(torchs), True)}
    show(given, f"IBN-b, {default}", table_of(alternate(ways, given.rounds, warm_up=1), "ibn_b, nn.InstanceNorm2d"))
