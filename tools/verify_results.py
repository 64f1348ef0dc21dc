"""Train some runs of results again with the code as it is, and note in about.json whether their scores are equal to the last digit.

usage: verify_results.py NAME [--data-root DIR] [--norms bn,ibn_s]     one run per commit of the results and norm: as in the paper's tables,
                                                                       of the first seed and on RGB if there is one
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

from agrivision_repro.core import read_json, write_json
from agrivision_repro.runs.code import code_at, code_now
from agrivision_repro.runs.logs import read_logs, unpack_logs
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.store import git
from agrivision_repro.runs.workspace import Workspace


def choose(runs: Mapping[str, Run], logs: Mapping[str, dict], norms: list[str]) -> dict[str, Run]:
    "Choose one run per commit and norm; any norm if a commit has none of them."
    chosen: dict[tuple[str, str], str] = {}

    def rank(item: tuple[str, Run]) -> tuple:
        name, run = item
        return run.norm not in norms, bool(run.intervention), run.seed, run.channels != "rgb", name

    for name, run in sorted(runs.items(), key=rank):
        commit = logs[name]["record"]["commit"]
        if run.norm in norms or commit not in {known for known, _ in chosen}:
            chosen.setdefault((commit, run.norm), name)
    return {name: runs[name] for name in chosen.values()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name"), parser.add_argument("--data-root", default=""), parser.add_argument("--norms", default="bn,ibn_s")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent.parent / "results")
    args = parser.parse_args()
    folder, equal = args.results / args.name, {}
    about, logs = read_json(folder / "about.json"), {log["id"]: log for log in read_logs(folder / "logs")}
    with tempfile.TemporaryDirectory() as place:
        workspace = Workspace(Path(place) / "again", args.data_root, "cpu")
        runs = {own.name: own.run() for own in unpack_logs(folder / "logs", Path(place) / "logs")}
        for name, run in choose(runs, logs, args.norms.split(",")).items():
            threads = re.search(r"(\d+) thread", logs[name]["record"]["device"])  # another number rounds differently
            torch.set_num_threads(int(threads[1]) if threads else torch.get_num_threads())
            equal[name] = workspace.result(run).checkpoints == logs[name]["checkpoints"]
            print(f"{run.title}: {'equal' if equal[name] else 'other scores'}", flush=True)
    head = git("rev-parse", "HEAD") + (" + changes" if git("status", "--porcelain", "agrivision_repro") else "")
    about["verified"] = {"day": date.today().isoformat(), "commit": head, "equal": equal}
    if all(equal.values()):
        repeated = {logs[name]["record"]["commit"] for name in equal}
        about["code"] = {head: code_now()} | {commit: code_at(commit) for commit in about["commit"] if commit not in repeated}
    write_json(folder / "about.json", about)


if __name__ == "__main__":
    main()
