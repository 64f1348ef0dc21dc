"""Keep the verdicts of a study that was trained again on another machine beside those of results/: results/replicated.csv.

usage: keep_replication.py OUT NAME --machine WORDS [--results DIR]     OUT: the folder of the finished study; NAME: the folder of results/

Rows of the same name and machine are replaced. Weights, scores and pictures of OUT are not kept.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from agrivision_repro.runs.store import run_folders

COLUMNS = ["key", "measured", "interval", "verdict", "holm"]


def read_study(out: Path, name: str, machine: str) -> pd.DataFrame:  # a row per claim
    "Read the verdicts of a finished study, with the machine's words and what its runs recorded."
    records = [folder.record() for folder in run_folders(out) if (folder.path / "scores.json").is_file()]
    made = {key: " ".join(sorted({str(record[key])[:10] for record in records})) for key in ("precision", "commit")}
    claims = pd.read_csv(out / "tables" / "claims.csv", keep_default_na=False)
    return claims[COLUMNS].assign(name=name, machine=machine, **made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path), parser.add_argument("name"), parser.add_argument("--machine", required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    args = parser.parse_args()
    path = args.results / "replicated.csv"
    rows = read_study(args.out, args.name, args.machine)
    if unknown := set(rows.key) ^ set(pd.read_csv(args.results / args.name / "tables" / "claims.csv").key):
        sys.exit(f"{args.out} judges other claims than results/{args.name}: {', '.join(sorted(unknown))}")
    old = pd.read_csv(path, keep_default_na=False) if path.is_file() else rows[:0]
    kept = old[(old["name"] != args.name) | (old["machine"] != args.machine)]
    pd.concat([kept, rows]).to_csv(path, index=False)
    print(f"{len(rows)} verdicts kept in {path}")
