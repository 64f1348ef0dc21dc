"Kernels of a report's notebooks are forked from a process that has imported everything, and end with their owner."

import multiprocessing
import subprocess
import sys

import psutil
from forked import wait_until
from jupyter_client.provisioning import KernelProvisionerFactory

from agrivision_repro.report.kernels import forked_kernels

OWNER = '''
import sys
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from agrivision_repro.report.kernels import forked_kernels

CELL = """
import multiprocessing, os, time
from pathlib import Path
Path({!r}).write_text(f"{{os.getpid()}} {{multiprocessing.get_start_method()}}.")
time.sleep(300)
"""
with forked_kernels():
    NotebookClient(new_notebook(cells=[new_code_cell(CELL.format(sys.argv[1]))]), kernel_name="python3").execute()
'''


def test_a_kernel_is_a_fork_that_ends_with_its_owner(tmp_path):
    "Also where the owner is killed: neither the kernel nor the fork server stays."
    written = tmp_path / "pid"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, written], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: written.exists() and written.read_text().endswith("."))
    pid, method = written.read_text().rstrip(".").split()
    assert method == multiprocessing.get_all_start_methods()[0], "its pools start as in any kernel"
    kernel = psutil.Process(int(pid))
    server = kernel.parent()
    assert "forkserver" in " ".join(server.cmdline()) and server.ppid() == owner.pid
    owner.kill()
    owner.wait()
    wait_until(lambda: not kernel.is_running() and not server.is_running())


def test_other_kernels_of_the_process_are_not_forked():
    usual = KernelProvisionerFactory.instance().default_provisioner_name
    with forked_kernels():
        assert KernelProvisionerFactory.instance().default_provisioner_name != usual
    assert KernelProvisionerFactory.instance().default_provisioner_name == usual
