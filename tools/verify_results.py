"""Train some runs of results again with the code as it is, and note in about.json whether their scores are equal to the last digit.

usage: verify_results.py NAME [--data-root DIR] [--norms bn,ibn_s]     one run per norm: the first seed, on RGB if there is one
"""

from __future__ import annotations

import argparse
import re
import tempfile
from datetime import date
from pathlib import Path

import torch

from agrivision_repro.core import read_json, write_json
from agrivision_repro.runs.code import code_now
from agrivision_repro.runs.logs import read_logs, unpack_logs
from agrivision_repro.runs.store import git
from agrivision_repro.runs.workspace import Workspace


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
        for norm in args.norms.split(","):
            own = {name: run for name, run in runs.items() if (run.norm, run.seed) == (norm, about["seeds"][0])}
            name, run = min(own.items(), key=lambda item: (item[1].channels != "rgb", item[0]))
            threads = re.search(r"(\d+) thread", logs[name]["record"]["device"])  # another number rounds differently
            torch.set_num_threads(int(threads[1]) if threads else torch.get_num_threads())
            equal[name] = workspace.result(run).checkpoints == logs[name]["checkpoints"]
            print(f"{run.title}: {'equal' if equal[name] else 'other scores'}")
    about["verified"] = {"day": date.today().isoformat(), "commit": git("rev-parse", "HEAD"), "equal": equal}
    if all(equal.values()):
        about["code"] = {git("rev-parse", "HEAD"): code_now()}
    write_json(folder / "about.json", about)


if __name__ == "__main__":
    main()
