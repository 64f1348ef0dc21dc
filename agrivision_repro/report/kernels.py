"""Kernels for the notebooks of a report that start in a moment: forked from a process in which everything is imported."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.process import BaseProcess
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from agrivision_repro.core import exit_with_parent

_PRELOAD = ["ipykernel.kernelapp", "matplotlib.pyplot", "agrivision_repro.study.claims", "agrivision_repro.study.section7_trained"]
_PRELOAD += ["agrivision_repro.study.figures", "agrivision_repro.study.class_tables", "agrivision_repro.report.render"]
_INLINE = "module://matplotlib_inline.backend_inline"
_LAUNCHER = "ipykernel_launcher"


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
    "Be a kernel."
    from ipykernel.kernelapp import launch_new_instance

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    exit_with_parent()
    launch_new_instance(argv=arguments, parent_handle=os.getppid())


class ForkProvisioner(LocalProvisioner):
    "Start IPython kernels of this Python by a fork, and all others as jupyter_client does."

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        if cmd[0] != sys.executable or _LAUNCHER not in cmd:
            return await super().launch_kernel(cmd, **kwargs)
        context: Any = get_context("forkserver")
        arguments, self.cwd = cmd[cmd.index(_LAUNCHER) + 1 :], kwargs.get("cwd") or os.getcwd()
        process = context.Process(target=_serve, args=(arguments, dict(kwargs["env"]), str(self.cwd)))
        process.start()
        self.process, self.pid = _Forked(process), process.pid
        return self.connection_info


def fork_kernels() -> None:
    "Let jupyter_client in this process start kernels by `ForkProvisioner`, where the system has a fork server."
    if "forkserver" not in get_all_start_methods():
        return
    os.environ.setdefault("MPLBACKEND", _INLINE)  # before matplotlib is imported
    context: Any = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    factory = KernelProvisionerFactory.instance()
    factory.provisioners["fork"] = EntryPoint("fork", f"{__name__}:ForkProvisioner", factory.GROUP_NAME)
    factory.default_provisioner_name = "fork"
