"""The notebooks of a report, executed side by side in kernels that start in a moment: forks of a process in which everything is imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from multiprocessing import get_all_start_methods, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Lock
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from agrivision_repro.core import exit_with_parent, fork_server

_PRELOAD = ["agrivision_repro.runs.local", "ipykernel.kernelapp", "agrivision_repro.study.claims", "agrivision_repro.study.section7_trained"]
_PRELOAD += ["agrivision_repro.study.figures", "agrivision_repro.study.class_tables", "agrivision_repro.report.render"]
_INLINE = "module://matplotlib_inline.backend_inline"
_LAUNCHER = "ipykernel_launcher"
_alive: set[BaseProcess] = set()  # kernels
_changing, _is_stopping = Lock(), Event()


class _Forked:
    "A process with those methods of `subprocess.Popen` that a provisioner calls."

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess):
        self.process, self.pid = process, process.pid
        self.terminate, self.kill = process.terminate, process.kill

    def poll(self) -> int | None:  # None: it runs
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        if self.process.is_alive():
            os.kill(self.pid, signum)


def _serve(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    "Be a kernel, with stderr discarded: it holds only the kernel's warnings."
    import matplotlib
    from ipykernel.kernelapp import launch_new_instance

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    matplotlib.rcParams["backend"] = environment.get("MPLBACKEND", _INLINE)  # else read when matplotlib is imported
    set_start_method(None, force=True)  # the system's; else that of this process, and pools in a notebook would start a fork server
    exit_with_parent()
    launch_new_instance(argv=arguments, parent_handle=os.getppid())


class ForkProvisioner(LocalProvisioner):
    "Start IPython kernels of this Python by a fork, and all others as jupyter_client does."

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        if cmd[0] != sys.executable or _LAUNCHER not in cmd:
            return await super().launch_kernel(cmd, **kwargs)
        arguments, self.cwd = cmd[cmd.index(_LAUNCHER) + 1 :], kwargs.get("cwd") or os.getcwd()
        process = fork_server().Process(target=_serve, args=(arguments, dict(kwargs["env"]), str(self.cwd)))
        with _changing:
            if _is_stopping.is_set():
                raise RuntimeError("no kernel is started: the notebooks have been stopped")
            process.start()
            _alive.add(process)
        self.process, self.pid = _Forked(process), process.pid
        return self.connection_info


def start_server() -> None:
    "Start this process's fork server, where the system has one; it imports what runs and notebooks need."
    if "forkserver" in get_all_start_methods():
        from multiprocessing.forkserver import ensure_running

        fork_server(*_PRELOAD)
        ensure_running()


@contextmanager
def forked_kernels() -> Iterator[None]:
    "Let jupyter_client start kernels by `ForkProvisioner` within the block, where the system has a fork server."
    start_server()
    _is_stopping.clear()
    factory = KernelProvisionerFactory.instance()
    before = factory.default_provisioner_name
    factory.provisioners["fork"] = EntryPoint("fork", f"{__name__}:ForkProvisioner", factory.GROUP_NAME)
    factory.default_provisioner_name = "fork" if "forkserver" in get_all_start_methods() else before
    try:
        yield
    finally:
        factory.default_provisioner_name = before


@contextmanager
def kernel_pool(n_at_once: int) -> Iterator[ThreadPoolExecutor]:
    "Yield threads for `execute`; after an error or a signal, neither they nor their kernels go on."
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # errors are returned by `execute`
    with forked_kernels(), ThreadPoolExecutor(n_at_once) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with _changing:
                _is_stopping.set()
                for process in _alive:
                    process.kill()
            raise
        finally:
            _alive.clear()


_STARTS = 3  # attempts; a port that was free when it was chosen can be taken when the kernel opens it, and the kernel exits


def execute(
    notebook: Path,  # executed in place, in its folder
    parameters: dict,
) -> str:  # error message; "": none
    "Execute a notebook with papermill."
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    folder = str(notebook.parent.resolve())  # of the kernel; papermill's `cwd` would move this whole process, with all of its threads
    options = {"kernel_name": "python3", "resources": {"metadata": {"path": folder}}, "progress_bar": False}
    error = ""
    for _ in range(_STARTS):
        try:
            execute_notebook(str(notebook), str(notebook), parameters, **options)
        except PapermillExecutionError as failure:
            return " ".join(f"{failure.ename}: {failure.evalue}".split())
        except DeadKernelError:
            return "its kernel died; too little memory?"
        except RuntimeError as failure:  # of jupyter_client, before the first cell
            error = f"no kernel started in {_STARTS} attempts: {failure}"
        else:
            return ""
    return error
