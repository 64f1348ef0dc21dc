"""All runs of the tables on one machine: sequentially on a GPU, several in parallel on a CPU, with one progress line."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from functools import partial
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from accelerate.tracking import GeneralTracker
from tqdm import tqdm

from agrivision_repro.core import Stopped, defer_signals
from agrivision_repro.runs.cluster import Interrupted, Outcome, in_one_line, outcome_of, train_one, work_of
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.workspace import Workspace


def _divide_cores(
    runs: Sequence[Run],
    is_gpu: bool,
    n_cores: int = 0,  # of this machine; 0: those that this process may use
) -> tuple[int, int]:  # parallel runs, and cores per run
    "Divide the cores of a machine among Runs."
    n_cores = n_cores or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    if is_gpu or not all(run.recipe.crop for run in runs):
        return 1, n_cores
    n_at_once = max(1, min(len(runs), n_cores, max(2, n_cores // 2)))
    return n_at_once, n_cores // n_at_once


class Messenger(GeneralTracker):
    "Tracker that sends the number of completed iterations to another process."

    name, requires_logging_directory, tracker = "messenger", False, None

    def __init__(self, pipe: Connection):
        super().__init__()
        self.tracker = pipe

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        "Send the iteration; ignore a closed pipe."
        with suppress(OSError):
            self.tracker.send(step)


def _stop_without_parent() -> None:
    "Send this process a SIGTERM when its parent process is gone."
    wait([parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def train_alone(run: Run, places: dict, save_every: int, n_threads: int, pipe: Connection) -> None:
    "Train a Run in a process of its own; send an error as text."
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    with redirect_stderr(io.StringIO()):  # only the parent writes to the terminal
        try:
            train_one(run, places, save_every, n_threads, [Messenger(pipe)])
        except Interrupted:
            os._exit(128 + signal.SIGTERM)
        except Exception as error:
            pipe.send(in_one_line(error))


class Queue:
    "Waiting and active runs, and the errors of failed ones."

    def __init__(self, runs: Sequence[Run], start: Callable[[Run], tuple[BaseProcess, Connection]], bar: tqdm):
        self.waiting, self.start, self.bar = list(runs), start, bar
        self.n_all, self.under_way, self.failures = len(runs), {}, {}  # process → Run, pipe, share shown on the bar
        self.work = {run: work_of(run) for run in runs}

    def fill(self, n_at_once: int) -> None:
        "Start runs until `n_at_once` are active."
        while self.waiting and len(self.under_way) < n_at_once:
            run = self.waiting.pop(0)
            process, pipe = self.start(run)
            self.under_way[process] = [run, pipe, 0.0]
        n_ended = self.n_all - len(self.waiting) - len(self.under_way)
        self.bar.set_description_str(f"{n_ended} of {self.n_all} runs done", refresh=False)

    def look(self, seconds: float = 0.5) -> None:
        "Receive the messages of active runs, and remove runs that ended."
        wait([process.sentinel for process in self.under_way], timeout=seconds)
        for process, entry in list(self.under_way.items()):
            has_ended = not process.is_alive()  # checked first: all its messages are then in the pipe
            run, pipe, shown = entry
            with suppress(EOFError, OSError):
                while pipe.poll():
                    self.hear(run, entry, pipe.recv())
            if has_ended:
                self.end(process, run)
        self.bar.refresh()

    def hear(self, run: Run, entry: list, said: int | str) -> None:
        "Record an iteration or an error."
        if isinstance(said, str):
            self.failures[run] = said
            return
        share = said / run.recipe.iterations
        self.bar.update(self.work[run] * (share - entry[2]))
        entry[2] = share

    def end(self, process: BaseProcess, run: Run) -> None:
        "Remove a run that ended, and record why it failed."
        self.bar.update(self.work[run] * (1 - self.under_way.pop(process)[2]))
        if process.exitcode and run not in self.failures:
            why = f"signal {-process.exitcode}; too little memory?" if process.exitcode < 0 else f"exit code {process.exitcode}"
            self.failures[run] = f"its process died ({why})"

    def stop(self) -> None:
        "Stop all active runs; each saves its state."
        for process in self.under_way:
            process.terminate()
        for process in self.under_way:
            process.join()


_BAR = "{desc}, {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"


def _start_alone(context: Any, workspace: Workspace, n_threads: int, run: Run) -> tuple[BaseProcess, Connection]:
    "Start the process of a run."
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=train_alone, args=(run, workspace.places(), workspace.save_every, n_threads, there))
    process.start()
    there.close()
    return process, here


def _train_side_by_side(
    runs: Sequence[Run],
    workspace: Workspace,
    n_at_once: int,
    n_threads: int,  # of each
) -> dict[Run, str]:  # failed Runs and their errors
    "Train Runs in processes of their own; on a signal, all of them save their states."
    context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["agrivision_repro.machine"])  # import PyTorch once
    shown = {"bar_format": _BAR, "smoothing": 0, "dynamic_ncols": True, "leave": False, "desc": f"0 of {len(runs)} runs done"}
    with tqdm(total=sum(map(work_of, runs)), **shown) as bar, defer_signals() as came:
        queue = Queue(runs, partial(_start_alone, context, workspace, n_threads), bar)
        try:
            while queue.waiting or queue.under_way:
                queue.fill(n_at_once)
                queue.look()
                if came:
                    raise Stopped(came[0])
        finally:
            queue.stop()
    return queue.failures


def _train_one_by_one(runs: Sequence[Run], workspace: Workspace) -> dict[Run, str]:  # failed Runs and their errors
    "Train Runs one after the other in this process."
    failures = {}
    for k, run in enumerate(runs, 1):
        try:
            workspace.result(run, f"run {k} of {len(runs)}: {run.title}")
        except (RuntimeError, ValueError, OSError) as error:
            failures[run] = in_one_line(error)
    return failures


def train_here(
    runs: Sequence[Run],
    workspace: Workspace,
) -> Outcome:
    "Train Runs on this machine, each once; a failed Run does not stop the others."
    unique = list(dict.fromkeys(runs))
    for run in unique:  # once, and damaged files are detected before training
        workspace.open(run.data, run.farm, "train"), workspace.open(run.data, run.farm, "val")
    todo = sorted((run for run in unique if workspace.finished(run) is None), key=work_of, reverse=True)
    n_at_once, n_threads = _divide_cores(todo, workspace.on_gpu) if todo else (1, 1)
    if n_at_once == 1:
        failures = _train_one_by_one(todo, workspace)
    else:
        failures = _train_side_by_side(todo, workspace, n_at_once, n_threads)
    return outcome_of(unique, workspace, failures)
