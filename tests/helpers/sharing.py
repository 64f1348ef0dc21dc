"""Train small models and score them, in as many processes as this is started in: sharing.py OUT (NORM | --runs | --tiles)

With --runs, whole Runs at smoke scale, one of each norm. With --tiles, an untrained model is scored and the counts of each tile are kept.

Of several processes each takes its own loss; one process alone averages the hybrid losses of the two halves of a batch. In float64
and without dropout, so that one process and two can be compared to the last digits.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn

from agrivision_repro.data.batches import TileDataset
from agrivision_repro.data.editions import open_tiles
from agrivision_repro.data.synthetic_files import SyntheticConfig, write_synthetic
from agrivision_repro.losses import HybridLoss
from agrivision_repro.models.backbones import NORMS
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.training.checkpoint import save_tensors
from agrivision_repro.training.engine import Engine, make_engine
from agrivision_repro.training.evaluate import score_model, score_tiles
from agrivision_repro.training.loop import Trainer, load_batches
from agrivision_repro.training.schedule import Recipe

RECIPE = Recipe(1, 2, 1, lr=0.05, batch_size=8, crop=32, width=1 / 16, pretrained=False)


class Halves(HybridLoss):
    "The mean of the hybrid loss over the two halves of a batch."

    def terms(self, *tensors: Tensor) -> dict[str, Tensor]:
        first, second = (HybridLoss.terms(self, *(t.chunk(2)[k] for t in tensors)) for k in range(2))
        return {name: (first[name] + second[name]) / 2 for name in first}


class Wide(nn.Module):
    "A model in float64."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double())


def make_model(norm: str) -> nn.Module:
    torch.manual_seed(0)
    model = DeepLabV3Plus(7, 26, norm, width=RECIPE.width, multigrid=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Wide(model)


def train(norm: str, loss: nn.Module, feed: TileDataset, engine: Engine, out: Path) -> None:
    trainer = Trainer(make_model(norm), loss, RECIPE, seed=0, engine=engine, sync_switch=True)
    trainer.model.train()
    for batches in load_batches(trainer, feed):
        trainer.step(batches)
    scores = score_model(trainer.bare_model, feed, engine)
    if engine.accelerator.is_main_process:
        save_tensors(trainer.bare_model.state_dict() | {"history": torch.stack(trainer.history)}, out.with_suffix(".safetensors"))
        out.with_suffix(".json").write_text(json.dumps(scores))


def train_small_models(norm: str, out: Path, engine: Engine) -> None:
    tiles = open_tiles("synthetic", write_synthetic(out.parent / "farm", SyntheticConfig(32, 5, 1, 1)), "train")
    feed = TileDataset([tiles[k] for k in range(17)], "rgbn", 7)  # one process scores two batches, the other one
    is_alone = engine.accelerator.num_processes == 1
    train(norm, HybridLoss(0, 0), feed, engine, out / f"{norm}-bce")
    train(norm, (Halves if is_alone else HybridLoss)(1, 1), feed, engine, out / f"{norm}-hybrid")


def score_untrained(out: Path, engine: Engine) -> None:
    "Each process writes what it was given: an odd number of tiles, then one, which leaves the second process without any."
    tiles = open_tiles("synthetic", write_synthetic(out.parent / "farm", SyntheticConfig(32, 5, 1, 1)), "train")
    for n in (17, 1):
        scores, counts = score_tiles(make_model("ibn_s"), TileDataset([tiles[k] for k in range(n)], "rgbn", 7), engine)
        name = f"{n}-{engine.accelerator.process_index}"
        (out / f"{name}.json").write_text(json.dumps(scores))
        np.save(out / f"{name}.npy", counts.numpy())


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, engine = Path(sys.argv[1]), make_engine("cpu", "float32")
    if "--runs" in sys.argv:
        Workspace(out, device="cpu", precision="float32").results([plan_run("smoke", "synthetic", norm=norm, depth=18) for norm in NORMS])
    elif "--tiles" in sys.argv:
        score_untrained(out, engine)
    else:
        train_small_models(sys.argv[2], out, engine)
    engine.accelerator.wait_for_everyone()
    if distributed.is_initialized():
        distributed.destroy_process_group()
