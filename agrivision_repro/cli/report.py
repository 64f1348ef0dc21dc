"""`agrivision report`: make the tables again from the logs of runs, without data, weights or training."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from agrivision_repro.cli.reproduce import need_notebooks, plan_tables, run_reports

NEEDS_WEIGHTS = "needs-weights"  # tag of notebook cells that cannot run from logs


def report(
    source: Annotated[Path, typer.Option("--from", help="Folder of results: NAME/about.json and NAME/logs for each data set.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="Folder for the tables: one folder per data set.")] = Path("out/from-logs"),
):
    "Make all tables again from the logs of runs, and compare them with those beside the logs."
    from agrivision_repro.report.results import list_results

    need_notebooks()
    names = list(list_results(source))
    if not names:
        raise ValueError(f"{source} contains no NAME/about.json: name a folder of results, such as results/ of the checkout")
    parts, lacking = zip(*(_prepare(name, source, out) for name in names), strict=True)
    failures = run_reports(list(parts), NEEDS_WEIGHTS)
    differences = [
        line
        for name, lines, failed in zip(names, lacking, failures, strict=True)
        for line in _compare_tables(name, source, out, lines + [f"{name}: {table} failed: {error}" for table, error in failed.items()])
    ]
    for line in differences:
        print(f"agrivision: {line}", file=sys.stderr)
    raise typer.Exit(1 if differences else 0)


def _prepare(name: str, source: Path, out: Path) -> tuple[tuple[dict, dict, Path], list[str]]:  # what `run_reports` takes; a line per missing log
    "Unpack the logs of one folder of results."
    from agrivision_repro.core import read_json
    from agrivision_repro.runs.logs import unpack_logs
    from agrivision_repro.runs.workspace import KNOWN, Workspace

    if (out / name).exists() and not (out / name / KNOWN).is_file():
        raise ValueError(f"{out / name} was not made from logs: name another --out")
    shutil.rmtree(out / name, ignore_errors=True)
    about, known = read_json(source / name / "about.json"), {folder.run(): folder for folder in unpack_logs(source / name / "logs", out / name)}
    workspace = Workspace(out / name, device="cpu")
    common = {"scale": about["scale"], "data": about["data"], "seeds": about["seeds"], **workspace.as_kwargs()}
    runs, parameters = plan_tables(about["tables"], common, [])
    missing = {table: [run.title for run in own if run not in known] for table, own in runs.items()}
    lacking = [f"{name}: {table} lacks the log of {', '.join(titles)}" for table, titles in missing.items() if titles]
    results = {table: workspace.results(own) for table, own in runs.items() if not missing[table]}
    return ({table: parameters[table] for table in results}, results, workspace.report), lacking


def _compare_tables(name: str, source: Path, out: Path, lines: list[str]) -> list[str]:  # with the differences
    "Compare the tables of one folder of results with those beside its logs, and print a line."
    made, kept = (sorted((folder / name / "tables").glob("*.csv")) for folder in (out, source))
    lines = lines + [f"{path} is not made again" for path in kept if not (out / name / "tables" / path.name).is_file()]
    lines += [f"{path}: {line}" for path in made for line in _compare(path, source / name / "tables" / path.name)]
    n = len(list((source / name / "logs").glob("*.json")))
    print(f"{name}: {n} logs, {len(made)} tables in {out / name / 'tables'}{'' if lines else ', equal to those beside the logs'}")
    return lines


def _compare(made: Path, kept: Path) -> list[str]:  # empty: equal
    "Compare two tables cell by cell, numbers to nine digits."
    import numpy as np
    import pandas as pd

    if not kept.is_file():
        return [f"{kept} does not exist"]
    a, b = pd.read_csv(made), pd.read_csv(kept)
    if list(a) != list(b) or len(a) != len(b):
        return [f"has {len(a)} rows of {', '.join(a)}; {kept} has {len(b)} of {', '.join(b)}"]
    lines = []
    for column in a:
        is_number = a[column].dtype.kind in "if" and b[column].dtype.kind in "if"
        equal = np.isclose(a[column], b[column], rtol=1e-9, atol=1e-9, equal_nan=True) if is_number else (a[column].fillna("").astype(str) == b[column].fillna("").astype(str)).to_numpy()
        lines += [f"row {k}, {column}: {a[column][k]}, was {b[column][k]}" for k in np.flatnonzero(~equal)[:3]]
    return lines
