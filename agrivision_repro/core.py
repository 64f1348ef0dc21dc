"""Choices, files that are written whole, JSON, processes and signals: what all other modules use."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError

from agrivision_repro import __version__


def worker_pool(n_workers: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    "Make a pool of processes, or None for one worker, which is this process."
    if n_workers < 2:
        return nullcontext()
    return ProcessPoolExecutor(n_workers, initializer=exit_with_parent)


_PRELOADED: list[str] = []


def fork_server(
    *modules: str,  # that the server is to import; without effect after it has started
) -> Any:
    "Return the context whose processes are forks of this process's one server; where the system has none, they are fresh processes."
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    _PRELOADED.extend(modules)
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(list(dict.fromkeys(_PRELOADED)))
    return context


def exit_with_parent() -> None:
    "Exit this process soon after the process that started it has ended; with a fork server, that is not its parent in the system."

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    "Write a new file with `write` and rename it atomically; on failure, raise OSError and leave the old file unchanged."
    _write_and_move(path, path.with_name(path.name + ".new"), write)


def move_file(made: Path, path: Path) -> None:
    "Move a complete file within its file system, as `replace_file` does; no other process may know `made`."
    _write_and_move(path, made, lambda made: None)


def _write_and_move(path: Path, fresh: Path, write: Callable[[Path], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(fresh)
        with fresh.open("r+b") as file:  # Windows syncs no file that is open for reading only
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        remedy = "make room or check the permissions; what was saved before is kept"
        raise OSError(f"{path} cannot be written ({error}): {remedy}") from error


class Stopped(Exception):
    "Raised after a signal ended a run and its state was saved."

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def defer_signals() -> Iterator[list[int]]:  # signal numbers received so far
    "Defer SIGTERM and SIGINT; a second signal has its default effect."
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield came
        return
    usual = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(signum: int, _frame: object) -> None:
        came.append(signum)
        signal.signal(signum, usual[signum])

    try:
        for s in usual:
            signal.signal(s, note)
        yield came
    finally:
        for s, handler in usual.items():
            signal.signal(s, handler)


def write_json(path: Path, content: dict) -> None:
    "Write a JSON file atomically."
    replace_file(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def write_array(path: Path, array: np.ndarray) -> None:
    "Write an `.npy` file atomically."

    def write(fresh: Path) -> None:
        with fresh.open("wb") as file:  # given a path, NumPy would append an extension
            np.save(file, array, allow_pickle=False)

    replace_file(path, write)


REPOSITORY = "https://github.com/agrivision-repro/agrivision_repro"  # of this package


ANEW = "remove its folder to train the Run again"  # what to do with a damaged file


def read_json(path: Path) -> dict:
    "Load a JSON object; raise ValueError if the file does not contain one."
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {ANEW}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it contains {type(content).__name__}, wanted a JSON object): {ANEW}")
    return content


def check_choice(name: str, got: object, allowed: tuple) -> None:
    "Raise ValueError unless a value is one of those allowed."
    if got not in allowed:
        raise ValueError(f"{name} is {got!r}: wanted one of {', '.join(map(str, allowed))}")


def notes_stream() -> TextIO:
    "Return the stream of notes and progress bars: stderr; in a Jupyter kernel, where stderr looks like an error, stdout."
    return sys.stdout if type(sys.stderr).__module__.startswith("ipykernel") else sys.stderr


def how_to_install(extra: str) -> str:
    "Return the commands that install this package, which is on no package index, with an extra."
    return f"pip install '.[{extra}]' in the checkout, or 'agrivision_repro-{__version__}-py3-none-any.whl[{extra}]'"


def is_recorded() -> bool:
    "Return True while torch.export, torch.jit.trace, a transform of torch.func or forward-mode differentiation runs: no custom functions."
    import torch  # the command must not wait for it

    if torch.compiler.is_compiling():  # torch.compile understands custom functions; torch.export does not
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
