"The repository says everything once, and what it says twice agrees."

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest
import yaml
from forked import run

from agrivision_repro.models.backbones import NORMS

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "agrivision_repro").rglob("[!_]*.py"))
EXTRAS = "notebooks,cluster,geo,onnx,dev"


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


def test_imports_are_few():
    "Importing the package loads nothing that makes or runs notebooks; `agrivision --help` not even torch."
    heavy = ("nbdev", "fastcore", "execnb", "jupyterlab", "papermill", "nbconvert", "nbformat", "IPython", "ray", "rasterio")
    modules = [m for m in MODULES if m != "agrivision_repro.report.pages"]
    script = f"import sys, {', '.join(modules)}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    script = "import sys; from agrivision_repro.cli import app; sys.argv = ['agrivision', '--help']\n"
    script += "try: app.main()\nexcept SystemExit: print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


WITHOUT = """
import sys
MISSING = {"papermill", "ipykernel", "nbconvert", "nbformat", "IPython", "latex2mathml", "jupyterlab", "nbdev", "fastcore"}
class Missing:
    "As if the extra `notebooks` were not installed."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
sys.meta_path.insert(0, Missing())
plain = importlib.util.find_spec
def find_spec(name, package=None):
    try: return plain(name, package)
    except ModuleNotFoundError: return None
importlib.util.find_spec = find_spec
from pathlib import Path
from agrivision_repro.cli.app import main
def command(*words):
    sys.argv = ["agrivision", *map(str, words)]
    try: main()
    except SystemExit as end: return end.code
assert not command("train", "--scale", "smoke", "-p", "norm=ibn_s", "-p", "depth=18", "-p", "channels=rgbn")
(folder,) = Path("out/runs").iterdir()
assert not command("predict", folder.name, next(Path("out").rglob("rgb/*.jpg")), "-o", "predicted")
assert any(Path("predicted").iterdir())
sys.exit(command("reproduce", "--scale", "smoke"))
"""


def imported(path, package, seen):
    "Names of the modules that importing a file imports, through this package, from what its top level says."
    found, lines = set(), [line for line in ast.parse(path.read_text()).body if isinstance(line, ast.Import | ast.ImportFrom)]
    for line in lines:
        origin = resolve_name("." * line.level + (line.module or ""), package) if isinstance(line, ast.ImportFrom) else ""
        found |= {origin} if origin else {alias.name for alias in line.names}
    for name in sorted(name for name in found if name.startswith("agrivision_repro.") and name not in seen):
        seen.add(name)
        found |= imported(ROOT / f"{name.replace('.', '/')}.py", name.rpartition(".")[0], seen)
    return {name.partition(".")[0] for name in found if not name.startswith("agrivision_repro")} - sys.stdlib_module_names


def test_torch_hub_names_what_is_missing():
    "Everything that importing hubconf.py needs is in its list, as torch.hub looks it up."
    lines = ast.parse((ROOT / "hubconf.py").read_text()).body
    named = next(ast.literal_eval(line.value) for line in lines if isinstance(line, ast.Assign))
    needed = imported(ROOT / "hubconf.py", "", set())
    assert needed <= set(named) and {"torch", "PIL"} <= needed and all(find_spec(name) for name in named)


def test_trains_and_predicts_without_the_notebooks_extra(tmp_path):
    "What `pip install agrivision_repro` brings is enough for all but notebooks, and they say what is missing."
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True)
    refused = [line for line in done.stderr.splitlines() if line.startswith("agrivision: ")]
    assert done.returncode == 2 and len(refused) == 1 and "'.[notebooks]' in the checkout" in refused[0], done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel of this checkout."
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(ROOT, folder)


def build_wheel(source, folder):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_carries_the_table_notebooks(wheel):
    "One copy in the repository; the wheel's is byte for byte that."
    inside = {Path(n).name: wheel.read(n) for n in wheel.namelist() if n.startswith("agrivision_repro/notebooks/")}
    assert inside == {p.name: p.read_bytes() for p in (ROOT / "nbs" / "tables").glob("*.ipynb")}
    assert "table1_modality.ipynb" in inside and "agrivision_repro/py.typed" in wheel.namelist()  # its types are for others to use


def test_wheel_carries_the_templates_of_the_report(wheel):
    inside = {Path(n).name: wheel.read(n) for n in wheel.namelist() if n.startswith("agrivision_repro/report/templates/")}
    assert inside == {p.name: p.read_bytes() for p in (ROOT / "agrivision_repro" / "report" / "templates").iterdir()}
    assert inside.keys() == {"report.html.j2", "notebook.html.j2"}


def test_wheel_asks_for_no_notebooks(wheel):
    "Jupyter and nbdev come with extras only."
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    needed = [line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    names = {re.split(r"[<>=!;]", word)[0] for word in needed}
    assert {"torch", "timm", "typer"} <= names
    assert not names & {"papermill", "ipykernel", "ipywidgets", "nbconvert", "nbformat", "jupyterlab", "nbdev", "ray", "rasterio"}
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE))
    assert extras == {*EXTRAS.split(",")}


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    "From the source archive alone, with no checkout beside it."
    copy = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    script = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=copy, check=True, capture_output=True)
    again = build_wheel(next(tmp_path.glob("*.tar.gz")), tmp_path)
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_types_hold():
    "mypy on the exported package, with the settings of pyproject.toml."
    done = subprocess.run([sys.executable, "-m", "mypy", "--no-incremental"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_tables_and_notebooks_are_the_same():
    from agrivision_repro.study.tables import TABLES, table_notebook

    assert sorted(TABLES) == sorted(p.stem for p in (ROOT / "nbs" / "tables").glob("*.ipynb"))
    assert table_notebook("table1_modality") == ROOT / "nbs" / "tables" / "table1_modality.ipynb"


def test_out_of_step_is_found_and_named(tmp_path):
    "The check that CI begins with can fail: a module edited by hand, a dirty notebook, a README edited by hand."
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
    words = [ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--out", tmp_path / "gpu.json"]
    done = run(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == [] and len(report["parity"]) == 9 + len(NORMS)
    assert report["training"]["float32"]["tiles/s"] > 0 and report["machine"]["precision"]


@pytest.mark.parametrize("module", MODULES)
def test_star_import(module):
    "`__all__` lists nothing that the module lacks (timm adds the names of registered models to it)."
    namespace: dict = {}
    exec(f"from {module} import *", namespace)  # noqa: S102
    assert len(namespace) > 1
