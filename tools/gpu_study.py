"""Train Figure 2's nets on one GPU, several at a time, on a machine that has only a checkout, PyTorch and the package's libraries.

usage: gpu_study.py RECORD DATA=ROOT [DATA=ROOT ...] [--scale workstation] [--seeds 0] [--at-once 8] [--device auto] [--out DIR]

Where notebooks can run, `agrivision reproduce --scale workstation` does the same and more. Writes into the folder RECORD, for each data
set: runs.json (recipe, scores, seconds, machine), the divergence per layer and Table 1 as CSV, Figure 2 as PNG, and the files of the
runs without their weights. Finished runs are not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from agrivision_repro.core import fork_server
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.figures import draw_figure2, figure2_medians, figure2_scores, run_divergence, run_switch_weights
from agrivision_repro.study.modality import modality_scores
from agrivision_repro.study.section7 import run_section7
from agrivision_repro.study.tables import fig2


def train_and_measure(run: Run, kwargs: dict, n_threads: int) -> str:
    "Train a Run, measure its divergence and score it in every arm of section 7, in a process of its own; return an error in one line."
    torch.set_num_threads(n_threads)
    try:
        workspace = Workspace(**kwargs)
        result = workspace.result(run)
        run_divergence(result, workspace)
        run_section7(result, workspace)
        if run.norm == "ibn_s":
            run_switch_weights(result)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def describe(result: Result) -> dict:
    "Return what stands behind the numbers of a Run."
    keys = ("commit", "versions", "device", "precision", "speed", "seconds", "started", "n_train", "n_val")
    own = {"id": result.folder.name, "title": result.run.title, **{k: result.record[k] for k in keys}}
    return own | {"recipe": result.record["run"]["recipe"], "scores": result.scores}


def record(results: list[Result], workspace: Workspace, folder: Path, seconds: float) -> None:
    "Write tables, figure and the files of the runs without weights."
    folder.mkdir(parents=True, exist_ok=True)
    scores = figure2_scores(results, workspace)
    scores.round(6).to_csv(folder / "fig2_layers.csv", index=False)
    figure2_medians(scores).round(4).to_csv(folder / "fig2_medians.csv", index=False)
    modality_scores([r for r in results if r.run.norm == "bn"]).round(3).to_csv(folder / "table1.csv", index=False)
    draw_figure2(scores).savefig(folder / "fig2.png", dpi=110)
    (folder / "runs.json").write_text(json.dumps({"seconds": round(seconds), "runs": list(map(describe, results))}, indent=1) + "\n")
    without = shutil.ignore_patterns("*.safetensors", "state", ".lock")
    for result in results:
        shutil.copytree(result.folder.path, folder / "runs" / result.folder.name, ignore=without, dirs_exist_ok=True)
    print(figure2_medians(scores).round(3).to_string(), flush=True)
    for result in results:
        print(result.run.title, {c: {m: round(100 * s["mean"], 1) for m, s in own.items()} for c, own in result.scores.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path), parser.add_argument("data", nargs="+", help="DATA=ROOT")
    parser.add_argument("--scale", default="workstation"), parser.add_argument("--seeds", default="0")
    parser.add_argument("--at-once", type=int, default=8), parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="out/gpu-study")
    args = parser.parse_args()
    began, work = time.monotonic(), {}
    for words in args.data:
        data, _, root = words.partition("=")
        workspace = Workspace(Path(args.out) / data, root, args.device)
        runs = fig2(args.scale, data, args.seeds)
        workspace.left_out(runs[0])  # packs the tiles once, before the processes start
        work[data] = runs, workspace
    jobs = [(run, w.as_kwargs(), 2) for runs, w in work.values() for run in runs]
    with ProcessPoolExecutor(args.at_once, fork_server("__main__")) as pool:
        for (run, *_), error in zip(jobs, pool.map(train_and_measure, *zip(*jobs, strict=True)), strict=True):
            print(f"{time.monotonic() - began:4.0f} s {run.source.name}, {run.title}: {error or 'done'}", flush=True)
    for data, (runs, workspace) in work.items():
        record(workspace.results(runs), workspace, args.record / data, time.monotonic() - began)


if __name__ == "__main__":
    main()
