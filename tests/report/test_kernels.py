"Kernels of a report's notebooks are forked from a process that has imported everything, and end with their owner."

import subprocess
import sys

import psutil
from forked import wait_until

OWNER = """
import sys
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from agrivision_repro.report.kernels import fork_kernels

fork_kernels()
cell = f"import os, time; from pathlib import Path; Path({sys.argv[1]!r}).write_text(f'{{os.getpid()}}\\\\n'); time.sleep(300)"
NotebookClient(new_notebook(cells=[new_code_cell(cell)]), kernel_name="python3").execute()
"""


def test_a_kernel_is_a_fork_that_ends_with_its_owner(tmp_path):
    "Also where the owner is killed: neither the kernel nor the fork server stays."
    written = tmp_path / "pid"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, written], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: written.exists() and written.read_text().endswith("\n"))
    kernel = psutil.Process(int(written.read_text()))
    server = kernel.parent()
    assert "forkserver" in " ".join(server.cmdline()) and server.ppid() == owner.pid
    owner.kill()
    owner.wait()
    wait_until(lambda: not kernel.is_running() and not server.is_running())
