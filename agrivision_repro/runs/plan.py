"""Predict what a set of Runs will cost before any of it is trained."""

from __future__ import annotations

import heapq
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from agrivision_repro.core import read_json
from agrivision_repro.data.batches import CHANNELS, Batch
from agrivision_repro.data.pack import open_split
from agrivision_repro.models.backbones import IMAGENET_URLS
from agrivision_repro.models.deeplab import count_gmacs
from agrivision_repro.runs.run import Run, Source, build_intervention, build_loss, build_model
from agrivision_repro.runs.store import CHECKPOINTS, RunFolder, provenance, run_folders
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.training.engine import Engine
from agrivision_repro.training.loop import Trainer
from agrivision_repro.training.schedule import Recipe


class DataSize(NamedTuple):
    "The size of a data set, as far as it determines the cost of a Run."

    side: int  # of a tile, pixels
    n_val: int  # validation tiles


PAPERS_DATA = DataSize(512, 4_431)  # Agriculture-Vision 2020 (§4; challenge README)


def _tiles_left(
    run: Run,
    n_val: int,  # validation tiles
    done: int = 0,  # iterations in its saved state
) -> tuple[int, int]:  # tiles to train on, tiles to score
    "Count the tiles that a Run still has to process."
    recipe = run.recipe
    looks = -(-recipe.iterations // recipe.evaluate_every) - done // recipe.evaluate_every
    n_scored = min(n_val, recipe.max_val_tiles or n_val)
    return (recipe.iterations - done) * recipe.batch_size, (looks + len(CHECKPOINTS) * len(run.test_inputs)) * n_scored


def kind_of(run: Run) -> Run:
    "Return the Run with fixed values in all fields that do not change the cost of a tile."
    old = run.recipe
    shape = {"batch_size": old.batch_size, "micro_batches": old.micro_batches, "crop": old.crop, "width": old.width}
    recipe = Recipe(1, 1_000, 0, pretrained=False, **shape)  # long enough to time, too short to be compiled
    channels = "rgb" if len(CHANNELS[run.channels]) == 3 else "rgbn"
    alike = {"source": Source(run.source.name), "seed": 0, "statistics": "imagenet", "dice": float(run.dice > 0), "lovasz": float(run.lovasz > 0)}
    return replace(run, recipe=recipe, channels=channels, intervention=build_intervention(run).example, **alike)


def gmacs_of(
    kind: Run,  # of `kind_of`
    side: int,  # of the input, pixels
) -> float:  # 10⁹ multiply-adds
    "Count the multiply-adds of one tile's forward pass, once for all Runs that have the same net."
    recipe = replace(kind.recipe, batch_size=1, micro_batches=1, crop=0)
    return _count_net(replace(kind, recipe=recipe, dice=1.0, lovasz=0.0), side)


@lru_cache
def _count_net(kind: Run, side: int) -> float:
    with torch.device("meta"):
        model = build_model(kind)
    return count_gmacs(model, (1, len(CHANNELS[kind.channels]), side, side))


class Throughput(NamedTuple):
    "The speed of a kind of Run."

    train: float  # seconds per tile
    score: float  # seconds per tile
    n_tiles: int  # in the timed batch; 0: not timed, but scaled by multiply-adds
    is_full: bool  # False: a real micro-batch does not fit into the device's memory


def _seconds_of(
    work: Callable[[], Tensor],
    limit: float = 5.0,  # seconds; a longer first call is not repeated
) -> float:
    "Time the second of two calls; reading a value of the result synchronizes a GPU."
    for _ in range(2):
        began = time.perf_counter()
        work().flatten()[0].item()
        took = time.perf_counter() - began
        if took > limit:
            break
    return took


def make_up_batch(kind: Run, side: int, n_tiles: int, device: torch.device) -> Batch:
    "Make a random batch in the shapes of a kind of Run."
    n_channels, n_classes = len(CHANNELS[build_intervention(kind).batch_channels]), len(kind.edition.classes)
    targets = torch.rand(n_tiles, n_classes, side, side, device=device) < 1 / n_classes
    valid = torch.ones(n_tiles, side, side, dtype=torch.bool, device=device)
    return Batch(torch.randn(n_tiles, n_channels, side, side, device=device), targets, valid, torch.arange(n_tiles))


def time_steps(
    kind: Run,  # of `kind_of`
    side: int,  # of the training input, pixels
    engine: Engine,
    seconds: float = 5.0,  # after which no larger batch is tried
) -> Throughput:
    "Time training steps and forward passes, on as many tiles as time and memory allow."
    options = {"seed": 0, "engine": engine, "intervention": build_intervention(kind)}
    trainer = Trainer(build_model(kind), build_loss(kind), replace(kind.recipe, micro_batches=1), **options)
    n_channels = len(CHANNELS[kind.channels])
    largest = kind.recipe.batch_size // kind.recipe.micro_batches
    n_tiles, pace, began = 1, None, time.perf_counter()
    while True:
        try:
            batch = make_up_batch(kind, side, n_tiles, engine.device)
            trainer.model.train()
            train = _seconds_of(lambda batch=batch: trainer.step([batch]), seconds) / n_tiles
            trainer.model.eval()
            with torch.no_grad():
                score = _seconds_of(lambda batch=batch: engine.predict(trainer.model, batch.x[:, :n_channels]), seconds) / n_tiles
        except torch.OutOfMemoryError as error:
            if pace is None:
                raise ValueError(f"one tile of {side}² does not fit into device memory: use a larger device, or --device cpu") from error
            return pace._replace(is_full=False)
        pace = Throughput(train, score, n_tiles, True)
        if n_tiles == largest or time.perf_counter() - began > seconds:
            return pace
        n_tiles = min(2 * n_tiles, largest)


def _distance(kind: tuple[Run, int], other: tuple[Run, int]) -> tuple[bool, float]:
    "Return whether the interventions of two kinds differ, and by how many multiply-adds the nets do."
    return kind[0].intervention != other[0].intervention, abs(gmacs_of(*kind) - gmacs_of(*other))


def _pace_all(
    kinds: dict[tuple[Run, int], int],  # kind and side → number of its Runs
    engine: Engine,
    seconds: float = 20.0,  # for all kinds together; the first kind is always timed
) -> dict[tuple[Run, int], Throughput]:
    "Time kinds of Runs within a time budget, and scale the others by their multiply-adds."
    began, paces = time.perf_counter(), {}
    for key in sorted(kinds, key=lambda key: (kinds[key], gmacs_of(*key)), reverse=True):
        left = seconds - (time.perf_counter() - began)
        if not paces or left > max(p.train * p.n_tiles * 4 for p in paces.values()):  # two steps, and making the model
            paces[key] = time_steps(*key, engine, min(5.0, left / 2))
    timed = dict(paces)
    for key in kinds:
        if key not in timed:
            near = min(timed, key=lambda other: _distance(other, key))  # noqa: B023 used at once
            ratio = gmacs_of(*key) / gmacs_of(*near)
            paces[key] = Throughput(timed[near].train * ratio, timed[near].score * ratio, 0, timed[near].is_full)
    return paces


def _find_data(source: Source, workspace: Workspace) -> Path:
    "Return the folder of a source's tiles; raise FileNotFoundError if there is none."
    if source.synthetic is None:
        if workspace.data_root is None:
            raise FileNotFoundError(f"no folder is given for the data {source.name!r} (--data-root)")
        return workspace.data_root
    for note in workspace.out.glob("data/*/farmland.json"):
        if read_json(note) == source.synthetic.describe():
            return note.parent
    raise FileNotFoundError("the synthetic tiles do not exist yet: the first run generates them")


def measure_data(source: Source, workspace: Workspace) -> tuple[DataSize, str]:  # size, and what is missing; "": nothing
    "Return size and number of a source's tiles; if they are missing, those of its description or the paper."
    try:
        tiles = open_split(source.name, _find_data(source, workspace), "val")
        return DataSize(max(tiles[0].labels.shape), len(tiles)), ""
    except (ValueError, OSError) as error:
        if source.synthetic is None:
            return PAPERS_DATA, f"{error}; planned with the paper's sizes: 512² tiles, 4,431 of them to score"
        return DataSize(source.synthetic.size, source.synthetic.val_fields * source.synthetic.tiles_per_field), str(error)


def _find_folder(
    run: Run,
    workspace: Workspace,
    has_data: bool,
) -> RunFolder | None:  # None: never started
    "Return the folder of a Run, found by its description if its data is missing."
    if has_data:
        return workspace.folder(run)
    for folder in run_folders(workspace.out):
        with suppress(ValueError):  # from another version, or damaged
            if folder.run() == run:
                return folder
    return None


def schedule(
    hours: Sequence[float],  # of each run
    n_devices: int,
) -> list[list[int]]:  # one list per device: the indices of its runs, in order
    "Assign runs to devices, the longest first, each to the device that is free first."
    plan, free = [[] for _ in range(n_devices)], [(0.0, k) for k in range(n_devices)]
    for i in sorted(range(len(hours)), key=lambda i: -hours[i]):
        ends, k = heapq.heappop(free)
        plan[k].append(i)
        heapq.heappush(free, (ends + hours[i], k))
    return plan


def makespan(hours: Sequence[float], n_devices: int) -> float:  # hours
    "Compute when the last run ends."
    return max(sum(hours[i] for i in device) for device in schedule(hours, n_devices))


def name_runs(runs: Sequence[Run]) -> list[str]:
    "Return names of Runs: their titles, with the fields that differ where titles are equal."
    names = []
    for run in runs:
        twins = [asdict(other) for other in runs if other.title == run.title and other != run]
        own = asdict(run)
        differs = [f"{name}={own[name]}" for name in own if any(twin[name] != own[name] for twin in twins) and name != "recipe"]
        names.append(run.title + (f" ({', '.join(differs)})" if differs else ""))
    return names


def _format_hours(hours: float) -> str:
    "Format a time span in a suitable unit."
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    if hours >= 1:
        return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 30 else f"{3600 * hours:.0f} s"


@dataclass(frozen=True)
class Plan:
    "The Runs to train, and their cost."

    table: pd.DataFrame  # one row per Run, the longest first
    device: str  # on which Runs were timed
    precision: str
    notes: tuple[str, ...]  # missing files, and the basis of the estimates

    def hours(self, n_devices: int = 1) -> float:
        "Compute the time for all Runs on `n_devices` devices like this one."
        return makespan(self.table.hours.tolist(), n_devices)

    def in_one_line(self) -> str:
        "Return in one line how many Runs are left and how long they take on this device."
        n_open = int((self.table.state != "finished").sum())
        return f"{len(self.table)} runs, {len(self.table) - n_open} finished; the others take about {_format_hours(self.hours())} on this machine"

    def as_text(self, n_devices: int = 8, n_rows: int = 10) -> str:
        "Format the plan for a terminal of 80 columns, with times for 1, 2, 4, … up to `n_devices` devices."
        if self.table.empty:
            return "nothing to train: these tables use no run"
        more = [f"… and {len(self.table) - n_rows} more"] if len(self.table) > n_rows else []
        n_open = int((self.table.state != "finished").sum())
        counts = sorted({2**k for k in range(n_devices.bit_length())} | {n_devices})
        spans = [f"{n} device{'s' * (n > 1)} {_format_hours(self.hours(n))}" for n in counts if n <= max(n_open, 1)]
        lines = [f"{len(self.table)} Runs, {len(self.table) - n_open} finished; timed on {self.device}, {self.precision}", ""]
        lines += [line for row in self.table.head(n_rows).to_dict("records") for line in _format_row(row)]
        lines += [*more, "", *_wrap("all Runs, the longest first: " + ", ".join(spans))]
        if n_open:
            need, n_busy = self.table["tiles/s"].max(), min(n_devices, n_open)
            lines += _wrap(f"the loader must deliver {need:,.3g} tiles/s to each device, {n_busy * need:,.3g} to {n_busy}")
        if n_open < n_devices:
            lines += _wrap(f"more devices than Runs ({n_open}) do not help, unless several train one Run (torchrun)")
        return "\n".join([*lines, *(line for note in self.notes for line in _wrap(f"- {note}", 2))])


def _wrap(text: str, indent: int = 0) -> list[str]:
    "Wrap a text to 80 columns; further lines are indented."
    return textwrap.wrap(text, 80, subsequent_indent=" " * indent, break_on_hyphens=False)


def _format_row(row: dict) -> list[str]:
    "Format a Run of a plan: its time and name, and below them state, cost and tables."
    cost = [f"{row['iterations']:,} iterations", f"{row['GMACs']:,.3g} GMACs", f"{row['tiles/s']:,.3g} tiles/s ({row['by']})"]
    details = ", ".join([row["state"], *cost] if row["state"] != "finished" else [row["state"]])
    names = [name.split("_")[0] for name in row["tables"].split(", ")]
    tables = ", ".join(name for name in names if name != "claims" or len(names) == 1)  # the claims use all runs
    return [*_wrap(f"{_format_hours(row['hours']):>8}  {row['run']}", 10), *_wrap(f"    {details}; {tables}", 4)]


_COLUMNS = ["run", "tables", "state", "iterations", "GMACs", "hours", "tiles/s", "by"]


def estimate(
    runs_by_table: dict[str, Sequence[Run]],  # name of a table → its Runs
    workspace: Workspace,
    seconds: float = 20.0,  # approximate, for timing
) -> Plan:
    "Return the plan for the Runs of tables: their states, and the time for the unfinished ones; train and write nothing."
    unique = list(dict.fromkeys(run for runs in runs_by_table.values() for run in runs))
    data = {source: measure_data(source, workspace) for source in dict.fromkeys(run.source for run in unique)}
    engine, rows, keys = workspace.engine(), [], []
    for run, name in zip(unique, name_runs(unique), strict=True):
        extent, missing = data[run.source]
        tables = ", ".join(table for table, runs in runs_by_table.items() if run in runs)
        key, folder = (kind_of(run), run.recipe.crop or extent.side), _find_folder(run, workspace, not missing)
        rows.append({"run": name, "tables": tables, **_progress(run, folder), "GMACs": gmacs_of(*key)})
        keys.append(key)
    opened = [key for key, row in zip(keys, rows, strict=True) if row["state"] != "finished"]
    paces = _pace_all({key: opened.count(key) for key in opened}, engine, seconds)
    for run, key, row in zip(unique, keys, rows, strict=True):
        row |= _cost(run, key[1], data[run.source][0], row, paces.get(key))
    table = pd.DataFrame(rows, columns=_COLUMNS).sort_values("hours", ascending=False, kind="stable", ignore_index=True)
    missing = dict.fromkeys(text for _, text in data.values() if text)
    return Plan(table, provenance(engine)["device"], engine.precision, (*missing, *_list_notes(unique, engine, list(paces.values()))))


def _progress(run: Run, folder: RunFolder | None) -> dict:  # state and remaining iterations
    "Return the state of a Run and its remaining iterations."
    if folder is not None and folder.is_finished:
        return {"state": "finished", "iterations": 0}
    done = folder.saved_iteration() if folder is not None else 0
    return {"state": f"saved at {done:,}" if done else "open", "iterations": run.recipe.iterations - done}


def _cost(run: Run, side: int, extent: DataSize, row: dict, pace: Throughput | None) -> dict:  # new columns of the row
    "Compute the hours of a Run, and the tiles per second that its loader must deliver, from a pace."
    if row["state"] == "finished" or pace is None:
        return {"hours": 0.0, "tiles/s": 0.0, "by": "–"}
    n_train, n_score = _tiles_left(run, extent.n_val, run.recipe.iterations - row["iterations"])
    seconds = n_train * pace.train + n_score * pace.score * (extent.side / side) ** 2
    return {"hours": seconds / 3600, "tiles/s": 1 / pace.train, "by": "timed" if pace.n_tiles else "scaled"}


def _list_notes(runs: Sequence[Run], engine: Engine, paces: Sequence[Throughput]) -> list[str]:
    "List the missing files for the Runs of a plan, and the basis of its estimates."
    notes = []
    urls = {IMAGENET_URLS[run.depth, run.norm] for run in runs if run.recipe.pretrained and (run.depth, run.norm) in IMAGENET_URLS}
    files = sorted(url.rsplit("/", 1)[1] for url in urls)
    absent = [name for name in files if not (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file()]
    if absent:
        names = ", ".join(absent[:3]) + ", …" * (len(absent) > 3)
        notes.append(f"ImageNet weights not downloaded yet, the first run downloads them: {names}")
    if engine.device.type == "cpu":
        notes.append("no GPU available or requested: times are for this CPU; runs of days are meant for GPUs")
    elif paces:
        notes.append("timed without torch.compile, which long runs use: they are likely faster")
    if any(not pace.is_full for pace in paces):
        notes.append("a batch does not fit into this device's memory: use micro-batches (recipe.micro_batches), or several devices")
    timed = [pace.n_tiles for pace in paces if pace.n_tiles]
    if len(timed) < len(paces):
        notes.append("scaled: not timed, but computed from a timed Run by the ratio of multiply-adds (GMACs per tile)")
    if timed:
        sizes = " or ".join(str(n) for n in sorted(set(timed)))
        notes.append(f"from steps on random batches of {sizes}, times the tiles to train on and to score; startup and loading excluded")
    return notes
