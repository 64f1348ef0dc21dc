"""Run nbdev_test on every notebook with a time limit; results go to a temporary folder, or to a new folder that is kept.

usage: run_nbdev_test.py [--out FOLDER] [OPTION ...]     other options are nbdev_test's, such as --path NOTEBOOK
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1200  # seconds; nbdev_test has no limit of its own
ROOT = Path(__file__).resolve().parents[1]


def run_notebooks(out: str, options: list[str]) -> int | str:  # exit code, or a message
    "Run nbdev_test, two notebooks at a time, with one thread each."
    command = [Path(sys.executable).parent / "nbdev_test", "--n_workers", "2", "--do_print", *options]
    try:
        return subprocess.run(command, cwd=ROOT, env=os.environ | {"AGRIVISION_OUT": out, "OMP_NUM_THREADS": "1"}, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        return f"nbdev_test ran longer than {LIMIT} s: a notebook hangs, or is too slow for CI"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; what it holds is removed first")
    known, options = parser.parse_known_args()
    if known.out:
        shutil.rmtree(known.out, ignore_errors=True)
        sys.exit(run_notebooks(str(known.out.resolve()), options))
    with tempfile.TemporaryDirectory() as out:
        sys.exit(run_notebooks(out, options))
