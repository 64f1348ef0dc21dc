"""Lovász hinge and multi-label IoU against plain forms and public libraries: python benchmarks/losses.py

Forward and backward of the Lovász hinge at (4, 7, 256, 256), with logits of an untrained model (every pixel active) and with
2 % of the pixels active. "full sort" is the textbook form: per class, all valid pixels are sorted, and autograd does the rest.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from timing import alternate, peak_bytes, set_up, show, table_of
from torch import Tensor
from torchmetrics.classification import MultilabelJaccardIndex

from agrivision_repro.losses import lovasz_loss
from agrivision_repro.metrics import MultilabelIoU

SHAPE = (4, 7, 256, 256)


def full_sort(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    "Compute the Lovász hinge in its textbook form."
    losses = []
    for c in range(logits.shape[1]):
        y, s = targets[:, c][valid].float(), logits[:, c][valid]
        errors, order = (1 - (2 * y - 1) * s).sort(descending=True)
        y = y[order]
        jaccard = 1 - (y.sum() - y.cumsum(0)) / (y.sum() + (1 - y).cumsum(0))
        losses.append(errors.relu() @ torch.diff(jaccard, prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()


def float_iou(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    "Compute intersection and union in float32, directly from the formula."
    found, present = (mask.float() * valid[:, None].float() for mask in (logits > 0, targets))
    hits = (found * present).sum((0, 2, 3))
    return hits / (found.sum((0, 2, 3)) + present.sum((0, 2, 3)) - hits)


def draw_patches() -> tuple[Tensor, Tensor]:
    "Draw labels in patches of 8 pixels, each class independently, and valid pixels."
    classes = torch.randint(SHAPE[1], (SHAPE[0], SHAPE[2] // 8, SHAPE[3] // 8))
    classes = classes.repeat_interleave(8, 1).repeat_interleave(8, 2)
    valid = torch.ones(SHAPE[0], *SHAPE[2:], dtype=torch.bool)
    valid[:, :, :16] = False
    return torch.arange(SHAPE[1])[:, None, None] == classes[:, None], valid


def compare_lovasz(title: str, logits: Tensor, targets: Tensor, valid: Tensor, given: Namespace) -> None:
    logits = logits.requires_grad_()
    peer = LovaszLoss("multilabel", from_logits=True)
    losses = {
        "full sort": lambda: full_sort(logits, targets, valid),
        "ours": lambda: lovasz_loss(logits, targets, valid),
        "smp LovaszLoss": lambda: peer(logits, targets.float()),  # it does not accept a mask of valid pixels
    }

    def step(loss):
        def run() -> None:
            logits.grad = None
            loss().backward()

        return run

    steps = {name: step(loss) for name, loss in losses.items()}
    table = table_of(alternate(steps, given.rounds), "full sort")
    table["peak, logits"] = [round(peak_bytes(run) / (4 * logits.numel()), 1) for run in steps.values()]
    active = (((2 * targets.float() - 1) * logits < 1) & valid[:, None]).float().mean().item()
    show(given, f"Lovász hinge, {title}: {100 * active:.1f} % of the pixels active", table)
    assert abs(losses["ours"]().item() - losses["full sort"]().item()) < 1e-5


def compare_iou(logits: Tensor, targets: Tensor, valid: Tensor, given: Namespace) -> None:
    ours, peer = MultilabelIoU(SHAPE[1]), MultilabelJaccardIndex(SHAPE[1], validate_args=False)
    ways = {
        "float": lambda: float_iou(logits, targets, valid),
        "ours": lambda: ours.update(logits, targets, valid),
        "torchmetrics": lambda: peer.update(logits, targets.int()),  # it does not accept a mask of valid pixels
    }
    table = table_of(alternate(ways, given.rounds), "float")
    table["peak, logits"] = [round(peak_bytes(way) / (4 * logits.numel()), 1) for way in ways.values()]
    show(given, "MultilabelIoU.update", table)


if __name__ == "__main__":
    given = set_up(__doc__)
    torch.manual_seed(0)
    targets, valid = draw_patches()
    sure = (2 * targets.float() - 1) * (1 + torch.randn(SHAPE).exp())
    trained = torch.where(torch.rand(SHAPE) < 0.02, 0.3 * torch.randn(SHAPE), sure)
    compare_iou(trained, targets, valid, given)
    compare_lovasz("fresh model", 0.1 * torch.randn(SHAPE), targets, valid, given)
    compare_lovasz("trained model", trained, targets, valid, given)
