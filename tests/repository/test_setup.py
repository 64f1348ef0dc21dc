"The set-up says in plain words what is missing."

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_venv.sh"


def set_up(folder: Path, python: str):
    environment = os.environ | {"PYTHON": python}
    return subprocess.run(["sh", SCRIPT, folder / ".venv"], env=environment, capture_output=True, text=True)


def fake_python(path: Path, refuses: str) -> str:
    "A Python that fails whenever its command mentions `refuses`."
    path.write_text(f'#!/bin/sh\ncase "$*" in *"{refuses}"*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("refuses", "says"),
    [("version_info", ["No Python of version 3.11 or newer found"]), ("import venv", ["venv module is missing", "python3-venv"])],
)
def test_what_is_missing(refuses, says, tmp_path):
    done = set_up(tmp_path, fake_python(tmp_path / "python3", refuses))
    assert done.returncode == 1
    assert all(words in done.stderr for words in says)
    assert not (tmp_path / ".venv").exists()
