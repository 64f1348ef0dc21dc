"""Overhead of the training loop over bare steps: python benchmarks/training.py

A Run at laptop scale, ResNet-101 and IBN-Net-101-s. "bare" is forward, loss, backward and optimizer step on prepared batches
in the same precision and layout; many of them, because the loss sorts fewer pixels once a net has overfitted a single batch. "loop"
is `fit`: reading, cropping and augmenting batches, recording and checking losses, drawing the bar, saving a state every 250 iterations.
The two alternate every few steps; validation is not counted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from timing import set_up, show

from agrivision_repro.data.batches import SampleStream, training_loader
from agrivision_repro.runs.run import Run, build_loss, build_model, plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.training.engine import make_engine
from agrivision_repro.training.loop import SAVE_EVERY, Trainer, fit
from agrivision_repro.training.schedule import learning_rate

STEPS = 100


class Loop:
    "`fit`, stopped and resumed every few steps, with its own reading of tiles."

    def __init__(self, run: Run, workspace: Workspace, folder: Path):
        self.trainer = Trainer(build_model(run), build_loss(run), run.recipe, seed=run.seed, engine=make_engine("cpu"))
        self.feed, self.state = workspace.feed(run, "train"), folder / "state.safetensors"

    def run(self, n_steps: int) -> float:
        "Return the seconds for `n_steps` iterations, including the start and end of the loop."
        start = perf_counter()
        self.trainer.recipe = self.trainer.recipe.__class__(**vars(self.trainer.recipe) | {"stop": self.trainer.iteration + n_steps})
        fit(self.trainer, self.feed, self.state, title="loop")
        return perf_counter() - start


class Bare:
    "The same steps, written out, on prepared batches."

    def __init__(self, run: Run, workspace: Workspace):
        self.engine, self.recipe = make_engine("cpu"), run.recipe
        self.model = build_model(run).train().to(memory_format=torch.channels_last)
        self.loss, feed = build_loss(run), workspace.feed(run, "train")
        stream = SampleStream(feed.tiles, 0, run.recipe.crop)
        self.batches = list(training_loader(stream, run.recipe.batch_size, 0, STEPS, prepare=feed.prepare("cpu")))
        settings = {"momentum": run.recipe.momentum, "weight_decay": run.recipe.weight_decay, "fused": True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), learning_rate(run.recipe, 0), **settings)

    def run(self, n_steps: int) -> float:
        start = perf_counter()
        for batch in self.batches[:n_steps]:
            with self.engine.autocast():
                logits = self.model(batch.x.contiguous(memory_format=torch.channels_last))
            self.loss(logits, batch.targets, batch.valid).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return perf_counter() - start


if __name__ == "__main__":
    given = set_up(__doc__)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder, device="cpu")
        for norm in ("bn", "ibn_s"):
            run = plan_run("laptop", "synthetic", norm=norm, channels="rgbn", lovasz=1.0)
            ways = {"bare": Bare(run, workspace), "loop": Loop(run, workspace, Path(folder))}
            seconds = {name: [] for name in ways}
            for turn in range(max(given.rounds // 8, 3) + 1):
                for name, way in ways.items():
                    took = way.run(STEPS)
                    if turn:  # the first warms up
                        seconds[name].append(took / STEPS)
            ratios = [loop / bare for loop, bare in zip(seconds["loop"], seconds["bare"], strict=True)]
            rows[norm] = {f"{name}, ms": 1000 * median(found) for name, found in seconds.items()} | {"loop / bare": median(ratios)}
            rows[norm] |= {"lowest": min(ratios), "highest": max(ratios), "tiles/s": run.recipe.batch_size / median(seconds["loop"])}
    crops = f"{run.recipe.batch_size} crops of {run.recipe.crop}² a step, {make_engine('cpu').precision}"
    show(given, f"{crops}; a state every {SAVE_EVERY} iterations", pd.DataFrame(rows).T.round(3))
