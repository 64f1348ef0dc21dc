"""Runs on one machine: sequentially in this process, or several in parallel in processes of their own, with one progress line."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import redirect_stderr, suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from accelerate.tracking import GeneralTracker
from tqdm import tqdm

from agrivision_repro.core import Stopped, defer_signals, fork_server, notes_stream
from agrivision_repro.runs.jobs import Interrupted, in_one_line, train_one, work_of
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.workspace import Workspace


def train_here(
    runs: Sequence[Run],
    workspace: Workspace,
    backend: str = "auto",  # one of `launch.BACKENDS`, but for "ray"
    at_once: int = 0,  # number of Runs side by side; 0: as many as suit the cores
) -> dict[Run, str]:  # failed Runs and their errors
    "Train Runs on this machine."
    n_at_once, n_threads = _divide_cores(runs, workspace.on_gpu or backend == "one by one", at_once=at_once)
    if n_at_once == 1 and backend != "side by side":
        return _train_one_by_one(runs, workspace)
    return _SideBySide(runs, workspace, n_threads).train(n_at_once)


def _divide_cores(
    runs: Sequence[Run],
    one_by_one: bool,
    n_cores: int = 0,  # of this machine; 0: those that this process may use
    at_once: int = 0,  # number of Runs asked for; 0: one on a GPU or with whole tiles, otherwise two or half as many as cores
) -> tuple[int, int]:  # parallel runs, and cores per run
    "Divide the cores of a machine among Runs."
    n_cores = n_cores or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    if at_once:
        n_at_once = min(at_once, len(runs))
        return n_at_once, max(n_cores // n_at_once, 1)
    if one_by_one or not all(run.recipe.crop for run in runs):
        return 1, n_cores
    n_at_once = max(1, min(len(runs), n_cores, max(2, n_cores // 2)))
    return n_at_once, n_cores // n_at_once


def _train_one_by_one(runs: Sequence[Run], workspace: Workspace) -> dict[Run, str]:  # failed Runs and their errors
    "Train Runs one after the other in this process."
    failures = {}
    for k, run in enumerate(runs, 1):
        try:
            workspace.result(run, f"run {k} of {len(runs)}: {run.title}")
        except (RuntimeError, ValueError, OSError) as error:
            failures[run] = in_one_line(error)
    return failures


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


def train_alone(run: Run, kwargs: dict, n_threads: int, pipe: Connection) -> None:
    "Train a Run in a process of its own; send an error as text."
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    with redirect_stderr(io.StringIO()):  # only the parent writes to the terminal
        try:
            train_one(run, kwargs, n_threads, [Messenger(pipe)])
        except Interrupted:
            os._exit(128 + signal.SIGTERM)
        except Exception as error:
            pipe.send(in_one_line(error))


def _read_messages(process: BaseProcess, pipe: Connection) -> Iterator[int | str]:
    "Yield what a process sends, until it has ended and all of it is read."
    with suppress(EOFError, OSError):
        while pipe in wait([pipe, process.sentinel]):
            yield pipe.recv()


def _death_of(process: BaseProcess) -> str:
    "Describe how a process ended; empty if it ended well."
    code = process.exitcode or 0
    why = f"signal {-code}; too little memory?" if code < 0 else f"exit code {code}"
    return f"its process died ({why})" if code else ""


_BAR = "{desc}, {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"


class _SideBySide:
    "Runs in processes of their own, each watched by a thread; on a signal, all of them save their states."

    def __init__(self, runs: Sequence[Run], workspace: Workspace, n_threads: int):
        self.runs, self.kwargs, self.n_threads = runs, workspace.as_kwargs(), n_threads
        self.context = fork_server(__name__)  # imports PyTorch once
        self.lock, self.processes, self.is_stopping = threading.Lock(), [], False
        self.iterations = dict.fromkeys(runs, 0)  # completed ones

    def train(self, n_at_once: int) -> dict[Run, str]:  # failed Runs and their errors
        "Train the Runs, the first ones first, and show how far they are."
        work = {run: work_of(run) for run in self.runs}
        options = {"bar_format": _BAR, "smoothing": 0, "dynamic_ncols": True, "leave": False, "file": notes_stream()}
        with defer_signals() as received, tqdm(total=sum(work.values()), **options) as bar, futures.ThreadPoolExecutor(n_at_once) as pool:
            errors = {pool.submit(self.watch, run): run for run in self.runs}
            ended, waiting = set(), set(errors)
            try:
                while waiting:
                    bar.set_description_str(f"{len(ended)} of {len(errors)} runs done", refresh=False)
                    bar.update(sum(w * self.iterations[run] / run.recipe.iterations for run, w in work.items()) - bar.n)
                    bar.refresh()
                    ended, waiting = futures.wait(errors, timeout=0.5)
                    if received:
                        raise Stopped(received[0])
            finally:
                self.stop()
            return {run: future.result() for future, run in errors.items() if future.result()}

    def watch(self, run: Run) -> str:  # the error; empty: none
        "Train a Run in a process of its own, and record its iterations."
        here, there = self.context.Pipe(duplex=False)
        process, error = self.context.Process(target=train_alone, args=(run, self.kwargs, self.n_threads, there)), ""
        with self.lock:
            if self.is_stopping:
                return ""
            process.start()
            self.processes.append(process)
        there.close()
        for message in _read_messages(process, here):
            if isinstance(message, str):
                error = message
            else:
                self.iterations[run] = message
        process.join()
        self.iterations[run] = run.recipe.iterations
        return error or _death_of(process)

    def stop(self) -> None:
        "Stop all active runs, which save their states, and start no other."
        with self.lock:
            self.is_stopping = True
        for process in self.processes:
            process.terminate()
