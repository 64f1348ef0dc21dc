"""Runs on a Ray cluster: one run per device, retried when a machine is lost."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from tqdm import tqdm

from agrivision_repro.core import how_to_install, notes_stream
from agrivision_repro.runs.jobs import Interrupted, in_one_line, train_one
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.workspace import Workspace


def _share_of(
    machines: Sequence[dict[str, float]],  # resources of each: CPU, GPU
    n_runs: int,
    wants_gpu: bool = True,
) -> tuple[int, int]:  # GPUs and cores of one Run
    "Compute the share of one Run in the devices of a cluster."
    with_gpu = [m for m in machines if m.get("GPU", 0) >= 1]
    if wants_gpu and with_gpu:
        return 1, int(min(m.get("CPU", 0) // m["GPU"] for m in with_gpu))
    cores = [int(m["CPU"]) for m in machines if m.get("CPU", 0) >= 1]
    return 0, max(1, min(sum(cores) // n_runs, *cores, sum(cores)))


def need_ray() -> ModuleType:
    "Import Ray; raise ValueError if it is not installed."
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"Ray is not installed: {how_to_install('cluster')}") from error
    return ray


@contextmanager
def _join_ray(
    address: str,  # "auto": the cluster running on this machine; "local": start Ray on this machine; or HOST:PORT
    **options,  # for `ray.init`
) -> Iterator[ModuleType]:
    "Join a cluster, or start one on this machine and stop it at the end."
    ray = need_ray()
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
    if address == "local":
        options = {"include_dashboard": False} | options
    try:
        _find_listener(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no Ray at {address!r} ({error}): start it with `ray start --head`, or use --ray local") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _find_listener(address: str, seconds: float = 10.0) -> None:
    "Check that a server listens at HOST:PORT; raise OSError at once if not, where Ray would wait many minutes."
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=seconds).close()


def train_on_ray(
    runs: Sequence[Run],
    workspace: Workspace,
    address: str = "auto",  # "auto": the running cluster; "local": start one here; HOST:PORT
    max_retries: int = 3,  # of a Run whose worker is lost
    **options,  # for `ray.init`
) -> dict[Run, str]:  # failed Runs and their errors
    "Train Runs on the devices of a Ray cluster."
    with _join_ray(address, **options) as ray:
        return _watch(ray, _submit(ray, runs, workspace, max_retries))


def _submit(ray: ModuleType, runs: Sequence[Run], workspace: Workspace, max_retries: int) -> dict:  # reference → Run
    "Queue Runs on Ray."
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    n_gpus, n_cores = _share_of(machines, len(runs), wants_gpu=workspace.device != "cpu")
    n_threads = max(n_cores, 1)
    environment = {"OMP_NUM_THREADS": str(n_threads), "TQDM_MININTERVAL": "60"}  # one line per minute in a worker's log
    how = {"num_gpus": n_gpus, "num_cpus": n_cores, "runtime_env": {"env_vars": environment}}
    how |= {"max_retries": max_retries, "retry_exceptions": [Interrupted]}
    task = ray.remote(train_one)
    return {task.options(name=run.title, **how).remote(run, workspace.as_kwargs(), n_threads): run for run in runs}


def _watch(ray: ModuleType, queued: dict) -> dict[Run, str]:  # failed Runs and their errors
    "Wait for queued Runs; on Ctrl-C, cancel them and let them save their states."
    failures, waiting = {}, list(queued)
    with tqdm(total=len(queued), unit="Run", dynamic_ncols=True, leave=False, file=notes_stream()) as bar:
        try:
            while waiting:
                ended, waiting = ray.wait(waiting, timeout=1)
                for reference in ended:
                    try:
                        ray.get(reference)
                    except ray.exceptions.RayError as error:
                        failures[queued[reference]] = in_one_line(getattr(error, "cause", None) or error)
                    bar.update()
                    bar.set_postfix(failed=len(failures))
        except KeyboardInterrupt:
            for reference in waiting:
                ray.cancel(reference)
            ray.wait(waiting, num_returns=len(waiting), timeout=60)
            raise
    return failures
