"The repository says everything once, and what it says twice agrees."

import json
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
EXTRAS = "notebooks,cluster,geo,dev"


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def words(settings, key):
    return shlex.split(settings[key])


def test_pyproject_agrees_with_settings(settings):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, nbdev = pyproject["project"], pyproject["tool"]["nbdev"]
    assert project["name"] == settings["lib_name"]
    assert project["requires-python"] == f">={settings['min_python']}"
    assert nbdev["tst_flags"] == settings["tst_flags"]
    for key in ("allowed_metadata_keys", "allowed_cell_metadata_keys"):
        assert nbdev[key] == settings[key].split()
    assert not nbdev["update_pyproject"] and settings["update_pyproject"] == "False"


def test_version_stands_once(settings):
    import agrivision_repro

    assert agrivision_repro.__version__ == settings["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == settings["version"]
    assert citation["preferred-citation"]["title"].startswith("Reducing the feature divergence")


def test_environment_adds_nothing_to_settings(settings):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert environment["channels"][0] == "conda-forge"
    assert {re.split(r"[<>= ]", d)[0] for d in conda} == {"python", "pip", "make"}
    assert f">={settings['min_python']}" in next(d for d in conda if d.startswith("python"))
    assert pip == ["-c constraints.txt", f"-e .[{EXTRAS}]"]
    assert all(f"{extra}_requirements" in settings for extra in EXTRAS.split(","))
    assert f"-e '.[{EXTRAS}]'" in (ROOT / "tools" / "make_venv.sh").read_text()


def test_every_requirement_is_constrained(settings):
    "`make` installs exact versions of everything that is asked for."
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    asked = [word for key in settings if key.endswith("requirements") for word in words(settings, key)]
    assert any(word.startswith("ray") for word in asked)
    names = {re.split(r"[<>=!\[]", word)[0].lower().replace("_", "-") for word in asked}
    assert names <= pinned, names - pinned


def test_package_imports_neither_nbdev_nor_fastcore():
    script = "import agrivision_repro.cli, agrivision_repro.report, agrivision_repro.tables, sys; "
    script += "print([m for m in ('nbdev', 'fastcore', 'execnb', 'jupyterlab') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wheel_carries_the_table_notebooks(tmp_path):
    "One copy in the repository; the wheel's is byte for byte that."
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {Path(n).name: wheel.read(n) for n in wheel.namelist() if n.startswith("agrivision_repro/notebooks/")}
        assert "agrivision_repro/py.typed" in wheel.namelist()  # its types are for others to use
    assert inside == {p.name: p.read_bytes() for p in (ROOT / "nbs" / "tables").glob("*.ipynb")}
    assert "table1_modality.ipynb" in inside


def test_tables_and_notebooks_are_the_same():
    from agrivision_repro.tables import TABLES, table_notebook

    assert sorted(TABLES) == sorted(p.stem for p in (ROOT / "nbs" / "tables").glob("*.ipynb"))
    assert table_notebook("table1_modality") == ROOT / "nbs" / "tables" / "table1_modality.ipynb"


def test_out_of_step_is_found_and_named(tmp_path):
    "The check that CI begins with can fail: a module edited by hand, a dirty notebook, a README edited by hand."
    import shutil

    from check_in_step import COPIED, find_differences

    copy = tmp_path / "copy"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy / name)
    assert find_differences(copy) == []
    with (copy / "agrivision_repro" / "metrics.py").open("a") as file:
        file.write("# by hand\n")
    with (copy / "README.md").open("a") as file:
        file.write("by hand\n")
    notebook = copy / "nbs" / "32_metrics.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    assert find_differences(copy) == ["README.md", "agrivision_repro/metrics.py", "nbs/32_metrics.ipynb"]


def test_the_gpu_check_runs(tmp_path):
    "On a CPU, small: the same code, every parity within its bound."
    words = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--out", tmp_path / "gpu.json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == [] and len(report["parity"]) == 12
    assert report["training"]["float32"]["tiles/s"] > 0 and report["machine"]["precision"]
