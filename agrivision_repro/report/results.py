"""Folders of results: what was made, and the command that makes it again."""

from __future__ import annotations

from pathlib import Path

from agrivision_repro.core import read_json
from agrivision_repro.data.editions import find_edition


def list_results(
    folder: Path,  # `results/` of the checkout
) -> dict[str, dict]:  # name of each folder of results → its about.json: data, scale, seeds, tables, runs, commit, …
    "Load what is known of each folder of results, in order of names."
    return {path.parent.name: read_json(path) for path in sorted(Path(folder).glob("*/about.json"))}


def results_title(
    about: dict,  # data, scale
) -> str:
    "Return the title of results: that of their data, and the width of the nets if it is the full one."
    return find_edition(about["data"]).title + ", full width" * (about["scale"] in ("workstation", "paper"))


def reproduce_command(
    about: dict,  # data, scale, seeds
    *tables: str,  # keys of `study.tables.TABLES`; none: all
) -> str:
    "Return the command that makes tables on the same data, at the same scale and with the same seeds."
    root = "" if about["data"] == "synthetic" else " --data-root DIR"
    options = f"--scale {about['scale']} --data {about['data']}{root} --seeds {','.join(map(str, about['seeds']))}"
    return " ".join(["agrivision reproduce", *tables, options])
