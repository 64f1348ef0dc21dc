"""Run nbdev_test on every notebook with a temporary results folder and a time limit."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1200  # seconds; nbdev_test has no limit of its own

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        command = [Path(sys.executable).parent / "nbdev_test", "--n_workers", "2", "--do_print", *sys.argv[1:]]
        environment = os.environ | {"AGRIVISION_OUT": out, "OMP_NUM_THREADS": "1"}  # two notebooks, two cores
        root = Path(__file__).resolve().parents[1]
        try:
            sys.exit(subprocess.run(command, cwd=root, env=environment, timeout=LIMIT).returncode)
        except subprocess.TimeoutExpired:
            sys.exit(f"nbdev_test ran longer than {LIMIT} s: a notebook hangs, or is too slow for CI")
