"""One complete training step of DeepLabV3+ ResNet-101: python benchmarks/network.py

Forward, loss, backward and optimizer step on 2 tiles of 256 pixels, four channels, seven classes. "plain" is float32, NCHW, eager;
"default" is the precision and memory layout that the project trains with on this device.
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
