"""Check that the notebooks are clean and that the package and README.md match their export."""

import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from export import ROOT, export

COPIED = ("nbs", "agrivision_repro", "results", "settings.ini", "pyproject.toml", "README.md")


def list_files(folder: Path) -> set[Path]:
    "List the files to compare: notebooks, modules and README.md."
    every = [*folder.glob("nbs/**/*.ipynb"), *folder.glob("agrivision_repro/**/*.py"), folder / "README.md"]
    return {p.relative_to(folder) for p in every if ".ipynb_checkpoints" not in p.parts}


def find_differences(root: Path) -> list[str]:
    "Export a copy of the checkout and list every file that differs."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / root.name
        copy.mkdir()
        for name in COPIED:
            source = root / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy / name)
        export(copy)
        files = list_files(root) | list_files(copy)
        _, differ, missing = filecmp.cmpfiles(root, copy, files, shallow=False)
    return sorted(map(str, differ + missing))


if __name__ == "__main__":
    different = find_differences(ROOT)
    if different:
        sys.exit(f"not up to date with the notebooks: {', '.join(different)}\nfix with: make export")
    print("notebooks clean, package and README.md up to date")
