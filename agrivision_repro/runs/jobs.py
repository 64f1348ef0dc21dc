"""One run in a process of its own: what it needs, how it ends, and how much work it is."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

import torch

from agrivision_repro.core import Stopped
from agrivision_repro.runs.plan import PAPERS_DATA, gmacs_of, kind_of
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.workspace import Workspace


class Interrupted(RuntimeError):
    "A signal stopped a worker; its Run's state is saved, and can be resumed elsewhere."


_ALONE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


_MALLOC = {-1: 2**31 - 1, -2: 64 * 2**20, -3: 32 * 2**20}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD (its limit) of glibc's malloc.h


def keep_freed_memory() -> bool:  # False: not on this system
    "Let this process keep memory that it frees for the next step, where glibc would return it to the system: a tenth of a step on a CPU."
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(option, value) for option, value in _MALLOC.items())


def train_one(
    run: Run,
    kwargs: dict,  # of `Workspace.as_kwargs`
    n_threads: int,
    trackers: Sequence = (),  # Accelerate's
) -> None:
    "Train a Run in a process of its own."
    for name in _ALONE:  # a worker is a single process, whatever launched its cluster
        os.environ.pop(name, None)
    torch.set_num_threads(n_threads)
    keep_freed_memory()
    try:
        Workspace(**kwargs, trackers=trackers).result(run)
    except (Stopped, KeyboardInterrupt) as stop:
        raise Interrupted(f"stopped by {stop}; the same command resumes from its saved state") from stop


def work_of(run: Run) -> float:  # 10⁹ multiply-adds, forward
    "Estimate the work of a Run."
    synthetic = run.source.synthetic
    side = run.recipe.crop or (synthetic.size if synthetic else PAPERS_DATA.side)
    return gmacs_of(kind_of(run), side) * run.recipe.iterations * run.recipe.batch_size


def in_one_line(error: BaseException, length: int = 300) -> str:
    "Format the type and message of an error in one line."
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= length else line[: length - 1] + "…"
