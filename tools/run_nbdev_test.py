"""Run nbdev_test on every notebook with a time limit; results go to a temporary folder, or to a new folder that is kept.

usage: run_nbdev_test.py [--out FOLDER] [OPTION ...]     other options are nbdev_test's, such as --path NOTEBOOK
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1200  # seconds; nbdev_test has no limit of its own
ROOT = Path(__file__).resolve().parents[1]
SELDOM = "import gc, runpy, sys; gc.set_threshold(20_000); del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
NBDEV_TEST = [sys.executable, "-c", SELDOM, Path(sys.executable).parent / "nbdev_test"]  # seeking garbage seldom takes a tenth less time
OTHERS = ["--skip_folder_re", "^[_.]|^tables$"]


def run_notebooks(out: str, options: list[str]) -> int | str:  # exit code, or a message
    "Run nbdev_test with one thread per notebook; the tables, of which the last one trains longest, beside all others."
    parts = [["--n_workers", "2", *options]] if options else [["--n_workers", "1", "--path", "nbs/tables"], ["--n_workers", "2", *OTHERS]]
    environment = os.environ | {"AGRIVISION_OUT": out, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*NBDEV_TEST, "--do_print", *part], cwd=ROOT, env=environment, start_new_session=True) for part in parts]
    until = time.monotonic() + LIMIT
    try:
        codes = [process.wait(until - time.monotonic()) for process in started]
        return next(filter(None, codes), 0)
    except subprocess.TimeoutExpired:
        return f"nbdev_test ran longer than {LIMIT} s: a notebook hangs, or is too slow for CI"
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; what it holds is removed first")
    known, options = parser.parse_known_args()
    if known.out:
        shutil.rmtree(known.out, ignore_errors=True)
        sys.exit(run_notebooks(str(known.out.resolve()), options))
    with tempfile.TemporaryDirectory() as out:
        sys.exit(run_notebooks(out, options))
