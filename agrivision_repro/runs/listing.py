"""Tables of runs: all in a folder, everything about one, and the differences between several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from agrivision_repro.core import ANEW
from agrivision_repro.runs.store import OtherVersion, RunFolder, metric_label, refusing, run_folders


def list_runs(
    out: str | Path,  # folder of all results
) -> pd.DataFrame:  # one row per Run, text cells; multi-label mIoU and average precision of the last weights
    "List all Runs in a folder; a record that cannot be read is a row that gives the reason."
    return pd.DataFrame([_row_of(folder) for folder in run_folders(out)])


def _row_of(folder: RunFolder) -> dict[str, str]:  # column → text
    "Return the table row of a Run."
    age = _format_age(time.time() - folder.record_file.stat().st_mtime)
    row = {"id": folder.name, "title": "–", "data": "–", "state": "", "age": age, "mIoU": "–", "AP": "–", "device": "–", "commit": "–"}
    try:
        record, scores = folder.record(), folder.scores()
        with refusing(folder):
            scores = scores["last"]["scores"] if scores else {}
            row |= {"title": record["title"], "data": record["run"]["source"]["name"], "state": folder.progress()}
            row |= {"device": record["device"], "commit": record["commit"][:10] + (" + changes" if record["is_dirty"] else "")}
            for column, metric in (("mIoU", "multilabel"), ("AP", "average_precision")):
                row[column] = ", ".join(f"{name} {format_percent(by[metric]['mean'])}" for name, by in scores.items()) or "–"
    except OtherVersion:
        return row | {"state": "from another version of agrivision_repro: remove it, or name another --out"}
    except ValueError:
        return row | {"state": f"damaged: {ANEW}"}
    return row


def _format_age(seconds: float) -> str:
    "Format a time span in its largest unit."
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def format_percent(share: float | None) -> str:
    "Format a score in [0, 1] in percent; None: the class is absent."
    return "–" if share is None else f"{100 * share:.1f} %"


def _score_rows(folder: RunFolder) -> dict[str, str]:  # metric, test input, checkpoint → mean and classes, in percent
    "Return all scores of a Run, in the tables' names and unit."
    classes, rows = folder.run().edition.classes, {}
    for checkpoint, found in folder.scores().items():
        for channels, by_metric in found["scores"].items():
            for metric, score in by_metric.items():
                each = ", ".join(f"{name} {format_percent(share)}" for name, share in zip(classes, score["per_class"], strict=True))
                rows[f"{metric_label(metric)}, tested on {channels}, {checkpoint} weights"] = f"{format_percent(score['mean'])} ({each})"
    return rows


def show_run(folder: RunFolder) -> pd.Series:
    "Return everything recorded about a Run, one name per value; scores in percent, mean and classes."
    record = folder.record() | {"progress": folder.progress()}
    with refusing(folder):
        return pd.concat([pd.json_normalize(record).astype(object).iloc[0], pd.Series(_score_rows(folder), dtype=object)])


def compare_runs(folders: Sequence[RunFolder]) -> pd.DataFrame:
    "Return the fields that differ between Runs, and their mean scores, side by side."
    table = pd.DataFrame({folder.name: show_run(folder) for folder in folders})
    differs, is_score = table.astype(str).nunique(axis=1) > 1, table.index.str.endswith(" weights")
    table[is_score] = table[is_score].map(lambda text: text.split(" (")[0], na_action="ignore")
    return table[differs & (is_score | table.index.str.startswith(("run.", "device", "precision", "commit", "processes")))]
