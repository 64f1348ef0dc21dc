"""The folder of a Run: records, scores, weights, and tables of all folders."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

import agrivision_repro
from agrivision_repro.core import ANEW, check_choice, read_json
from agrivision_repro.data.batches import Statistics
from agrivision_repro.data.synthetic_files import SyntheticConfig
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.runs.run import Run, build_model
from agrivision_repro.training.checkpoint import read_metadata, read_tensors
from agrivision_repro.training.engine import Engine
from agrivision_repro.training.schedule import Recipe


def git(*words: str) -> str:
    "Return the output of a git command in this package's checkout; empty if there is no checkout."
    root = Path(agrivision_repro.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def provenance(engine: Engine) -> dict:  # plain strings and numbers
    "Return the provenance of results: code, libraries and machine."
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else ""
    return {
        "commit": git("rev-parse", "HEAD"),
        "is_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {p: version(p) for p in ("agrivision_repro", "torch", "torchvision", "timm", "accelerate", "numpy")},
        "python": platform.python_version(),
        "device": gpu or f"{platform.machine()} CPU, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}",
        "processes": engine.accelerator.num_processes,
        "precision": engine.precision,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    "Raise ValueError if a field of a record is missing or malformed."
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder} is damaged or from another version ({error!r}): {ANEW}") from error


@dataclass(frozen=True)
class Result:
    "A finished Run."

    run: Run
    folder: Path
    record: dict = field(compare=False)  # run.json
    checkpoints: dict = field(compare=False)  # scores.json: "last" and "best" → iteration, scores

    @property
    def scores(self) -> dict:  # test input → metric → per_class, mean, background_only
        "Return the scores of the last weights."
        return self.checkpoints["last"]["scores"]

    def tile_counts(
        self,
        channels: str = "",  # a test input; "": the Run's own channels
    ) -> np.ndarray:  # intersection and union, pixels, `(N, C, 2)` int64, in the order of the validation tiles
        "Return the contribution of each tile to the multi-label scores of the last weights."
        channels = channels or self.run.channels
        check_choice("channels", channels, self.run.test_inputs)
        counts = read_tiles(self.folder, len(self.run.test_inputs), len(self.run.edition.classes))
        return counts[self.run.test_inputs.index(channels)]

    @property
    def statistics(self) -> Statistics:
        "Return the statistics that normalize the model's channels."
        return Statistics(*map(tuple, self.record["statistics"]))

    def model(
        self,
        checkpoint: str = "last",  # or "best"
    ) -> DeepLabV3Plus:
        "Load the trained model, in evaluation mode, on the CPU."
        check_choice("checkpoint", checkpoint, tuple(CHECKPOINTS))
        run = replace(self.run, recipe=replace(self.run.recipe, pretrained=False))  # the trained weights are loaded below
        model = build_model(run)
        model.load_state_dict(read_tensors(self.folder / CHECKPOINTS[checkpoint])[0])
        return model.eval()


CHECKPOINTS = {"last": "weights.safetensors", "best": "best.safetensors"}


TILES = "tiles.npy"


def read_tiles(
    folder: Path,
    n_inputs: int,
    n_classes: int,  # background included
) -> np.ndarray:  # test input, tile, class, intersection or union: `(inputs, N, C, 2)` int64
    "Load the counts of a Run's validation tiles; raise ValueError if they are missing or damaged."
    path, remedy = folder / TILES, f"create it with agrivision runs score {folder.name} (--out and --data-root as in training)"
    if not path.is_file():
        raise ValueError(f"{path} is missing, as in Runs that were scored before it was introduced: {remedy}")
    try:
        counts = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it (then {remedy})") from error
    shape = (n_inputs, *counts.shape[1:2], n_classes, 2)
    if counts.shape != shape or counts.dtype != np.int64:
        wanted = f"({n_inputs}, N, {n_classes}, 2) int64"
        raise ValueError(f"{path} is {counts.shape} {counts.dtype}, wanted {wanted}: remove it (then {remedy})")
    return counts


@contextmanager
def hold(path: Path) -> Iterator[None]:
    "Hold a lock; print a note if another process holds it. The lock of a killed process is released."
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is training the Run in {path.parent}: waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _progress_of(folder: Path, record: dict) -> str:
    "Return the state and progress of a Run."
    if (folder / "scores.json").is_file():
        return "finished"
    recipe = Recipe(**record["run"]["recipe"])
    how = "training" if is_held(folder / ".lock") else "killed" if record["state"] == "training" else record["state"]
    return f"{how}, saved at {saved_iteration(folder):,} of {recipe.iterations:,}"


def saved_iteration(folder: Path) -> int:
    "Return the iteration of a Run's saved state; 0 if there is no readable state."
    with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
        return read_metadata(folder / "state" / "state.safetensors")["iteration"]
    return 0


def is_held(path: Path) -> bool:
    "Return True if a process holds a lock."
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _format_age(seconds: float) -> str:
    "Format a time span in its largest unit."
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def list_runs(
    out: Path,  # folder of all results
) -> pd.DataFrame:  # one row per Run; multi-label mIoU and average precision in %, last weights
    "List all Runs in a folder."
    rows = []
    for path in sorted(Path(out).glob("runs/*/run.json"), key=lambda p: p.stat().st_mtime):
        with _refusing(path.parent):
            rows.append(row_of(path))
    return pd.DataFrame(rows)


def row_of(path: Path) -> dict:  # column → value
    "Return the table row of a `run.json`."
    record, folder = read_json(path), path.parent
    scores = read_json(folder / "scores.json")["last"]["scores"] if (folder / "scores.json").is_file() else {}

    def means(metric: str) -> str:
        return ", ".join(f"{channels} {100 * by_metric[metric]['mean']:.1f}" for channels, by_metric in scores.items()) or "–"

    return {
        "id": folder.name, "title": record["title"], "data": record["run"]["data"], "state": _progress_of(folder, record),
        "age": _format_age(time.time() - path.stat().st_mtime), "mIoU, %": means("multilabel"), "AP, %": means("average_precision"),
        "device": record["device"], "commit": record["commit"][:10] + (" + changes" if record["is_dirty"] else ""),
    }  # fmt: skip


def find_run(
    out: Path,
    start: str,  # of its id
) -> Path:  # its folder
    "Return the folder of a Run by the first digits of its id."
    found = [path.parent for path in Path(out).glob("runs/*/run.json") if path.parent.name.startswith(start)]
    if len(found) != 1:
        known = ", ".join(sorted(path.parent.name for path in Path(out).glob("runs/*/run.json"))) or "none"
        raise ValueError(f"{len(found)} Runs in {out} begin with {start!r}: wanted one of {known}")
    return found[0]


def flatten(content: dict, prefix: str = "") -> dict:  # dotted names → values
    "Flatten nested dictionaries to one level."
    flat = {}
    for name, value in content.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def show_run(folder: Path) -> pd.Series:
    "Return everything recorded about a Run, one name per value."
    with _refusing(folder):
        content = read_json(folder / "run.json") | {"progress": _progress_of(folder, read_json(folder / "run.json"))}
    scores = read_json(folder / "scores.json") if (folder / "scores.json").is_file() else {}
    return pd.Series(flatten(content | scores), dtype=object)


def compare_runs(folders: Sequence[Path]) -> pd.DataFrame:
    "Return the fields that differ between Runs, and their scores, side by side."
    table = pd.DataFrame({folder.name: show_run(folder) for folder in folders})
    differs = table.astype(str).nunique(axis=1) > 1
    shown = [n for n in table.index if n.startswith(("run.", "device", "precision", "commit", "processes")) or n.endswith(".mean")]
    return table[differs].loc[lambda t: t.index.isin(shown)]


def read_result(folder: Path) -> Result:
    "Load a finished Run from its folder."
    if not (folder / "scores.json").is_file():
        raise ValueError(f"{folder} is not finished: train it to the end first")
    record = read_json(folder / "run.json")
    with _refusing(folder):
        described = dict(record["run"])
        recipe, farm = Recipe(**described.pop("recipe")), described.pop("farm")
        run = Run(recipe, farm=SyntheticConfig(**farm) if farm else None, **described)
    return Result(run, folder, record, read_json(folder / "scores.json"))
