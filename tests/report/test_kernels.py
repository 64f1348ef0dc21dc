"Kernels of a report's notebooks are forked from a process that has imported everything, and end with their owner."

import multiprocessing
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from forked import wait_until
from jupyter_client.connect import LocalPortCache
from jupyter_client.provisioning import KernelProvisionerFactory
from nbformat.v4 import new_code_cell, new_notebook

from agrivision_repro.report.kernels import execute, forked_kernels, kernel_pool

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


@pytest.mark.slow
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


def write_notebook(path: Path, source: str) -> Path:
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), path)
    return path


def test_a_port_that_is_taken_meanwhile_is_no_failure(tmp_path, monkeypatch):
    "The first kernel cannot open its port and exits; the second is given others."
    path = write_notebook(tmp_path / "one.ipynb", "print(6 * 7)")
    find, asked = LocalPortCache.find_available_port, []
    with socket.create_server(("127.0.0.1", 0)) as taken, forked_kernels():

        def choose(cache: LocalPortCache, ip: str) -> int:
            asked.append(ip)
            return find(cache, ip) if asked[1:] else taken.getsockname()[1]

        monkeypatch.setattr(LocalPortCache, "find_available_port", choose)
        assert execute(path, {}) == ""
    assert len(asked) == 2 * 5
    assert "42" in nbformat.read(path, 4).cells[-1].outputs[0].text


def test_a_kernel_that_never_starts_is_one_line(tmp_path, monkeypatch):
    path = write_notebook(tmp_path / "one.ipynb", "print(6 * 7)")
    with socket.create_server(("127.0.0.1", 0)) as taken, forked_kernels():
        monkeypatch.setattr(LocalPortCache, "find_available_port", lambda *_: taken.getsockname()[1])
        assert execute(path, {}).startswith("no kernel started in 3 attempts: Kernel died")


def test_notebooks_side_by_side_leave_the_current_folder_alone(tmp_path, monkeypatch):
    "Each runs in its own folder, and relative paths keep their meaning, although the first to start ends first."
    monkeypatch.chdir(tmp_path)
    with kernel_pool(2) as pool:
        executed = []
        for name, seconds in (("first", 2), ("second", 4)):
            Path(name).mkdir()
            source = f"import os, time; open('started', 'w').close(); time.sleep({seconds}); print(os.getcwd())"
            executed.append(pool.submit(execute, write_notebook(Path(name) / "one.ipynb", source), {}))
            wait_until((tmp_path / name / "started").exists)
            assert Path.cwd() == tmp_path
        assert [future.result() for future in executed] == ["", ""]
    assert Path.cwd() == tmp_path
    for name in ("first", "second"):
        assert nbformat.read(tmp_path / name / "one.ipynb", 4).cells[-1].outputs[0].text.strip() == str(tmp_path / name)
