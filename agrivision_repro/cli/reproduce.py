"""`agrivision reproduce` and `agrivision plan`."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sys
from concurrent.futures import as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from agrivision_repro.cli.options import DataRoot, Device, Out, Precision, RunData, ScaleName, read_parameters


_FOLDERS = ("out", "data_root", "report")  # parameters of notebooks that do not change what they show


def need_notebooks() -> None:
    "Raise ValueError if a package needed to run notebooks is not installed."
    from agrivision_repro.core import how_to_install

    missing = [name for name in ("papermill", "ipykernel", "nbconvert", "latex2mathml") if find_spec(name) is None]
    if missing:
        raise ValueError(f"notebooks need {', '.join(missing)}: {how_to_install('notebooks')}")


def _notebook_parameters(
    name: str,  # of a table
) -> dict:  # name → default
    "List the parameters of a table notebook."
    from agrivision_repro.study.tables import table_notebook

    cells = json.loads(table_notebook(name).read_text(encoding="utf-8"))["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body if isinstance(line, ast.AnnAssign)}


def _inputs_hash(
    name: str,  # of a table
    parameters: dict,
    results: list,  # that it uses
) -> str:  # hexadecimal digits
    "Hash a notebook's inputs: its file, its parameters, its runs' results and this package."
    import agrivision_repro
    from agrivision_repro.study.tables import table_notebook

    files = [table_notebook(name), *sorted(Path(agrivision_repro.__file__).parent.rglob("*.py"))]
    files += [path for r in results for path in (r.folder.scores_file, r.folder.record_file)]
    files += [p for folder in parameters.get("others", ()) if (p := Path(folder) / "tables" / "claims.csv").is_file()]
    told = {k: v for k, v in parameters.items() if k not in _FOLDERS}  # paths do not matter
    content = [json.dumps(told, sort_keys=True).encode(), *(path.read_bytes() for path in files)]
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def _read_metadata(name: str, report: Path, key: str) -> dict:  # empty: not executed yet
    "Return an entry of an executed notebook's metadata."
    try:
        return json.loads((report / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["metadata"][key]
    except (OSError, ValueError, KeyError):
        return {}


def _is_up_to_date(name: str, origin: str, report: Path) -> bool:
    "Return True if the executed notebook has the same inputs and all its output files exist."
    known = _read_metadata(name, report, "agrivision_repro")
    return known.get("made_of") == origin and all((report / file).is_file() for file in known["files"])


def _warn_of_replacing(parameters: dict[str, dict], report: Path) -> None:
    "Print a line if a report of other data or of another scale will be replaced."
    for name, own in parameters.items():
        before = _read_metadata(name, report, "papermill").get("parameters", {})
        if any(before.get(key, own.get(key)) != own.get(key) for key in ("data", "scale")):
            was = f"{before['data']} at scale {before['scale']}"
            print(f"agrivision: the report of {was} in {report} is replaced; with another --out, both are kept", file=sys.stderr)
            return


def _fresh(name: str, report: Path) -> Path:
    "Return the path of a table notebook while it is executed."
    return report / "notebooks" / f"{name}.new.ipynb"


def _keep_notebook(name: str, origin: str, report: Path, error: str) -> None:
    "Put an executed notebook in its place, a complete one with its inputs' hash and its files."
    from agrivision_repro.study.tables import table_of

    fresh = _fresh(name, report)
    if not error:
        done = json.loads(fresh.read_text(encoding="utf-8"))
        files = [p for kind in ("tables", "figures") for p in (report / kind).glob("*") if table_of(p.stem) == name]
        done["metadata"]["agrivision_repro"] = {"made_of": origin, "files": sorted(str(p.relative_to(report)) for p in files)}
        fresh.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, fresh.with_name(f"{name}.ipynb"))


def _copy_notebook(name: str, target: Path, without: str) -> None:
    "Copy a table notebook without the cells that have a tag."
    from agrivision_repro.study.tables import table_notebook

    notebook = json.loads(table_notebook(name).read_text(encoding="utf-8"))
    notebook["cells"] = [c for c in notebook["cells"] if without not in c["metadata"].get("tags", ())]
    target.write_text(json.dumps(notebook), encoding="utf-8")


def run_notebooks(
    parameters: dict[str, dict],  # of each notebook
    results: dict[str, list],  # that each uses
    report: Path,
) -> dict[str, str]:  # failed notebook → error message
    "Execute table notebooks whose inputs changed."
    return run_reports([(parameters, results, report)])[0]


def run_reports(
    reports: list[tuple[dict[str, dict], dict[str, list], Path]],  # of each: parameters of each notebook, results that each uses, folder
    without: str = "",  # tag of cells to leave out
) -> list[dict[str, str]]:  # of each report: failed notebook → error message
    "Execute the table notebooks of reports, two at a time; the claims, which use the others' measurements, come last."
    from tqdm import tqdm

    from agrivision_repro.report.kernels import execute, kernel_pool

    def work(name: str, own: dict, _: str, report: Path) -> str:
        _copy_notebook(name, _fresh(name, report), without)
        return execute(_fresh(name, report), own)

    jobs = []
    for parameters, results, report in reports:
        (report / "notebooks").mkdir(parents=True, exist_ok=True)
        given = [(name, own, _inputs_hash(name, own, results[name]), report) for name, own in parameters.items()]
        jobs += [job for job in given if not _is_up_to_date(job[0], job[2], report)]
    errors: dict[Path, dict[str, str]] = {report: {} for *_, report in reports}
    turns = [[job for job in jobs if (job[0] == "claims") == is_last] for is_last in (False, True)]
    try:
        for turn in filter(None, turns):
            with kernel_pool(2) as pool, tqdm(total=len(turn), desc="notebooks", leave=False) as bar:
                executed = {pool.submit(work, *job): job for job in turn}
                for future in as_completed(executed):
                    name, _, origin, report = executed[future]
                    _keep_notebook(name, origin, report, future.result())
                    errors[report] |= {name: future.result()} if future.result() else {}
                    bar.update()
    finally:
        for name, *_, report in jobs:
            _fresh(name, report).unlink(missing_ok=True)
    return [errors[report] for *_, report in reports]


def _choose_tables(names: list[str]) -> list[str]:
    "Check the names of tables; an empty list means all but those on request, in reading order."
    from agrivision_repro.study.tables import ON_REQUEST, TABLES

    unknown = [n for n in names if n not in TABLES]
    if unknown:
        raise ValueError(f"no table {', '.join(unknown)}: wanted {', '.join(TABLES)}")
    return list(dict.fromkeys(names)) or [name for name in TABLES if name not in ON_REQUEST]


def reproduce(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables to make, in this order. Default: all but section7_trained.")] = None,
    scale: ScaleName = "laptop",
    data: RunData = "synthetic",
    data_root: DataRoot = "",
    out: Out = "out",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds: one run of each configuration per seed.")] = "0",
    device: Device = "auto",
    precision: Precision = "auto",
    parameter: Annotated[list[str] | None, typer.Option("-p", help="NAME=VALUE: another parameter of the notebooks.")] = None,
    ray: Annotated[str, typer.Option(help="Train with Ray: auto (the running cluster), local (start one here), or HOST:PORT.")] = "",
    at_once: Annotated[int, typer.Option(min=0, help="Runs trained at the same time. Default: 1 on a GPU, as many as suit the cores on a CPU.")] = 0,
):
    "Train what the tables need, run their notebooks and write the report."
    need_notebooks()
    from agrivision_repro.report.kernels import start_server

    start_server()  # first: while this process imports PyTorch, so does the server of which runs and notebooks are forks
    from agrivision_repro.report.pages import write_report
    from agrivision_repro.runs.workspace import Workspace

    names = _choose_tables(tables or [])
    workspace = Workspace(out, data_root, device, precision)
    runs, parameters = plan_tables(names, {"scale": scale, "data": data, "seeds": seeds, **workspace.as_kwargs()}, parameter or [])
    if scale == "paper" and not ray:
        _check_can_run(runs, workspace)
    _warn_of_replacing(parameters, workspace.report)
    if not ray:
        _announce(runs, workspace)
    failures = _train_all(runs, workspace, ray, at_once)
    results = {name: [] if name in failures else workspace.results(runs[name]) for name in names}
    failures |= run_notebooks({name: own for name, own in parameters.items() if name not in failures}, results, workspace.report)
    print(f"report: {write_report(results, workspace, failures)}")
    print(*(f"agrivision: {name} failed: {error}\n" for name, error in failures.items()), sep="", end="", file=sys.stderr)
    raise typer.Exit(1 if failures else 0)


def plan_tables(
    names: list[str],
    common: dict,  # scale, data, seeds
    pairs: list[str],  # more parameters, `NAME=VALUE`
) -> tuple[dict[str, list], dict[str, dict]]:  # by table: its Runs, and the notebook parameters that select the same Runs
    "List the Runs of tables."
    from agrivision_repro.study.tables import TABLES, check_seeds

    known = {name: _notebook_parameters(name) for name in names}
    given = common | read_parameters(pairs, {k: v for own in known.values() for k, v in own.items() if k not in _FOLDERS})
    given["seeds"] = check_seeds(given["seeds"])
    if "others" in given:  # the kernel runs in another folder
        given["others"] = [str(Path(folder).expanduser().resolve()) for folder in map(str, given["others"])]
    parameters = {name: {k: v for k, v in given.items() if k in own} for name, own in known.items()}
    takes = {name: inspect.signature(TABLES[name]).parameters for name in names}
    return {n: TABLES[n](**{k: v for k, v in own.items() if k in takes[n]}) for n, own in parameters.items()}, parameters


_LONG = 1_000  # iterations


def _announce(runs: dict[str, list], workspace) -> None:
    "Before a long training, print how long it takes; finished runs are not repeated, so it may be interrupted."
    from agrivision_repro.runs.plan import estimate

    todo = [run for run in dict.fromkeys(run for own in runs.values() for run in own) if workspace.finished(run) is None]
    if sum(run.recipe.iterations for run in todo) >= _LONG:
        line = estimate(runs, workspace, seconds=5.0).in_one_line()
        print(f"{line}; interrupt it whenever you like: the same command goes on from there", file=sys.stderr)


def _train_all(
    runs: dict[str, list],  # table → its Runs
    workspace,
    ray: str,  # address; "": on this machine
    at_once: int,  # Runs trained at the same time on this machine; 0: chosen by the launcher
) -> dict[str, str]:  # table that cannot be made → error message
    "Train the Runs that the tables need."
    from agrivision_repro.runs.launch import launch
    from agrivision_repro.runs.plan import name_runs

    unique = list(dict.fromkeys(run for own in runs.values() for run in own))
    failed = (launch(unique, workspace, "ray", address=ray) if ray else launch(unique, workspace, at_once=at_once)).failures
    for run, name in zip(unique, name_runs(unique), strict=True):
        if run in failed:
            print(f"agrivision: {name} failed: {failed[run]}", file=sys.stderr)
    return {name: f"its run {run.title} failed: {failed[run]}" for name, own in runs.items() for run in own if run in failed}


def _check_can_run(runs: dict[str, list], workspace) -> None:
    "Check that the data and a GPU are available; if not, print the plan and raise ValueError naming what is missing."
    from agrivision_repro.runs.plan import estimate, measure_data

    real = [run for own in runs.values() for run in own if run.source.synthetic is None]
    missing = [measure_data(real[0].source, workspace)[1].split(";")[0]] if real else []
    if any(runs.values()) and workspace.device == "auto" and not workspace.on_gpu:
        missing.append("no GPU was found (--device cpu trains without one)")
    if any(missing):
        print(estimate(runs, workspace, seconds=5.0).as_text())
        raise ValueError(f"nothing was started: {'; '.join(filter(None, missing))}")


def plan(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables to plan. Default: all but section7_trained.")] = None,
    scale: ScaleName = "laptop",
    data: RunData = "synthetic",
    data_root: DataRoot = "",
    out: Out = "out",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    device: Device = "auto",
    precision: Precision = "auto",
    parameter: Annotated[list[str] | None, typer.Option("-p", help="NAME=VALUE: another parameter of the notebooks.")] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Largest number of devices to plan for.")] = 8,
):
    "List the runs that the tables need, which are finished, and how long the rest take; train nothing."
    from agrivision_repro.runs.plan import estimate
    from agrivision_repro.runs.workspace import Workspace

    runs, _ = plan_tables(_choose_tables(tables or []), {"scale": scale, "data": data, "seeds": seeds}, parameter or [])
    print(estimate(runs, Workspace(out, data_root, device, precision)).as_text(devices))
