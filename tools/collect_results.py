"""Collect what `agrivision reproduce` made into results/NAME, without data and weights.

usage: collect_results.py OUT NAME --data DATA [--scale laptop] [--seeds 0,1,2] [--data-root DIR] [--of "whole set"] [TABLE ...]

Writes tables (CSV), figures (PNG), the executed notebooks, a log of every run that the tables need, and about.json; and results/runs.csv,
the scores of all runs of all folders of results, and results/claims_matrix.csv and .png. `agrivision report --from results` makes the
tables again from the logs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd

from agrivision_repro.core import read_json, write_json
from agrivision_repro.data.editions import find_edition
from agrivision_repro.plots import shrink_outputs, shrink_png
from agrivision_repro.report.results import list_results
from agrivision_repro.runs.code import code_at
from agrivision_repro.runs.logs import read_logs, tidy_runs, write_log
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.matrix import claims_matrix, draw_matrix
from agrivision_repro.study.tables import ON_REQUEST, TABLES, check_seeds, table_of

N_COLORS = 64  # of pictures in results/


def tell_about(results: list[Result], args: argparse.Namespace, tables: list[str]) -> dict:
    "Return what a reader must know about a folder of results."
    records = [r.record for r in results]
    days = sorted(r["started"][:10] for r in records)
    asked = {"data": args.data, "scale": args.scale, "seeds": check_seeds(args.seeds), "tables": tables}
    tiles = {"tiles": args.of, **{key: records[0][key] for key in ("n_train", "n_val")}}
    made = {key: dict(Counter(r[key] for r in records)) for key in ("commit", "device", "precision")}
    versions = {name: dict(Counter(r["versions"][name] for r in records)) for name in ("torch", "timm", "numpy")}
    hours = round(sum(r["seconds"] for r in records) / 3600, 2)
    code = {commit: code_at(commit) for commit in made["commit"]}
    took = {"runs": len(results), "hours of the runs": hours, "trained": [days[0], days[-1]]}
    return asked | tiles | took | made | versions | {"code": code}


def keep_verified(about: dict, known: dict) -> dict:
    "Return `about` with the code that made the same runs again, as `verify_results.py` noted it."
    return about | {key: known[key] for key in ("code", "verified") if "verified" in known}


def read_files(folder: Path) -> dict[str, bytes]:
    "Return the content of the files of a folder by name."
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def copy_products(out: Path, folder: Path, tables: list[str], data_root: str) -> None:
    "Copy the tables, figures and notebooks of the report; paths of this machine are replaced."
    paths = {str(out.resolve()): f"out/{folder.name}", str(Path(data_root).resolve()) if data_root else "": folder.name}
    for kind, ending in (("tables", "csv"), ("figures", "png"), ("notebooks", "ipynb")):
        shutil.rmtree(folder / kind, ignore_errors=True)
        for path in sorted((out / kind).glob(f"*.{ending}")):
            if table_of(path.stem) in tables:
                (folder / kind).mkdir(parents=True, exist_ok=True)
                copied = shutil.copyfile(path, folder / kind / path.name)
                if ending == "csv":
                    pd.read_csv(path, keep_default_na=False, na_values=[""]).to_csv(copied, index=False, float_format="%.10g")
                if ending == "ipynb":
                    clean_notebook(copied, paths)
                if ending == "png":
                    copied.write_bytes(shrink_png(copied.read_bytes(), N_COLORS))


def clean_notebook(notebook: Path, paths: dict[str, str]) -> None:
    "Replace paths in an executed notebook, remove those that papermill noted, and shrink its pictures."
    text = notebook.read_text()
    for path, name in paths.items():
        text = text.replace(path, name) if path else text
    content = json.loads(text)
    for key in ("input_path", "output_path"):
        content["metadata"].get("papermill", {}).pop(key, None)
    shrink_outputs(content["cells"], N_COLORS)
    notebook.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out"), parser.add_argument("name"), parser.add_argument("tables", nargs="*", metavar="TABLE")
    parser.add_argument("--data", required=True), parser.add_argument("--scale", default="laptop")
    parser.add_argument("--seeds", default="0,1,2"), parser.add_argument("--data-root", default="")
    parser.add_argument("--of", default="whole set", help="which part of the data set")
    parser.add_argument("--report", default="", help="folder of tables, figures and notebooks, if not OUT")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent.parent / "results")
    args = parser.parse_args()
    workspace, folder = Workspace(args.out, args.data_root, "cpu"), args.results / args.name
    made = {path.stem for path in (Path(args.report or args.out) / "tables").glob("*.csv")}
    tables = args.tables or [table for table, plan in TABLES.items() if plan() and (table not in ON_REQUEST or table in made)]
    runs = dict.fromkeys(run for table in tables for run in TABLES[table](args.scale, args.data, args.seeds))
    results = [result for run in runs if (result := workspace.finished(run)) is not None]
    if len(results) < len(runs):
        raise SystemExit(f"{len(runs) - len(results)} of {len(runs)} runs are not finished in {args.out}")
    logs = read_files(folder / "logs")
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for result in results:
        write_log(result, workspace, folder / "logs")
    copy_products(Path(args.report or args.out), folder, tables, args.data_root)
    about, path = tell_about(results, args, tables), folder / "about.json"
    write_json(path, keep_verified(about, read_json(path)) if logs and logs == read_files(folder / "logs") else about)
    print(f"{folder}: {len(results)} runs; {args.results / 'runs.csv'}: {write_runs(args.results)} rows")
    write_matrix(args.results)


def write_matrix(folder: Path) -> None:
    "Write and draw the verdicts on every claim, one column per data set that has them."
    if paths := sorted(folder.glob("*/tables/claims.csv")):
        matrix = claims_matrix(pd.read_csv(paths[0]), [path.parents[1] for path in paths[1:]])
        matrix.to_csv(folder / "claims_matrix.csv")
        draw_matrix(matrix).savefig(folder / "claims_matrix.png")


def write_runs(folder: Path) -> int:  # rows
    "Write the scores of all runs of all results as one table."
    about = list_results(folder)
    classes = {name: find_edition(own["data"]).classes for name, own in about.items()}
    logs = {name: read_logs(folder / name / "logs") for name in about}
    table = tidy_runs(logs, {name: own["scale"] for name, own in about.items()}, classes)
    table.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    return len(table)


if __name__ == "__main__":
    main()
