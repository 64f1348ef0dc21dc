"Time several implementations alternately in one process, so that noise affects all equally."

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from torch.profiler import profile

PEERS = ("torch", "torchvision", "timm", "torchmetrics", "segmentation-models-pytorch", "pillow")


def alternate(ways: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    "Run each implementation once per round; return medians in milliseconds."
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
    "Wait until the GPU has finished its queued work."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(way: Callable[[], object]) -> int:
    "Return the peak device memory allocated by torch, beyond what was allocated before."
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
    "Tabulate the median time of each implementation, and its speedup over `against`."
    return pd.DataFrame({"ms": medians, f"times faster than {against}": {k: medians[against] / v for k, v in medians.items()}}).round(2)


def set_up(description: str) -> argparse.Namespace:
    "Parse the command line, set threads and device, and print the machine's description."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    given = parser.parse_args()
    given.title, given.tables = description.partition(":")[0], []
    torch.set_num_threads(given.threads)
    torch.set_default_device(given.device)
    given.machine = torch.cuda.get_device_name() if given.device == "cuda" else f"{processor()}, {given.threads} threads"
    print(f"torch {torch.__version__}, {given.machine}, medians of {given.rounds} rounds")
    return given


def processor() -> str:
    "Return the processor's name and the widest instruction set that torch uses on it."
    known = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.partition(":")[2].strip() for line in known.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"


def show(given: argparse.Namespace, title: str, table: pd.DataFrame) -> None:
    "Print a table, and append it to the --json file, if any."
    print(f"\n{title}\n{table.to_string()}", flush=True)
    given.tables.append({"title": title, **json.loads(table.to_json(orient="split"))})
    if given.json:
        made_by = {"title": given.title, "machine": given.machine, "rounds": given.rounds, "versions": {p: version(p) for p in PEERS}}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(made_by | {"tables": given.tables}, indent=1, ensure_ascii=False) + "\n")
