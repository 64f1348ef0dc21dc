"""A folder of Runs and the data beneath it: open, train, resume and score."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Subset

from agrivision_repro.core import Stopped, check_choice, notes_stream, read_json, replace_file, write_array, write_json
from agrivision_repro.data.batches import IMAGENET, TileDataset, dataset_statistics, rare_class_weights, thin_out
from agrivision_repro.data.editions import fingerprint
from agrivision_repro.data.pack import PackedTiles, count_tiles, open_split, pack_split
from agrivision_repro.data.tiles import Tile, Tiles, places_in_both
from agrivision_repro.runs.check import check_run
from agrivision_repro.runs.run import Run, Source, build_intervention, build_loss, build_model, describe_run, run_id
from agrivision_repro.runs.store import Result, RunFolder, hold, provenance
from agrivision_repro.training.checkpoint import read_tensors, save_tensors
from agrivision_repro.training.engine import Engine, check_device, make_engine
from agrivision_repro.training.evaluate import TTA, score_tiles
from agrivision_repro.training.loop import SAVE_EVERY, Trainer, fit, history_table, load_state, save_state

KNOWN = "known.json"  # in a folder of results that was made from logs: fingerprints of the data and places of the tiles
_PACK_UP_TO = 2e9  # bytes of images; a larger split is packed only by `agrivision data pack`


def default_out() -> Path:
    "Return $AGRIVISION_OUT; if unset, `out/` in the checkout that contains the current folder, or else in the current folder."
    if os.environ.get("AGRIVISION_OUT"):
        return Path(os.environ["AGRIVISION_OUT"]).resolve()
    here = Path.cwd()
    checkouts = (f for f in (here, *here.parents) if (f / "settings.ini").is_file() and (f / "agrivision_repro").is_dir())
    return next(checkouts, here) / "out"


def has_gpu() -> bool:
    "Return True if there is a GPU that trains; Apple's MPS has no float64, which losses and scores need."
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps"


def describe_source(source: Source) -> str:
    "Describe a source in one line of JSON."
    return json.dumps(asdict(source), sort_keys=True)


class Workspace:
    "The folders of results and data, the device, and how training is saved and tracked."

    def __init__(
        self,
        out: str | Path = "",  # folder of all results; "": `default_out()`
        data_root: str | Path = "",  # folder of the real data; not needed for synthetic data
        device: str = "auto",  # "auto": a GPU if there is one; "cpu"
        precision: str = "auto",  # "auto": bf16 if the device supports it; "bf16"; "float32"
        report: str = "",  # folder below `out` for tables, figures and pages; "": `out` itself
        *,
        save_every: int = SAVE_EVERY,  # iterations between saved states
        trackers: Sequence = (),  # Accelerate's, as names or objects; they write to `out/trackers`
    ):
        self.out = Path(out).expanduser().resolve() if out else default_out()
        self.data_root = Path(data_root).expanduser().resolve() if data_root else None
        check_device(device, precision)
        self.device, self.precision, self.save_every, self.trackers = device, precision, save_every, trackers
        self.report = self.out / re.sub(r"[^\w.-]+", "-", report)  # `classes:road,roof` names a folder, too
        for name in ("open", "counts", "identify", "known"):
            setattr(self, name, lru_cache(getattr(self, name)))  # once per workspace

    def as_kwargs(self) -> dict:
        "Return the arguments that make an equal workspace, but for trackers, in another process or a notebook."
        folders = {"out": str(self.out), "data_root": str(self.data_root or ""), "report": str(self.report.relative_to(self.out))}
        return folders | {"device": self.device, "precision": self.precision, "save_every": self.save_every}

    @property
    def on_gpu(self) -> bool:
        "Return True if models are trained on a GPU."
        return self.device == "auto" and has_gpu()

    def engine(self, trackers: Sequence = ()) -> Engine:
        "Make an engine on the device, in its precision."
        return make_engine("auto" if self.on_gpu else "cpu", self.precision, trackers, self.out / "trackers")

    @property
    def torch_device(self) -> torch.device:
        "Return the device on which models are trained and measured."
        return self.engine().device

    def root(self, source: Source) -> Path:
        "Return the folder of a source's tiles, writing them first if they are synthetic."
        return source.root(self.out, self.data_root)

    def identify(self, source: Source) -> str:
        "Compute the fingerprint of the splits used for training and scoring; in a folder made from logs, return the one that they name."
        if describe_source(source) in self.known()["fingerprints"]:
            return self.known()["fingerprints"][describe_source(source)]
        return fingerprint([open_split(source.name, self.root(source), split) for split in ("train", "val")])

    def known(self) -> dict:
        "Return what logs tell of the data: fingerprints by source, and places of the scored tiles by run id."
        return read_json(self.out / KNOWN) if (self.out / KNOWN).is_file() else {"fingerprints": {}, "places": {}}

    def open(self, source: Source, split: str) -> Tiles | PackedTiles:
        "Open a split from its pack; a small split without a pack is packed into the results folder."
        tiles = open_split(source.name, self.root(source), split)
        if isinstance(tiles, PackedTiles) or len(tiles) * tiles[0].image.nbytes > _PACK_UP_TO:
            return tiles
        folder = self.out / "data" / f"packed-{fingerprint([tiles])}"
        fresh = [parent for parent in folder.parents if not parent.exists()]
        try:
            return pack_split(tiles, folder, n_workers=1)
        except (ValueError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # from the first that is not empty
                for parent in fresh:
                    parent.rmdir()
            raise

    def tiles(self, run: Run, split: str) -> Sequence[Tile]:
        "Return the tiles that a Run is trained on (`train`) or scored on (`val`)."
        limit = run.recipe.max_val_tiles if split == "val" else 0
        return cast(Sequence[Tile], Subset(self.open(run.source, split), thin_out(self.kept(run, split), limit)))  # type: ignore[arg-type]

    def left_out(self, run: Run) -> list[str]:
        "List the tiles that a Run leaves out because train and val both show their places."
        check_run(run)
        if run.shared_places == "keep":
            return []
        train, val = (self.open(run.source, split) for split in ("train", "val"))
        tiles, shared = {"train": train, "val": val}[run.shared_places], places_in_both(train, val)
        return [name for name, place in zip(tiles.names, tiles.fields, strict=True) if place in shared]

    def kept(self, run: Run, split: str) -> list[int]:
        "List the positions of the tiles of a split that a Run uses."
        names, left_out = self.open(run.source, split).names, set(self.left_out(run)) if split == run.shared_places else set()
        if left_out.issuperset(names):
            other = {"val": "train", "train": "val"}[split]
            raise ValueError(f"all {len(names)} tiles of {split} show places of {other}: set shared_places={other!r}, or split by place")
        return [k for k, name in enumerate(names) if name not in left_out]

    def fields(self, run: Run) -> list[str]:
        "List the place of each tile that a Run is scored on; the tile itself if its name does not identify a place."
        if (places := self.known()["places"]) and (name := self.folder(run).name) in places:
            return places[name]
        fields = self.open(run.source, "val").fields
        return [fields[k] for k in thin_out(self.kept(run, "val"), run.recipe.max_val_tiles)]

    def feed(self, run: Run, split: str, channels: str = "") -> TileDataset:
        "Return the tiles with everything that determines the model's input; `channels` replaces the Run's for testing."
        check_run(run)
        own = dataset_statistics(self.counts(run.source)) if run.statistics == "dataset" else IMAGENET
        is_rare = run.recipe.sampler == "rare" and split == "train"
        weights = rare_class_weights(self.counts(run.source))[self.kept(run, split)] if is_rare else None
        feed = TileDataset(self.tiles(run, split), channels or run.channels, len(run.edition.classes), own, weights)
        return build_intervention(run).change_inputs(feed, lambda: self.tiles(run, "train"))

    def counts(self, source: Source) -> pd.DataFrame:  # of `count_table`
        "Return the counts of the training tiles."
        return count_tiles(self.open(source, "train"), shows_progress=True)

    def folder(self, run: Run) -> RunFolder:
        "Return the folder of a Run."
        return RunFolder(self.out / "runs" / run_id(run, self.identify(run.source)))

    def finished(self, run: Run) -> Result | None:
        "Load a finished Run; return None if it is not finished."
        folder = self.folder(run)
        return Result(run, folder, folder.record(), folder.scores()) if folder.is_finished else None

    def result(self, run: Run, title: str = "") -> Result:
        "Return a finished Run, training it first if needed; if two processes request it at once, one trains and the other waits."
        check_run(run)
        if self.finished(run) is None:
            self.feed(run, "train"), self.feed(run, "val")  # detect a damaged file before anything is written
            folder, engine = self.folder(run), self.engine(self.trackers)
            folder.path.mkdir(parents=True, exist_ok=True)
            with hold(folder.lock) if engine.accelerator.is_main_process else nullcontext():
                engine.accelerator.wait_for_everyone()
                if self.finished(run) is None:
                    _train_run(run, self, engine, folder, title or run.title)
                engine.accelerator.wait_for_everyone()
        result = self.finished(run)
        if result is None:
            raise FileNotFoundError(f"{self.folder(run)} has no scores after training: train it again")
        return result

    def results(self, runs: Sequence[Run]) -> list[Result]:
        "Return several finished Runs, each trained once."
        unique = list(dict.fromkeys(runs))
        done = {run: self.result(run, f"run {k} of {len(unique)}: {run.title}") for k, run in enumerate(unique, 1)}
        return [done[run] for run in runs]


def _train_run(run: Run, workspace: Workspace, engine: Engine, folder: RunFolder, title: str) -> None:
    "Train and score a Run and complete its folder; if it fails or is stopped, note that in its record."
    accelerator, began = engine.accelerator, time.monotonic()
    options = {"seed": run.seed, "engine": engine, "sync_switch": run.sync_switch, "intervention": build_intervention(run)}
    trainer = Trainer(build_model(run), build_loss(run), run.recipe, **options)
    record = {"run": describe_run(run), "title": run.title, **provenance(engine), "micro_batches": trainer.n_micro_batches, "speed": trainer.speed}

    def keep(**more: object) -> None:
        if accelerator.is_main_process:
            record.update(more, seconds=round(time.monotonic() - began, 1))
            folder.write_record(record)

    keep(state="training")
    if accelerator.is_main_process:
        print(f"{title}: {engine.title}, {trainer.speed}", file=notes_stream())
    try:
        checkpoints = _train_and_score(run, workspace, trainer, folder, title, keep)
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):  # raise the original error in any case
            keep(state=f"{'stopped' if isinstance(error, (Stopped, KeyboardInterrupt)) else 'failed'}: {' '.join(str(error).split())}")
        raise
    keep(state="finished")
    if accelerator.is_main_process:
        folder.write_scores(checkpoints)
        shutil.rmtree(folder.state.parent)


def _score_inputs(
    model: torch.nn.Module,
    tests: dict[str, TileDataset],  # test input → tiles
    engine: Engine,
    tta: str = "none",  # a key of `training.evaluate.TTA`
) -> tuple[dict, np.ndarray]:  # test input → metric → per_class, mean, background_only; counts of `read_tiles`
    "Score a model on all its test inputs."
    scored = {channels: score_tiles(model, test, engine, tta) for channels, test in tests.items()}
    return {channels: scores for channels, (scores, _) in scored.items()}, torch.stack([tiles for _, tiles in scored.values()]).numpy()


def _score_checkpoints(
    trainer: Trainer,  # its model is changed in place
    tests: dict[str, TileDataset],  # test input → tiles
    folder: RunFolder,
    iterations: dict[str, int],  # checkpoint → its iteration, "last" first
) -> dict:  # checkpoint → iteration, scores
    "Score the last and the best weights, and write the contribution of each tile to the scores of the last."
    scores = {}
    for name, iteration in iterations.items():
        if iteration not in scores:  # the last weights may be the best
            trainer.bare_model.load_state_dict(read_tensors(folder.weights(name))[0])
            scores[iteration], tiles = _score_inputs(trainer.bare_model, tests, trainer.engine)
            if name == "last" and trainer.engine.accelerator.is_main_process:
                write_array(folder.tiles, tiles)
    return {name: {"iteration": iteration, "scores": scores[iteration]} for name, iteration in iterations.items()}


def _train_and_score(run: Run, workspace: Workspace, trainer: Trainer, folder: RunFolder, title: str, keep: Callable) -> dict:
    "Train to the end, write weights and history, and score the last weights and the best."
    feed, accelerator, state = workspace.feed(run, "train"), trainer.engine.accelerator, folder.state
    tests = {channels: workspace.feed(run, "val", channels) for channels in run.test_inputs}
    if state.exists():
        load_state(trainer, state)
    n_val, left_out = len(tests[run.test_inputs[0]].tiles), workspace.left_out(run)
    keep(resumed_at=trainer.iteration, statistics=feed.statistics, n_train=len(feed.tiles), n_val=n_val, left_out=left_out)
    if left_out and accelerator.is_main_process:
        some = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")
        print(f"{len(left_out)} tiles of {run.shared_places} are left out because both splits show their places: {some}", file=notes_stream())
    accelerator.init_trackers("agrivision_repro", {"title": run.title})
    validation = tests[run.channels if run.channels in tests else run.test_inputs[0]]
    fit(trainer, feed, state, validation=validation, title=title, save_every=workspace.save_every)
    for tracker in accelerator.trackers:
        tracker.finish()
    iterations = {"last": trainer.iteration, "best": max(trainer.evaluations, key=lambda e: e[1])[0]}
    if accelerator.is_main_process:
        save_state(trainer, state)
        save_tensors(trainer.bare_model.state_dict(), folder.weights("last"), iteration=iterations["last"])
        replace_file(folder.weights("best"), lambda p: shutil.copyfile(state.with_name(folder.weights("best").name), p))
        replace_file(folder.history, history_table(trainer).to_csv)
    keep(evaluations=trainer.evaluations)
    accelerator.wait_for_everyone()
    return _score_checkpoints(trainer, tests, folder, iterations)


def score_again(
    folder: RunFolder,  # of a finished Run
    workspace: Workspace,
    checkpoint: str = "last",  # or "best"
    tta: str = "none",  # a key of `training.evaluate.TTA`
) -> dict:  # test input → metric → per_class, mean, background_only
    "Score weights with another checkpoint or augmentation; save the scores, and the counts of the tiles if missing, in the folder."
    result, path = folder.result(), folder.more_scores(checkpoint, tta)
    check_choice("tta", tta, tuple(TTA))
    lacks_tiles = (checkpoint, tta) == ("last", "none") and not folder.tiles.is_file()
    if lacks_tiles or not path.is_file():
        if workspace.folder(result.run).name != folder.name:
            raise ValueError(f"the data differ from those of {folder}: pass with --data-root the folder that it was trained on")
        model, engine = result.model(checkpoint), workspace.engine()
        tests = {channels: workspace.feed(result.run, "val", channels) for channels in result.run.test_inputs}
        scores, tiles = _score_inputs(model.to(engine.device), tests, engine, tta)
        if lacks_tiles:
            write_array(folder.tiles, tiles)
        write_json(path, scores)
    return read_json(path)
