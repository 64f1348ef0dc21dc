"""`agrivision train`; `agrivision runs`: list, show, compare and score finished runs."""

from __future__ import annotations

import os
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from agrivision_repro.cli.options import DataRoot, Device, Out, Precision, RunData, ScaleName, check_type, read_value


def _change_fields(
    chosen,  # a Run, or its recipe
    pairs: dict[str, str],  # field → text; `recipe.lr` for one of the recipe
):  # a copy with the new values
    "Set fields of a Run by name; raise ValueError for unknown ones."
    known = {f.name: getattr(chosen, f.name) for f in fields(chosen) if f.name != "source"}
    inner = {name.removeprefix("recipe."): text for name, text in pairs.items() if name.startswith("recipe.")}
    values = {"recipe": _change_fields(chosen.recipe, inner)} if inner else {}
    for name, text in pairs.items():
        if name.startswith("recipe."):
            continue
        if name not in known or name == "recipe":
            names = [n for n in known if n != "recipe"] + ["recipe.NAME"] * ("recipe" in known)
            raise ValueError(f"no field {name!r}: wanted {', '.join(names)}, as NAME=VALUE")
        values[name] = check_type(read_value(text), known[name], f"{name}={text}")
    return replace(chosen, **values)


def train(
    scale: ScaleName = "laptop",
    data: RunData = "synthetic",
    data_root: DataRoot = "",
    out: Out = "out",
    recipe: Annotated[str, typer.Option(help="At paper scale: paper, epochs, shipped, shipped-30000.")] = "",
    field: Annotated[list[str] | None, typer.Option("-p", help="NAME=VALUE: a field of the Run, or recipe.NAME=VALUE.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    track: Annotated[list[str] | None, typer.Option(help="Accelerate's trackers, such as tensorboard or wandb. Default: none.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Iterations between saved states, from which a killed run resumes.")] = 250,
):
    "Train one Run and score it; under torchrun or accelerate launch, the processes share the work."
    from agrivision_repro.runs.jobs import keep_freed_memory
    from agrivision_repro.runs.run import plan_run
    from agrivision_repro.runs.workspace import Workspace

    keep_freed_memory()
    pairs = [pair.partition("=") for pair in field or []]
    run = _change_fields(plan_run(scale, data, recipe), {name: text for name, _, text in pairs})
    workspace = Workspace(out, data_root, device, precision, save_every=save_every, trackers=track or ())
    try:
        result = workspace.result(run)
    finally:
        _destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        print(f"{run.title}: {result.folder}", "mean over classes, last weights:", sep="\n")
        print(*(_format_means(channels, by_metric) for channels, by_metric in result.scores.items()), sep="\n")
        print(f"predict images with it: agrivision predict {result.folder.name} IMAGE --out MAPS --results {out}")


def _format_means(
    channels: str,  # a test input
    by_metric: dict,  # metric → mean, …
    before: dict | None = None,  # the same of the last weights without augmentation
) -> str:
    "Format the mean scores on one test input in percent."
    from agrivision_repro.runs.listing import format_percent
    from agrivision_repro.runs.store import metric_label

    was = {metric: f" (was {format_percent(scores['mean'])})" for metric, scores in (before or {}).items()}
    means = [f"{metric_label(metric)} {format_percent(s['mean'])}{was.get(metric, '')}" for metric, s in by_metric.items()]
    return _fill(f"tested on {channels}: {'; '.join(means)}", "  ")


def _fill(text: str, indent: str, first: str | None = None) -> str:
    "Wrap a text to 80 columns, but not between a number and its %."
    options = {"initial_indent": indent if first is None else first, "subsequent_indent": indent, "break_on_hyphens": False}
    return textwrap.fill(text.replace(" %", "\u00a0%"), 80, **options).replace("\u00a0", " ")


def _destroy_process_group() -> None:
    "Destroy the process group, if there is one."
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


runs_app = typer.Typer(help="List runs; show one, compare several, rescore one.", invoke_without_command=True)


_Results = Annotated[str, typer.Option("--out", "--results", help="Folder of all results. Default: out.")]


_RunId = Annotated[str, typer.Argument(help="The first digits of the run's id.")]


@runs_app.callback()
def runs(context: typer.Context, out: _Results = "out"):
    "List all runs: state, age, data, mIoU and average precision."
    context.obj = Path(out).expanduser()
    if context.invoked_subcommand is None:
        list_all(context, out)


def _folder(context: typer.Context, out: str) -> Path:
    "Return the folder of all results, which may be named before or after the name of the command."
    return Path(out).expanduser() if out else context.obj


@runs_app.command("list")
def list_all(context: typer.Context, out: _Results = ""):
    "Print all runs; `agrivision runs` alone does so, too."
    from agrivision_repro.runs.listing import list_runs

    folder = _folder(context, out)
    table = list_runs(folder)
    print(_format_runs(table, folder) if len(table) else f"no runs in {folder}: make some with agrivision train or agrivision reproduce")


def _format_runs(
    table,  # of `listing.list_runs`
    out: Path,  # folder of all results
) -> str:
    "Format a list of runs in 80 columns: id and title, and below them state, age, data and scores."
    from agrivision_repro.runs.store import name_command

    lines = []
    for row in table.to_dict("records"):
        details = [row["state"], f"{row['age']} ago", row["data"], f"mIoU {row['mIoU']}", f"AP {row['AP']}"]
        lines += [f"{row['id']}  {row['title']}", _fill("; ".join(text for text in details if not text.endswith("–")), 14 * " ")]
    return "\n".join([*lines, "", f"next: {name_command(out, 'show ID')}", f"or:   {name_command(out, 'compare ID ID')}"])


def _format_comparison(
    table,  # of `listing.compare_runs`
) -> str:
    "Format a comparison in 80 columns: side by side if it fits, else one run per line."
    text = table.to_string()
    if max(map(len, text.splitlines())) <= 80:
        return text
    rows = ([name, *(_fill(f"{run}  {value}", 16 * " ", "  ") for run, value in row.items())] for name, row in table.iterrows())
    return "\n".join(line for lines in rows for line in lines)


@runs_app.command("show")
def show_one(context: typer.Context, run: _RunId, out: _Results = ""):
    "Print everything recorded about one run."
    from agrivision_repro.runs.listing import show_run
    from agrivision_repro.runs.store import find_run

    print(*(_fill(f"{name}: {value}", "    ", "") for name, value in show_run(find_run(_folder(context, out), run)).items()), sep="\n")


@runs_app.command()
def compare(
    context: typer.Context,
    runs: Annotated[list[str], typer.Argument(help="The first digits of two or more ids.")],
    out: _Results = "",
):
    "Print the fields in which runs differ, and their scores, side by side."
    from agrivision_repro.runs.listing import compare_runs
    from agrivision_repro.runs.store import find_run

    folder = _folder(context, out)
    print(_format_comparison(compare_runs([find_run(folder, run) for run in runs])))


@runs_app.command()
def score(
    context: typer.Context,
    run: _RunId,
    tta: Annotated[str, typer.Option(help="none, or d4: average over the eight flips and rotations of each tile.")] = "none",
    checkpoint: Annotated[str, typer.Option(help="last, or best on the validation tiles.")] = "last",
    out: _Results = "",
    data_root: DataRoot = "",
    device: Device = "auto",
    precision: Precision = "auto",
):
    "Score a finished run with test-time augmentation or with its best weights; save the scores beside the others."
    from agrivision_repro.runs.store import find_run
    from agrivision_repro.runs.workspace import Workspace, score_again

    results = _folder(context, out)
    folder = find_run(results, run)
    scores, before = score_again(folder, Workspace(results, data_root, device, precision), checkpoint, tta), folder.result().scores
    print(f"{folder.name}  {folder.run().title}", f"{checkpoint} weights, augmentation {tta} (was: last weights, none)", sep="\n")
    print(*(_format_means(channels, by_metric, before[channels]) for channels, by_metric in scores.items()), sep="\n")
    print(f"saved as {folder.more_scores(checkpoint, tta)}")
