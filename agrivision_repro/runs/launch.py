"""Many runs, each trained once: sequentially on a GPU, several in parallel on the cores of a CPU, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agrivision_repro.core import check_choice
from agrivision_repro.runs import cluster, local
from agrivision_repro.runs.jobs import work_of
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace

BACKENDS = ("auto", "one by one", "side by side", "ray")


@dataclass(frozen=True)
class Outcome:
    "The results of Runs, and the errors of those that failed."

    results: dict[Run, Result]  # finished ones
    failures: dict[Run, str]  # the others: the error, in one line


def launch(
    runs: Sequence[Run],
    workspace: Workspace,  # for Ray, its folders are shared by all machines, under the same paths
    backend: str = "auto",  # one of `BACKENDS`; "auto": one by one on a GPU, side by side on a CPU
    at_once: int = 0,  # Runs on this machine at the same time; 0: chosen by the backend
    **options,  # for Ray: see `cluster.train_on_ray`
) -> Outcome:
    "Train Runs, each once; a failed Run does not stop the others."
    check_choice("backend", backend, BACKENDS)
    if backend == "ray":
        cluster.need_ray()  # before data is prepared
    unique = list(dict.fromkeys(runs))
    for run in unique:  # prepared once, before workers start; damaged files are detected before training
        workspace.open(run.source, "train"), workspace.open(run.source, "val")
    todo = sorted((run for run in unique if workspace.finished(run) is None), key=work_of, reverse=True)
    failures: dict[Run, str] = {}
    if todo and backend == "ray":
        failures = cluster.train_on_ray(todo, workspace, **options)
    elif todo:
        failures = local.train_here(todo, workspace, backend, at_once)
    results = {run: result for run in unique if (result := workspace.finished(run)) is not None}
    unseen = "it ended, but its folder is not visible here: pass an --out that all machines share"
    return Outcome(results, {run: failures.get(run, unseen) for run in unique if run not in results})
