"""Runs on a Ray cluster: one run per device, retried when a machine is lost."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from tqdm import tqdm

from agrivision_repro.core import Stopped
from agrivision_repro.runs.plan import PAPERS_DATA, gmacs_of, kind_of
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace


class Interrupted(RuntimeError):
    "A signal stopped a worker; its Run's state is saved, and can be resumed elsewhere."


_ALONE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def train_one(
    run: Run,
    places: dict,  # arguments of `Workspace`
    save_every: int,  # iterations between states
    n_threads: int,
    trackers: Sequence = (),  # Accelerate's
) -> None:
    "Train a Run in a process of its own."
    for name in _ALONE:  # a worker is a single process, whatever launched its cluster
        os.environ.pop(name, None)
    torch.set_num_threads(n_threads)
    workspace = Workspace(**places)
    workspace.save_every, workspace.trackers = save_every, trackers
    try:
        workspace.result(run)
    except (Stopped, KeyboardInterrupt) as stop:
        raise Interrupted(f"stopped by {stop}; the same command resumes from its saved state") from stop


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


def _need_ray() -> ModuleType:
    "Import Ray; raise ValueError if it is not installed."
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'agrivision_repro[cluster]'") from error
    return ray


@contextmanager
def _join_ray(
    address: str,  # "auto": the cluster running on this machine; "local": start Ray on this machine; or HOST:PORT
    **options,  # for `ray.init`
) -> Iterator[ModuleType]:
    "Join a cluster, or start one on this machine and stop it at the end."
    ray = _need_ray()
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


@dataclass(frozen=True)
class Outcome:
    "The results of Runs, and the errors of those that failed."

    results: dict[Run, Result]  # finished ones
    failures: dict[Run, str]  # the others: the error, in one line


def train_on_ray(
    runs: Sequence[Run],
    workspace: Workspace,  # its folders are shared by all machines, under the same paths
    address: str = "auto",  # see `_join_ray`
    max_retries: int = 3,  # of a Run whose worker is lost
    **options,  # for `ray.init`
) -> Outcome:
    "Train Runs on the devices of a Ray cluster, each once; a failed Run does not stop the others."
    unique = list(dict.fromkeys(runs))
    _need_ray()  # before data is prepared
    for run in unique:  # prepared here, once, before the workers start
        workspace.open(run.data, run.farm, "train"), workspace.open(run.data, run.farm, "val")
    todo = sorted((run for run in unique if workspace.finished(run) is None), key=work_of, reverse=True)
    failures = {}
    if todo:
        with _join_ray(address, **options) as ray:
            failures = watch(ray, submit(ray, todo, workspace, max_retries))
    return outcome_of(unique, workspace, failures)


def outcome_of(runs: Sequence[Run], workspace: Workspace, failures: dict[Run, str]) -> Outcome:
    "Collect the results of finished Runs, and the errors of the others."
    results = {run: result for run in runs if (result := workspace.finished(run)) is not None}
    unseen = "it ended, but its folder is not visible here: pass an --out that all machines share"
    return Outcome(results, {run: failures.get(run, unseen) for run in runs if run not in results})


def work_of(run: Run) -> float:  # 10⁹ multiply-adds, forward
    "Estimate the work of a Run."
    side = run.recipe.crop or (run.farm.size if run.farm else PAPERS_DATA.side)
    return gmacs_of(kind_of(run), side) * run.recipe.iterations * run.recipe.batch_size


def submit(ray: ModuleType, runs: Sequence[Run], workspace: Workspace, max_retries: int) -> dict:  # reference → Run
    "Queue Runs on Ray."
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    n_gpus, n_cores = _share_of(machines, len(runs), wants_gpu=workspace.device != "cpu")
    n_threads = max(n_cores, 1)
    places = workspace.places()
    environment = {"OMP_NUM_THREADS": str(n_threads), "TQDM_MININTERVAL": "60"}  # one line per minute in a worker's log
    how = {"num_gpus": n_gpus, "num_cpus": n_cores, "runtime_env": {"env_vars": environment}}
    how |= {"max_retries": max_retries, "retry_exceptions": [Interrupted]}
    task = ray.remote(train_one)
    return {task.options(name=run.title, **how).remote(run, places, workspace.save_every, n_threads): run for run in runs}


def watch(ray: ModuleType, queued: dict) -> dict[Run, str]:  # failed Runs and their errors
    "Wait for queued Runs; on Ctrl-C, cancel them and let them save their states."
    failures, waiting = {}, list(queued)
    with tqdm(total=len(queued), unit="Run", dynamic_ncols=True, leave=False) as bar:
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


def in_one_line(error: BaseException, length: int = 300) -> str:
    "Format the type and message of an error in one line."
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= length else line[: length - 1] + "…"
