"""Train a small Run, being killed at random moments, until it ends: killing.py OUT N_KILLS SEED LENGTH

LENGTH is the number of iterations of its decay.

Everything is imported once; each attempt is a forked child that trains and a parent that waits and kills. The parent never computes.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace


def small_run(length: int):
    run = plan_run("smoke", "synthetic", depth=18, channels="rgb", norm="ibn_s", lovasz=1.0)
    return replace(run, recipe=replace(run.recipe, warmup=5, constant=35, decay=length, evaluate_every=20))


def attempt(out: Path, length: int) -> None:
    "Train in this process to the end, or until killed."
    torch.set_num_threads(1)
    Workspace(out, device="cpu", save_every=3).result(small_run(length))


if __name__ == "__main__":
    out, n_kills, moments = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    n_midway = 0
    for k in range(n_kills + 1):
        child = os.fork()
        if child == 0:
            try:
                attempt(out, int(sys.argv[4]))
            finally:
                os._exit(0)
        if k < n_kills:
            before = [p.stat().st_mtime_ns for p in out.glob("runs/*/state/state.safetensors")]
            until = time.monotonic() + 60
            while [p.stat().st_mtime_ns for p in out.glob("runs/*/state/state.safetensors")] == before and time.monotonic() < until:
                if list(out.glob("runs/*/scores.json")):
                    break
                time.sleep(0.005)  # it has gone on by at least one state
            time.sleep(moments.uniform(0, 0.15))
            n_midway += any(out.glob("runs/*/state/state.safetensors"))
            os.kill(child, signal.SIGKILL if k < n_kills - 2 else signal.SIGTERM)
        os.waitpid(child, 0)
    print(n_midway)
