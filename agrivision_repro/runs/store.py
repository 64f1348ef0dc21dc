"""The folder of a Run: records, scores, weights."""

from __future__ import annotations

import platform
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

import agrivision_repro
from agrivision_repro.core import ANEW, check_choice, notes_stream, read_json, write_json
from agrivision_repro.data.batches import Statistics
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.data.synthetic_files import SyntheticConfig
from agrivision_repro.runs.run import LATER_FIELDS, Run, Source, build_model
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


_RECORD = "run.json"


class OtherVersion(ValueError):
    "A record has the fields of another version of this package."


@contextmanager
def refusing(folder: RunFolder) -> Iterator[None]:
    "Raise ValueError if a field of a record is missing or malformed."
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder} is damaged ({error!r}): {ANEW}") from error


def _foreign_fields(
    described: dict,  # of a Run
) -> list[str]:
    "List the fields of a described Run that this version does not have, or else those that it lacks."
    pairs = {"": (described, Run), "recipe.": (described["recipe"], Recipe)}
    differ = [(start + name, name in own) for start, (own, kind) in pairs.items() for name in own.keys() ^ {f.name for f in fields(kind)}]
    return sorted(name for name, is_foreign in differ if is_foreign) or sorted(name for name, _ in differ)


@dataclass(frozen=True)
class RunFolder:
    "The files of a Run."

    path: Path  # `OUT/runs/ID`

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        "Return the path of a file that another module keeps here."
        return self.path / name

    @property
    def name(self) -> str:  # 12 hexadecimal digits
        "Return the id of the Run."
        return self.path.name

    @property
    def record_file(self) -> Path:
        return self.path / _RECORD

    @property
    def scores_file(self) -> Path:  # written last
        return self.path / "scores.json"

    @property
    def state(self) -> Path:  # its folder contains all files that only an unfinished Run needs
        return self.path / "state" / "state.safetensors"

    @property
    def history(self) -> Path:
        return self.path / "history.csv"

    @property
    def tiles(self) -> Path:  # see `Result.tile_counts`
        return self.path / "tiles.npy"

    @property
    def lock(self) -> Path:  # held by the process that trains the Run
        return self.path / ".lock"

    def weights(self, checkpoint: str = "last") -> Path:
        "Return the path of the last or the best weights."
        return self.path / CHECKPOINTS[checkpoint]

    def more_scores(self, checkpoint: str, tta: str) -> Path:
        "Return the path of scores with another checkpoint or augmentation."
        return self.path / f"scores-{checkpoint}-{tta}.json"

    @property
    def is_finished(self) -> bool:
        return self.scores_file.is_file()

    def record(self) -> dict:
        "Load fields and provenance; raise OtherVersion if another version wrote them."
        record = read_json(self.record_file)
        with refusing(self):
            record["run"] = LATER_FIELDS | record["run"]
            foreign = _foreign_fields(record["run"])
        if foreign:
            remedy = f"{ANEW}, or name another --out"
            raise OtherVersion(f"{self.record_file} is from another version of agrivision_repro (fields {', '.join(foreign)}): {remedy}")
        return record

    def scores(self) -> dict:  # "last" and "best" → iteration, scores; empty: not finished
        "Load the scores of both checkpoints."
        return read_json(self.scores_file) if self.is_finished else {}

    def write_record(self, record: dict) -> None:
        write_json(self.record_file, record)

    def write_scores(self, checkpoints: dict) -> None:
        "Write the scores of both checkpoints, which finishes the Run."
        write_json(self.scores_file, checkpoints)

    def saved_iteration(self) -> int:
        "Return the iteration of the saved state; 0 if there is no readable state."
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
            return read_metadata(self.state)["iteration"]
        return 0

    def progress(self) -> str:
        "Return the state of the Run, and how far along it is."
        if self.is_finished:
            return "finished"
        record = self.record()
        with refusing(self):
            state, recipe = record["state"], Recipe(**record["run"]["recipe"])
        how = "training" if _is_held(self.lock) else "killed" if state == "training" else state
        return f"{how}, saved at {self.saved_iteration():,} of {recipe.iterations:,}"

    def run(self) -> Run:
        "Return the Run that the record describes."
        record = self.record()
        with refusing(self):
            described = dict(record["run"])
            recipe, source = Recipe(**described.pop("recipe")), described.pop("source")
            synthetic = SyntheticConfig(**source["synthetic"]) if source["synthetic"] else None
            return Run(recipe, Source(source["name"], synthetic), **described)

    def result(self) -> Result:
        "Load the finished Run."
        if not self.is_finished:
            raise ValueError(f"{self} is not finished: train it to the end first")
        return Result(self.run(), self, self.record(), self.scores())


CHECKPOINTS = {"last": "weights.safetensors", "best": "best.safetensors"}


_METRIC_LABELS = {"multilabel": "multi-label", "gated": "challenge, gated"}


def metric_label(
    metric: str,  # a key of `evaluate.METRICS`
) -> str:
    "Return the name of a metric in tables: its key with spaces, unless it has a name of its own."
    return _METRIC_LABELS.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Result:
    "A finished Run."

    run: Run
    folder: RunFolder
    record: dict = field(compare=False)  # fields and provenance
    checkpoints: dict = field(compare=False)  # "last" and "best" → iteration, scores

    @property
    def scores(self) -> dict:  # test input → metric → per_class, mean, background_only
        "Return the scores of the last weights."
        return self.checkpoints["last"]["scores"]

    def score(
        self,
        channels: str,  # a test input
        metric: str = "multilabel",  # a key of `evaluate.METRICS`
    ) -> float:  # in [0, 1]
        "Return the mean over classes of a metric, last weights."
        return self.scores[channels][metric]["mean"]

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
        model.load_state_dict(read_tensors(self.folder.weights(checkpoint))[0])
        return model.eval()


def name_command(
    out: Path,  # folder of all results
    words: str,
) -> str:
    "Return the command of `agrivision runs` that has these words, for a folder of results."
    is_default = Path(out).expanduser().resolve() == Path("out").resolve()
    return f"agrivision runs {'' if is_default else f'--out {shlex.quote(str(out))} '}{words}"


def read_tiles(
    folder: RunFolder,
    n_inputs: int,
    n_classes: int,  # background included
) -> np.ndarray:  # test input, tile, class, intersection or union: `(inputs, N, C, 2)` int64
    "Load the counts of a Run's validation tiles; raise ValueError if they are missing or damaged."
    again = name_command(folder.path.parents[1], f"score {folder.name}")
    path, remedy = folder.tiles, f"create it with {again} --data-root DIR, as in training"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {remedy}")
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
        print(f"another process is training the Run in {path.parent}: waiting for it", file=notes_stream())
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_held(path: Path) -> bool:
    "Return True if a process holds a lock."
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def run_folders(
    out: str | Path,  # folder of all results
) -> list[RunFolder]:
    "Return the folders of all Runs, the oldest first."
    return [RunFolder(path.parent) for path in sorted(Path(out).expanduser().glob(f"runs/*/{_RECORD}"), key=lambda p: p.stat().st_mtime)]


def find_run(
    out: str | Path,  # folder of all results
    start: str,  # of its id
) -> RunFolder:
    "Return the folder of a Run by the first digits of its id."
    folders = run_folders(out)
    found = [folder for folder in folders if folder.name.startswith(start)]
    if len(found) != 1:
        known = ", ".join(sorted(folder.name for folder in folders)) or "none"
        raise ValueError(f"{len(found)} Runs in {out} begin with {start!r}: wanted one of {known}")
    return found[0]
