"""Check a GPU in a few minutes: python benchmarks/gpu.py [--out gpu.json] [--device cuda]

Norms, backbones, losses and metrics compared with the CPU; the first 60 steps of the paper's training at full size (IBN-Net101-s,
hybrid loss, 32 tiles of 512² with random content), in bf16, compiled and in float32; the other benchmarks on the device. Prints a
table and writes JSON. Needs a checkout and the installed package, but no data. With --device cpu the same code runs at a small size,
without compiler and benchmarks, as a smoke test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from timing import finish
from torch import Tensor, nn

from agrivision_repro.data.batches import SampleStream, TileDataset, training_loader
from agrivision_repro.data.tiles import Tile
from agrivision_repro.losses import bce_loss, dice_loss, lovasz_loss
from agrivision_repro.metrics import ChallengeIoU, MultilabelIoU
from agrivision_repro.models.backbones import NORMS, create_backbone
from agrivision_repro.models.norms import InstanceBatchNorm2d, SwitchNorm2d, SyncedBatchNorm2d
from agrivision_repro.runs.run import Run, build_loss, build_model, plan_run
from agrivision_repro.runs.store import provenance
from agrivision_repro.training.engine import compile_model, make_engine
from agrivision_repro.training.loop import Trainer

HERE = Path(__file__).resolve().parent
TOLERANCE = {"norm": 1e-4, "backbone": 2e-3, "loss": 1e-4, "metric": 0.0}  # relative error of float32 on the GPU against float64 on the CPU


def distance(here: Tensor, there: Tensor) -> float:
    "Compute the largest difference, relative to the largest value."
    here, there = here.double().cpu(), there.double()
    return float((here - there).abs().max() / there.abs().max().clamp(min=1e-12))


def forward_backward(module: nn.Module, x: Tensor) -> list[Tensor]:
    "Return output, input gradient, parameter gradients and buffers after one training step."
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *(b for b in module.buffers() if b.is_floating_point())]


def check_parity(device: torch.device) -> dict[str, float]:
    "Compare float32 on the device with float64 on the CPU; name → relative error."
    torch.manual_seed(0)
    errors, x = {}, torch.randn(4, 32, 24, 24, dtype=torch.float64)
    for kind in (SyncedBatchNorm2d, InstanceBatchNorm2d, SwitchNorm2d):
        pair = forward_backward(kind(32).to(device), x.float().to(device)), forward_backward(kind(32).double(), x)
        errors[f"norm {kind.__name__}"] = max(distance(a, b) for a, b in zip(*pair, strict=True))
    images = torch.randn(2, 4, 64, 64, dtype=torch.float64)
    for norm in NORMS:
        model = create_backbone(50, norm, in_chans=4).eval()
        there = model.double()(images)[-1] if isinstance(model(images.float()), (list, tuple)) else model.double()(images)
        here = model.float().to(device)(images.float().to(device))
        errors[f"backbone {norm}"] = distance(here[-1] if isinstance(here, (list, tuple)) else here, there)
    logits, targets, valid = torch.randn(2, 7, 64, 64, dtype=torch.float64), torch.rand(2, 7, 64, 64) < 0.2, torch.rand(2, 64, 64) < 0.9
    moved = logits.float().to(device), targets.to(device), valid.to(device)
    for loss in (bce_loss, dice_loss, lovasz_loss):
        errors[f"loss {loss.__name__}"] = distance(loss(*moved), loss(logits, targets, valid))
    for kind in (MultilabelIoU, ChallengeIoU):
        here, there = kind(7).to(device), kind(7)
        here.update(*moved), there.update(logits.float(), targets, valid)
        errors[f"metric {kind.__name__}"] = distance(here.per_class(), there.per_class())
    return errors


def random_tiles(n: int, side: int) -> list[Tile]:
    "Make noise of the right size and type: a GPU's time does not depend on the content."
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (n, 4, side, side), np.uint8)
    return [Tile.of(f"noise {k}", image, image[3] >> 2 & 63, image[0] > 10) for k, image in enumerate(images)]


def train(run: Run, tiles: list[Tile], n_steps: int, device: str, precision: str, is_compiled: bool) -> dict:
    "Train for some steps; return losses, tiles per second, memory and a breakdown of the time."
    engine = make_engine(device, precision)
    trainer = Trainer(build_model(run), build_loss(run), run.recipe, seed=run.seed, engine=engine)
    compiled = compile_model(trainer.bare_model, engine.device) if is_compiled else "not asked"
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    feed, size = TileDataset(tiles, run.channels, 7), run.recipe.batch_size
    shares = {"micro_batches": trainer.micro_batches, "n_micro_batches": trainer.n_micro_batches}
    loader = training_loader(SampleStream(tiles), size, 0, n_steps, prepare=feed.prepare(engine.device), **shares)
    waited, stepped, trained = [], [], trainer.model.train()
    start = perf_counter()
    for batch in loader:
        finish()
        waited.append(perf_counter() - start)
        trainer.step([batch])
        finish()
        stepped.append(perf_counter() - start - waited[-1])
        start = perf_counter()
    del trained
    warm = slice(min(10, n_steps // 2), None)
    wait, step = (float(np.median(found[warm])) for found in (waited, stepped))
    losses = torch.stack(trainer.history)[:, 1].tolist()
    peak = torch.cuda.max_memory_allocated() / 1e9 if engine.device.type == "cuda" else float("nan")
    return {
        "precision": engine.precision, "compiled": compiled, "tiles/s": size / (wait + step), "step, ms": 1000 * step,
        "waiting for data, ms": 1000 * wait, "peak memory, GB": peak, "is finite": bool(np.isfinite(losses).all()), "losses": losses,
    }  # fmt: skip


def run_benchmark(name: str, device: str) -> str:
    "Run another benchmark on the device and return its output."
    words = [sys.executable, HERE / f"{name}.py", "--rounds", "5", "--device", device]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=HERE)
    return done.stdout if done.returncode == 0 else f"FAILED\n{done.stderr[-2000:]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke test")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: this check is for a machine with a GPU (--device cpu shows that the code runs)")
    is_gpu, began = given.device == "cuda", perf_counter()
    wanted = "auto" if is_gpu else "cpu"
    run = plan_run("paper" if is_gpu else "smoke", "agrivision-2020", norm="ibn_s", lovasz=1.0)
    run = replace(run, recipe=replace(run.recipe, pretrained=False, crop=0))
    tiles, n_steps = random_tiles(64 if is_gpu else 8, 512 if is_gpu else 64), 60 if is_gpu else 6
    report = {"machine": provenance(make_engine(wanted)), "parity": check_parity(torch.device(given.device)), "training": {}}
    ways = {"bf16": ("bf16", False), "bf16, compiled": ("bf16", True), "float32": ("float32", False)}
    for name, (precision, is_compiled) in ways.items():
        if is_compiled and not is_gpu:
            continue
        steps = n_steps if name != "float32" else min(n_steps, 30)
        report["training"][name] = train(run, tiles, steps, wanted, precision, is_compiled)
        print(f"{name}: {report['training'][name]['tiles/s']:.1f} tiles/s", flush=True)
    first, second = (np.array(report["training"][name]["losses"][: min(n_steps, 30)]) for name in ("bf16", "float32"))
    report["bf16 against float32, mean relative difference of the loss"] = float(np.mean(np.abs(first - second) / second))
    names = ("norms", "losses", "network", "divergence") if is_gpu else ()
    report["benchmarks"] = {name: run_benchmark(name, given.device) for name in names}
    bad = [name for name, error in report["parity"].items() if error > TOLERANCE[name.split()[0]]]
    bad += [f"training {name}" for name, found in report["training"].items() if not found["is finite"]]
    bad += [f"benchmark {name}" for name, text in report["benchmarks"].items() if text.startswith("FAILED")]
    report |= {"failed": bad, "seconds": round(perf_counter() - began, 1)}
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, error in report["parity"].items():
        print(f"{name:32} relative error {error:.1e}{'  TOO LARGE' if name in bad else ''}")
    for name, found in report["training"].items():
        print(f"training {name:23} {', '.join(f'{k} {v:.1f}' for k, v in found.items() if isinstance(v, float))}; {found['compiled']}")
    print(*report["benchmarks"].values(), sep="\n")
    print(f"{report['seconds']:.0f} s, {len(bad)} failed{': ' + ', '.join(bad) if bad else ''}; written to {given.out}")
    sys.exit(bool(bad))
