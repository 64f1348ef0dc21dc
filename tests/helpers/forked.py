"""Programs of this Python as forks of a process that has imported the package: a start takes a tenth of a second, not several.

What a test starts thus is a process as any other, with its own arguments, environment, folder, files and signals, but for the imports;
cold starts have tests of their own (`test_setup`, `test_repository`, the first of `test_command`).
"""

import fcntl
import gc
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path

import torch

from agrivision_repro.core import fork_server

AGRIVISION = Path(sys.executable).parent / "agrivision"
_PRELOAD = ["agrivision_repro.cli.app", "agrivision_repro.report.pages", "agrivision_repro.report.kernels", "agrivision_repro.runs.launch"]
_PRELOAD += ["agrivision_repro.study.claims", "agrivision_repro.study.section7_trained", "agrivision_repro.runs.local", "papermill"]
SERVER = fork_server(*_PRELOAD)  # a context of multiprocessing; each pytest process starts its server when it is first used


def _keep_spare() -> None:
    "Fork a process that becomes this program's fork server if it starts one: that server need not import everything again."
    asking, asked = socket.socketpair()
    pid = os.fork()
    if not pid:
        asking.close()
        try:
            _serve_when_asked(asked)
        finally:
            os._exit(0)
    asked.close()
    start_cold = util.spawnv_passfds

    def start(path: str, arguments: list[str], handles: list[int]) -> int:  # process id
        if "multiprocessing.forkserver" not in arguments[-1]:
            return start_cold(path, arguments, handles)
        util.spawnv_passfds = start_cold
        socket.send_fds(asking, [pickle.dumps((arguments[-1], handles, os.getcwd(), dict(os.environ)))], handles)
        asking.shutdown(socket.SHUT_WR)
        return pid

    util.spawnv_passfds = start


def _serve_when_asked(asked: socket.socket) -> None:
    "Wait until the program starts its fork server, and be it; return if the program ends before."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    message, received, *_ = socket.recv_fds(asked, 1 << 16, 4)
    while more := asked.recv(1 << 16):
        message += more
    asked.close()
    if message:
        command, handles, folder, environment = pickle.loads(message)
        above = [fcntl.fcntl(handle, fcntl.F_DUPFD, 200) for handle in received]
        for handle, number in zip(above, handles, strict=True):
            os.dup2(handle, number)
            os.close(handle)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        signal.signal(signal.SIGINT, before)
        exec(command, {"__name__": "__main__"})


def _become(words: list[str], environment: dict[str, str], folder: str, files: list[str]) -> None:
    "Be the program: a script with its arguments, or Python's `-c` or `-m`."
    gc.freeze()  # garbage is not sought among what was imported before the fork
    gc.set_threshold(10_000)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    multiprocessing.set_start_method(None, force=True)  # the system's; else that of this process, a fork server
    _keep_spare()
    kind, *rest = words[1:] if words[0] == sys.executable else words
    sys.argv = [kind, *rest]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


class Forked:
    "A started program with the methods of `subprocess.Popen`; what it prints is kept in files until it has ended."

    def __init__(self, *words, env: dict[str, str] | None = None, cwd: str | Path | None = None):
        self.args, self.files = list(map(str, words)), [tempfile.NamedTemporaryFile() for _ in range(2)]
        given = self.args, dict(env or os.environ), str(cwd or os.getcwd()), [file.name for file in self.files]
        self.process = SERVER.Process(target=_become, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        printed, errors = (Path(file.name).read_text() for file in self.files)
        return printed, errors

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*words, **options) -> subprocess.CompletedProcess:
    "Run a program to its end, as `subprocess.run` with captured text."
    program = Forked(*words, **options)
    printed, errors = program.communicate()
    return subprocess.CompletedProcess(program.args, program.returncode, printed, errors)


def agrivision(*words, **options) -> subprocess.CompletedProcess:
    "Run the command as a user does."
    return run(AGRIVISION, *words, **options)


def wait_until(is_true: Callable[[], object], seconds: float = 60) -> None:
    "Wait for a condition, and fail if it does not come true."
    until = time.monotonic() + seconds
    while not (found := is_true()) and time.monotonic() < until:
        time.sleep(0.01)
    assert found


def run_in_parts(n_processes: int, *words) -> None:
    "Run a program in processes that find each other as those that torchrun starts; they must end well."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    where |= {"WORLD_SIZE": str(n_processes), "LOCAL_WORLD_SIZE": str(n_processes)} if n_processes > 1 else {}
    own = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | where
    ranks = [{"RANK": str(k), "LOCAL_RANK": str(k)} if n_processes > 1 else {} for k in range(n_processes)]
    programs = [Forked(*words, env=own | rank) for rank in ranks]
    for program in programs:
        _, errors = program.communicate(300)
        assert program.returncode == 0, errors[-6000:]
