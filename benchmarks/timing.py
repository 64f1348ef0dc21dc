"Time several ways of doing the same, in one process and in turns, so that noise meets all alike."

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from torch.profiler import profile


def alternate(ways: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    "Run each way once a round; return medians in milliseconds."
    for way in ways.values():
        for _ in range(warm_up):
            way()
    finish()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = perf_counter()
            way()
            finish()
            seconds[name].append(perf_counter() - start)
    return {name: 1000 * median(found) for name, found in seconds.items()}


def finish() -> None:
    "Wait until a GPU has done what it was told."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(way: Callable[[], object]) -> int:
    "Most memory of the device that torch held at once beyond what it held before."
    way()
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as recorded:
        result = way()
    events = sorted((e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    del result
    held = peak = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    return peak


def table_of(medians: dict[str, float], against: str) -> pd.DataFrame:
    "Median time of each way, and how many times faster than `against` it is."
    return pd.DataFrame({"ms": medians, f"times faster than {against}": {k: medians[against] / v for k, v in medians.items()}}).round(2)


def set_up(description: str) -> argparse.Namespace:
    "Read --rounds and --threads, and say what machine this is."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_default_device(given.device)
    machine = f"torch {torch.__version__}, {given.threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    machine = f"torch {torch.__version__}, {torch.cuda.get_device_name()}" if given.device == "cuda" else machine
    print(f"{machine}, medians of {given.rounds} rounds")
    return given
