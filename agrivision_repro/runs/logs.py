"""Logs of finished runs: everything behind their numbers but data and weights, from which the tables are made again."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from agrivision_repro.core import read_json, replace_file, write_array, write_json
from agrivision_repro.runs.store import Result, RunFolder
from agrivision_repro.runs.workspace import KNOWN, Workspace, describe_source

HISTORY_EVERY = 10  # iterations averaged per row of a log's history
_TEXTS = ("divergence.csv", "switches.csv", "section7.json", "contrasts.csv")  # files in a run folder, if there
_COUNTS = ("tiles.npy", "section7.npy")


def write_log(
    result: Result,
    workspace: Workspace,
    folder: Path,
) -> None:
    "Write the log of a Run: `ID.json`; in `ID.npz`, a zip file, counts of its tiles, its loss at every iteration and what was measured; history in `ID.csv`."
    texts = {name: _shorten(path.read_text()) for name in _TEXTS if (path := result.folder / name).is_file()}
    counts = {name: np.load(path) for name in _COUNTS if (path := result.folder / name).is_file()}
    known = {"fingerprint": workspace.identify(result.run.source), "places": workspace.fields(result.run)}
    content = {"id": result.folder.name, **known, "record": result.record, "checkpoints": result.checkpoints}
    replace_file(folder / f"{result.folder.name}.json", lambda p: p.write_text(json.dumps(content, separators=(",", ":")) + "\n"))
    history = pd.read_csv(result.folder.history)
    arrays = counts | {"loss": history.loss.to_numpy()}
    replace_file(folder / f"{result.folder.name}.npz", lambda p: _write_zip(p, arrays, texts))
    means = history.groupby((history.iteration - 1) // HISTORY_EVERY).mean().assign(iteration=lambda t: t.iteration.round().astype(int))
    replace_file(folder / f"{result.folder.name}.csv", lambda p: means.to_csv(p, index=False, float_format="%.5g"))


def _shorten(text: str) -> str:
    "Round the decimal fractions of a text to twelve significant digits, more than a comparison of tables needs; JSON goes on one line."
    if text.startswith("{"):
        text = json.dumps(json.loads(text), separators=(",", ":"))
    return re.sub(r"\d+\.\d{12,}(e-?\d+)?", lambda number: f"{float(number[0]):.12g}", text)


def _write_zip(path: Path, arrays: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    "Write arrays and texts as `np.load` reads them, whole numbers in their smallest type: half the size of `np.savez_compressed`."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        for name, text in texts.items():
            file.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_LZMA)  # without the time: the same bytes every time
        for name, values in arrays.items():
            small = values.astype(np.min_scalar_type(values.max())) if values.dtype.kind == "i" else values
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, small)


def read_logs(folder: Path) -> list[dict]:
    "Load the logs of a folder; raise ValueError if there are none."
    logs = [read_json(path) for path in sorted(folder.glob("*.json"))]
    if not logs:
        raise ValueError(f"{folder} contains no log of a run (ID.json): name a folder that `tools/collect_results.py` wrote")
    return logs


def unpack_logs(
    folder: Path,  # with logs
    out: Path,  # folder of results: its tables can then be made without data and weights
) -> list[RunFolder]:
    "Make run folders from logs, and note what is known of the data."
    known: dict = {"fingerprints": {}, "places": {}}
    for log in read_logs(folder):
        own = RunFolder(out / "runs" / log["id"])
        own.write_record(log["record"])
        with np.load(folder / f"{log['id']}.npz") as counts:
            for name in _COUNTS:
                if name in counts.files:
                    write_array(own / name, counts[name].astype(np.int64))
            if "loss" in counts.files:
                pd.DataFrame({"loss": counts["loss"]}).to_csv(own.history, index=False)
            for name in _TEXTS:
                if name in counts.files:
                    (own / name).write_bytes(counts[name])
        own.write_scores(log["checkpoints"])
        known["fingerprints"][describe_source(own.run().source)] = log["fingerprint"]
        known["places"][log["id"]] = log["places"]
    write_json(out / KNOWN, known)
    return [RunFolder(path) for path in sorted((out / "runs").iterdir())]


_COLUMNS = ["data", "scale", "net", "norm", "depth", "channels", "dice", "lovasz", "intervention", "seed", "checkpoint"]


def tidy_runs(
    logs: dict[str, Sequence[dict]],  # name of the results, `DATA` or `DATA-SCALE` → logs
    scales: dict[str, str],  # name of the results → scale
    classes: dict[str, Sequence[str]],  # name of the results → names of the classes
) -> pd.DataFrame:  # one row per run, checkpoint, test input, metric and class
    "Return all scores of all runs as one tidy table; the best checkpoint is left out where it is the last."
    rows = []
    for name, own in logs.items():
        for log in own:
            record, run = log["record"], log["record"]["run"]
            title = record["title"].rpartition(" on ")[0]
            described = {**run, "data": run["source"]["name"], "scale": scales[name], "net": title, "id": log["id"]}
            made = {"seconds": record["seconds"], "device": record["device"].partition(",")[0], "commit": record["commit"][:7]}
            made["iterations"] = log["checkpoints"]["last"]["iteration"]
            differing = {name: c for name, c in log["checkpoints"].items() if name == "last" or c["iteration"] < made["iterations"]}
            for checkpoint, found in differing.items():
                for tested, metrics in found["scores"].items():
                    for metric, score in metrics.items():
                        values = {"mean": score["mean"], **dict(zip(classes[name], score["per_class"], strict=True))}
                        key = {k: described.get(k, "") for k in ("id", *_COLUMNS)} | {"checkpoint": checkpoint, "test_input": tested, "metric": metric}
                        rows += [key | {"class": c, "value": v, **made} for c, v in values.items()]
    return pd.DataFrame(rows)
