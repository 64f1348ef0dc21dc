"Pools of processes work, and end with the process that made them, however Python starts processes; files are synced."

import os
import subprocess
import sys

import pytest
from forked import wait_until

from agrivision_repro.core import replace_file

SCRIPT = """
import multiprocessing, os, sys, time
from agrivision_repro.core import worker_pool

def work(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)
    return seconds

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    with worker_pool(2) as pool:
        assert list(pool.map(work, [1.5])) == [1.5]  # longer than the watch of the parent takes to notice
        list(pool.map(work, [100]))
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])  # Linux: fork up to Python 3.13, forkserver from 3.14
def test_workers_end_with_the_process_that_made_the_pool(method, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", method], stdout=subprocess.PIPE, text=True)
    first, second = (process.stdout.readline().strip() for _ in range(2))
    assert first and second, "the pool broke"
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(int(second)))


def test_a_file_is_synced_through_a_handle_that_may_write(tmp_path, monkeypatch):
    "Windows refuses any other."
    fcntl, modes = pytest.importorskip("fcntl"), []
    monkeypatch.setattr(os, "fsync", lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
    replace_file(tmp_path / "a", lambda path: path.write_text("whole"))
    assert modes == [os.O_RDWR] and (tmp_path / "a").read_text() == "whole"
