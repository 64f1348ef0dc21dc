"The runs that the notebooks have just trained, in `make test`: what else needs them does not train them again."

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from agrivision_repro.runs.run import Run
from agrivision_repro.runs.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


def take_runs(runs: Iterable[Run], out: Path) -> None:
    "Copy runs of scale `smoke` and their tiles into a folder of results; without the notebooks' runs, copy nothing."
    if "SMOKE" in os.environ:
        notebooks = Workspace(ROOT / os.environ["SMOKE"], device="cpu")
        for folder in set(map(notebooks.folder, runs)):
            shutil.copytree(folder.path, out / "runs" / folder.name)
        shutil.copytree(notebooks.out / "data", out / "data")
