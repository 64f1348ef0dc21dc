"""Collect what `agrivision reproduce` made into results/NAME, without data and weights.

usage: collect_results.py OUT NAME --data DATA [--scale laptop] [--seeds 0,1,2] [--data-root DIR] [--of "whole set"] [TABLE ...]

Writes tables (CSV), figures (PNG), the executed notebooks, a log of every run that the tables need, and about.json; and results/runs.csv,
the scores of all runs of all folders of results. `agrivision report --from results` makes the tables again from the logs.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from pathlib import Path

from agrivision_repro.core import read_json, write_json
from agrivision_repro.data.editions import find_edition
from agrivision_repro.runs.logs import read_logs, tidy_runs, write_log
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.tables import TABLES, check_seeds

ROOT = Path(__file__).resolve().parent.parent / "results"


def tell_about(results: list[Result], args: argparse.Namespace, tables: list[str]) -> dict:
    "Return what a reader must know about a folder of results."
    records = [r.record for r in results]
    commits, devices, torches = (Counter(map(key, records)) for key in (lambda r: r["commit"], lambda r: r["device"], lambda r: r["versions"]["torch"]))
    return {
        "data": args.data, "scale": args.scale, "seeds": check_seeds(args.seeds), "tiles": args.of, "tables": tables, "runs": len(results),
        "trained": [min(r["started"] for r in records)[:10], max(r["started"] for r in records)[:10]],
        "hours": round(sum(r["seconds"] for r in records) / 3600, 2), "commits": dict(commits), "devices": dict(devices), "torch": dict(torches),
        "n_train": records[0]["n_train"], "n_val": records[0]["n_val"],
    }  # fmt: skip


def copy_products(out: Path, folder: Path, tables: list[str]) -> None:
    "Copy the tables, figures and notebooks of the report."
    for kind, ending in (("tables", "csv"), ("figures", "png"), ("notebooks", "ipynb")):
        shutil.rmtree(folder / kind, ignore_errors=True)
        for path in sorted((out / kind).glob(f"*.{ending}")):
            if any(path.stem == name or path.stem.startswith((f"{name}-", f"{name}_")) for name in tables):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / kind / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out"), parser.add_argument("name"), parser.add_argument("tables", nargs="*", metavar="TABLE")
    parser.add_argument("--data", required=True), parser.add_argument("--scale", default="laptop")
    parser.add_argument("--seeds", default="0,1,2"), parser.add_argument("--data-root", default="")
    parser.add_argument("--of", default="whole set", help="which part of the data set")
    args = parser.parse_args()
    workspace, folder, tables = Workspace(args.out, args.data_root, "cpu"), ROOT / args.name, args.tables or list(TABLES)
    runs = dict.fromkeys(run for table in tables for run in (TABLES[table](args.scale, args.data, args.seeds) if TABLES[table]() else []))
    results = [result for run in runs if (result := workspace.finished(run)) is not None]
    if len(results) < len(runs):
        raise SystemExit(f"{len(runs) - len(results)} of {len(runs)} runs are not finished in {args.out}")
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for result in results:
        write_log(result, workspace, folder / "logs")
    copy_products(Path(args.out), folder, tables)
    write_json(folder / "about.json", tell_about(results, args, tables))
    names = sorted(path.parent.name for path in ROOT.glob("*/about.json"))
    about = {name: read_json(ROOT / name / "about.json") for name in names}
    classes = {name: find_edition(about[name]["data"]).classes for name in names}
    table = tidy_runs({name: read_logs(ROOT / name / "logs") for name in names}, {name: about[name]["scale"] for name in names}, classes)
    table.to_csv(ROOT / "runs.csv", index=False, float_format="%.6g")
    print(f"{folder}: {len(results)} runs; {ROOT / 'runs.csv'}: {len(table)} rows")


if __name__ == "__main__":
    main()
