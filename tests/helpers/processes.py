"Run a function in two processes that talk over gloo."

from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from forked import SERVER
from torch import distributed


def in_two_processes(work: Callable, folder: Path, *arguments) -> list:
    "Call `work(rank, *arguments)` in each; return both results."
    mp.start_processes(one_process, (work, str(folder), arguments), nprocs=2, start_method=SERVER.get_start_method())
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def one_process(rank: int, work: Callable, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
