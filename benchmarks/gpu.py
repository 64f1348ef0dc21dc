"""Check a GPU in a few minutes: python benchmarks/gpu.py [--out gpu.json] [--device cuda]

Norms, backbones, losses and metrics compared with the CPU; the first 60 steps of the paper's training at full size (IBN-Net101-s,
hybrid loss, 32 tiles of 512² with random content), in bf16, compiled and in float32, with each loss's share of a step and the places
where the CPU waits for the GPU; the other benchmarks on the device. Prints a table and writes JSON. Needs a checkout and the
installed package, but no data. With --device cpu the same code runs at a small size, without compiler and benchmarks, as a smoke test.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from timing import finish
from torch import Tensor, nn

from agrivision_repro.data.batches import Batch, SampleStream, TileDataset, training_loader
from agrivision_repro.data.tiles import Tile
from agrivision_repro.losses import bce_loss, dice_loss, lovasz_loss, lovasz_weights
from agrivision_repro.metrics import ChallengeIoU, MultilabelIoU
from agrivision_repro.models.backbones import NORMS, create_backbone
from agrivision_repro.models.norms import InstanceBatchNorm2d, SwitchNorm2d, SyncedBatchNorm2d
from agrivision_repro.runs.run import Run, build_loss, build_model, plan_run
from agrivision_repro.runs.store import provenance
from agrivision_repro.training.engine import make_engine
from agrivision_repro.training.loop import Trainer, load_batches

HERE = Path(__file__).resolve().parent
TOLERANCE = {"norm": 1e-4, "backbone": 2e-3, "loss": 1e-4, "metric": 0.0, "batches": 1e-6}  # relative, of float32 to float64 on the CPU


def distance(here: Tensor, there: Tensor) -> float:
    "Compute the largest difference, relative to the largest value."
    here, there = here.detach().double().cpu(), there.detach().double()
    return float((here - there).abs().max() / there.abs().max().clamp(min=1e-12))


def forward_backward(module: nn.Module, x: Tensor) -> list[Tensor]:
    "Return output, input gradient, parameter gradients and buffers after one training step."
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *(b for b in module.buffers() if b.is_floating_point())]


def check_parity(device: torch.device, depth: int) -> dict[str, float]:
    "Compare float32 on the device with float64 on the CPU, backbones of some depth; name → relative error."
    torch.backends.cudnn.allow_tf32 = False  # whose error of 10⁻³ would hide others
    torch.manual_seed(0)
    errors, x = {}, torch.randn(4, 32, 24, 24, dtype=torch.float64)
    for kind in (SyncedBatchNorm2d, InstanceBatchNorm2d, SwitchNorm2d):
        pair = forward_backward(kind(32).to(device), x.float().to(device)), forward_backward(kind(32).double(), x)
        errors[f"norm {kind.__name__}"] = max(distance(a, b) for a, b in zip(*pair, strict=True))
    images = torch.randn(2, 4, 64, 64, dtype=torch.float64)
    for norm in NORMS:
        model = create_backbone(depth, norm, in_chans=4).eval()
        there = model.double()(images)
        errors[f"backbone {norm}"] = distance(model.float().to(device)(images.float().to(device)), there)
    logits, targets, valid = torch.randn(2, 7, 64, 64, dtype=torch.float64), torch.rand(2, 7, 64, 64) < 0.2, torch.rand(2, 64, 64) < 0.9
    moved = logits.float().to(device), targets.to(device), valid.to(device)
    for loss in (bce_loss, dice_loss, lovasz_loss):
        errors[f"loss {loss.__name__}"] = distance(loss(*moved), loss(logits, targets, valid))
    for kind in (MultilabelIoU, ChallengeIoU):
        here, there = kind(7).to(device), kind(7)
        here.update(*moved), there.update(logits.float(), targets, valid)
        errors[f"metric {kind.__name__}"] = distance(here.per_class(), there.per_class())
    errors["batches while the device computes"] = check_batches(device)
    torch.backends.cudnn.allow_tf32 = True
    return errors


def check_batches(device: torch.device) -> float:
    "Load batches while a queue of other work keeps the device busy, and compare them with those loaded on the CPU."
    side = 64 if device.type == "cpu" else 2048  # a queue that keeps a GPU busy would take a CPU half a minute
    feed, square = TileDataset(random_tiles(16, 256), "rgbn", 7), torch.randn(side, side, device=device)
    loaders = [training_loader(SampleStream(feed.tiles), 8, 0, 12, prepare=feed.prepare(where)) for where in (device, "cpu")]
    worst = 0.0
    for here, there in zip(*loaders, strict=True):
        for _ in range(8):
            square = (square @ square).tanh()
        wrong = [float((a.cpu() ^ b).any()) for a, b in zip(here[1:3], there[1:3], strict=True)]
        worst = max(worst, distance(here.x, there.x), *wrong)
    return worst


def random_tiles(n: int, side: int) -> list[Tile]:
    "Make noise of the right size and type: a GPU's time does not depend on the content."
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (n, 4, side, side), np.uint8)
    return [Tile.of(f"noise {k}", image, image[3] >> 2 & 63, image[0] > 10) for k, image in enumerate(images)]


def milliseconds(work: Callable[[], object], n: int) -> float:
    "Return the mean time of a piece of work, queued n times without waiting in between."
    finish()
    start = perf_counter()
    for _ in range(n):
        work()
    finish()
    return 1000 * (perf_counter() - start) / n


def time_losses(trainer: Trainer, batches: Sequence[Batch]) -> dict[str, float]:
    "Time forward and backward of each loss alone, on the model's own logits, and how many pixels the Lovász hinge must sort."
    batch, loss = batches[0], trainer.loss
    with torch.no_grad():
        logits = trainer.engine.predict(trainer.model, batch.x)
    pixels = logits.requires_grad_(), batch.targets, batch.valid
    ways = {name: getattr(loss, name) for name in loss.term_names}
    ways["lovasz, as before"] = lambda *given: hinge_of_active(*given)
    times = {}
    for name, way in ways.items():
        milliseconds(lambda way=way: way(*pixels).backward(), 2)
        times[f"{name}, ms"] = len(batches) * milliseconds(lambda way=way: way(*pixels).backward(), 5)
    margin = torch.where(batch.targets, logits, -logits) < 1
    with torch.no_grad():
        assert abs(loss.lovasz(*pixels) - hinge_of_active(*pixels)) < 1e-4, "both forms have the same value"
    return times | {"active pixels": float((margin & batch.valid[:, None]).float().mean())}


def hinge_of_active(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    "Compute the Lovász hinge from the active pixels alone, sorted as 64-bit keys: it waits for the GPU three times per class."
    losses, scores = [], logits.float()
    for c in range(logits.shape[1]):
        y, mask = targets[:, c].flatten(), valid.flatten()
        errors = (torch.where(y, -scores[:, c].flatten(), scores[:, c].flatten()) + 1).relu() * mask
        active, n_present = errors.detach().nonzero()[:, 0], int((y & mask).sum())
        keys = ((0x7FFFFFFF - errors[active].detach().view(torch.int32)).long() << 32) + 2 * active + y[active]
        keys = keys.sort().values
        order, label = (keys & 0xFFFFFFFF) >> 1, keys & 1
        losses.append(errors[order].double() @ lovasz_weights(label, n_present))
    return torch.stack(losses).mean().float()


def list_kernels(work: Callable[[], object], n: int = 20) -> list[tuple[str, int, float]]:
    "List the GPU kernels that take most of the time: name, calls, milliseconds."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        work()
        finish()
    rows = [(e.key[:90], e.count, round(e.self_device_time_total / 1000, 2)) for e in recorded.key_averages()]
    return sorted(rows, key=lambda row: -row[2])[:n]


def count_waits(work: Callable[[], object]) -> list[str]:
    "List where a piece of work makes the CPU wait for the GPU, by PyTorch's own count."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]


def train(run: Run, tiles: list[Tile], n_steps: int, device: str, precision: str, is_compiled: bool = False) -> dict:
    "Train for some steps as `fit` does; return losses, tiles per second, memory, and where the time goes."
    engine, size, began = make_engine(device, precision), run.recipe.batch_size, perf_counter()
    is_gpu, warm_up = engine.device.type == "cuda", min(10, n_steps // 2)
    short = replace(run.recipe, stop=n_steps)  # too short to be compiled
    trainer = Trainer(build_model(run), build_loss(run), run.recipe if is_compiled else short, seed=run.seed, engine=engine)
    found: dict = {"precision": engine.precision, "speed": trainer.speed}
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.model.train()
    trainer.recipe = short
    loader = load_batches(trainer, TileDataset(tiles, run.channels, 7))
    fixed = next(loader)
    found["losses at the start"] = time_losses(trainer, fixed) if not is_compiled else {}
    trainer.step(fixed)
    for _, batches in zip(range(warm_up - 2), loader, strict=False):
        trainer.step(batches)
    finish()
    found["start-up, s"], start, n = perf_counter() - began, perf_counter(), 0
    for batches in loader:
        trainer.step(batches)
        n += 1
    finish()
    step = 1000 * (perf_counter() - start) / n
    alone = milliseconds(lambda: trainer.step(fixed), n)
    losses = torch.stack(trainer.history)[:n_steps, 1].tolist()
    found |= {"tiles/s": 1000 * size / step, "step, ms": step, "step on one batch, ms": alone, "waits for data": max(1 - alone / step, 0.0)}
    found |= {"losses after training": time_losses(trainer, fixed)} if not is_compiled else {}
    found |= {"waits for the GPU in a step": count_waits(lambda: trainer.step(fixed))} if is_gpu else {}
    found |= {"kernels": list_kernels(lambda: trainer.step(fixed))} if is_gpu else {}
    found |= {"peak memory, GB": torch.cuda.max_memory_allocated() / 1e9} if is_gpu else {}
    return found | {"is finite": bool(np.isfinite(losses).all()), "losses": losses}


def train_if_it_fits(*args, **options) -> dict:
    "Train, or say that the device's memory is too small."
    try:
        return train(*args, **options)
    except torch.OutOfMemoryError as error:
        return {"is finite": True, "failed": f"out of memory: {str(error).splitlines()[0][:200]}"}
    finally:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def driver_version() -> str:
    "Return the version of NVIDIA's driver."
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]


def run_benchmark(name: str, device: str) -> str:
    "Run another benchmark on the device and return its output."
    words = [sys.executable, HERE / f"{name}.py", "--rounds", "5", "--device", device]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=HERE)
    except subprocess.TimeoutExpired:
        return "FAILED\nnot done after 100 s"
    return done.stdout if done.returncode == 0 else f"FAILED\n{done.stderr[-2000:]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke test")
    parser.add_argument("--seconds", type=float, default=240, help="after these, no further benchmark is started")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: this check is for a machine with a GPU (--device cpu shows that the code runs)")
    is_gpu, began = given.device == "cuda", perf_counter()
    wanted = "auto" if is_gpu else "cpu"
    run = plan_run("paper" if is_gpu else "smoke", "agrivision-2020", norm="ibn_s", lovasz=1.0)
    run = replace(run, depth=101 if is_gpu else 18, recipe=replace(run.recipe, pretrained=False, crop=0))
    tiles, n_steps = random_tiles(64 if is_gpu else 8, 512 if is_gpu else 64), 60 if is_gpu else 6
    machine = provenance(make_engine(wanted)) | {"cores": os.cpu_count()} | ({"driver": driver_version()} if is_gpu else {})
    report = {"machine": machine, "parity": check_parity(torch.device(given.device), 50 if is_gpu else 18), "training": {}}
    print(f"parity: {perf_counter() - began:.0f} s", flush=True)
    ways = {"bf16": ("bf16", False), "float32": ("float32", False)}
    ways |= {"bf16, compiled": ("bf16", True)} if is_gpu else {}
    for name, (precision, is_compiled) in ways.items():
        steps = min(n_steps, 30) if name == "float32" else n_steps
        report["training"][name] = train_if_it_fits(run, tiles, steps, wanted, precision, is_compiled)
        print(f"{name}: {report['training'][name].get('tiles/s', 0):.1f} tiles/s, {perf_counter() - began:.0f} s so far", flush=True)
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    if is_gpu:
        small = plan_run("workstation", "agrivision-2020", norm="ibn_s", lovasz=1.0)
        report["training"]["workstation scale"] = train_if_it_fits(small, random_tiles(32, 256), n_steps, wanted, "bf16")
    curves = [np.array(report["training"][name].get("losses", [])[: min(n_steps, 30)]) for name in ("bf16", "float32")]
    if all(map(len, curves)):
        difference = np.mean(np.abs(curves[0] - curves[1]) / curves[1])
        report["bf16 against float32, mean relative difference of the loss"] = float(difference)
    report["benchmarks"] = {}
    for name in ("norms", "losses", "network", "divergence") if is_gpu else ():
        if perf_counter() - began < given.seconds:
            report["benchmarks"][name] = run_benchmark(name, given.device)
    bad = [name for name, error in report["parity"].items() if error > TOLERANCE[name.split()[0]]]
    bad += [f"training {name}" for name, found in report["training"].items() if not found["is finite"]]
    bad += [f"benchmark {name}" for name, text in report["benchmarks"].items() if text.startswith("FAILED")]
    report |= {"failed": bad, "seconds": round(perf_counter() - began, 1)}
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, error in report["parity"].items():
        print(f"{name:32} relative error {error:.1e}{'  TOO LARGE' if name in bad else ''}")
    for name, found in report["training"].items():
        print(f"training {name:27} {', '.join(f'{k} {v:.3g}' for k, v in found.items() if isinstance(v, float))}")
        print(f"    {found.get('failed') or found['speed']}")
        for moment in ("losses at the start", "losses after training", "waits for the GPU in a step", "kernels"):
            print(f"    {moment}: {found.get(moment)}")
    print(*report["benchmarks"].values(), sep="\n")
    print(f"{report['seconds']:.0f} s, {len(bad)} failed{': ' + ', '.join(bad) if bad else ''}; written to {given.out}")
    sys.exit(bool(bad))
