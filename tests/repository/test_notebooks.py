"The traps of nbdev, papermill and working directories, each closed."

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from export import BLOB, drop_smoke_outputs, is_smoke
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from agrivision_repro.report.kernels import forked_kernels
from agrivision_repro.report.render import NOTHING_LEARNED, banner_text
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import default_out

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODULES = sorted((ROOT / "nbs").glob("*.ipynb"))
HOWTO_NOTEBOOKS = sorted((ROOT / "nbs" / "howto").glob("*.ipynb"))
TABLE_NOTEBOOKS = sorted((ROOT / "nbs" / "tables").glob("*.ipynb"))
EXECUTED = sorted((ROOT / "results").glob("*/notebooks/*.ipynb"))


def stem(path):
    return path.stem


@pytest.mark.parametrize("path", TABLE_NOTEBOOKS, ids=stem)
def test_table_notebook_has_one_parameters_cell(path):
    "Without the tag papermill only warns, and the notebook's own defaults win."
    notebook = nbformat.read(path, as_version=4)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= 8


@pytest.mark.parametrize("path", HOWTO_NOTEBOOKS, ids=stem)
def test_howto_takes_parameters_that_it_explains(path):
    parameters = papermill.inspect_notebook(str(path))
    assert parameters and all(p["inferred_type_name"] != "None" and len(p["help"]) > 10 for p in parameters.values())


@pytest.mark.parametrize("path", TABLE_NOTEBOOKS, ids=stem)
def test_parameters_are_typed_explained_and_known(path):
    from agrivision_repro.study.tables import TABLES, known_parameters

    parameters = papermill.inspect_notebook(str(path))
    known = known_parameters(TABLES[path.stem], *["others"] * (path.stem == "claims"))
    assert set(parameters) == known if TABLES[path.stem]() else "out" in parameters  # a figure of no training needs no data
    for name, parameter in parameters.items():
        assert parameter["inferred_type_name"] != "None", f"{name} has no type"
        assert len(parameter["help"]) > 10, f"{name} has no explanation"
        ast.literal_eval(parameter["default"])


def test_nbdev_clean_keeps_the_parameters_tag(tmp_path):
    "nbdev_clean strips cell metadata unless settings.ini allows it: without those lines this fails."
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path / name)
    folder = tmp_path / "nbs" / "tables"
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "agrivision_repro", tmp_path / "agrivision_repro")
    shutil.copy2(TABLE_NOTEBOOKS[0], folder)
    subprocess.run([BIN / "nbdev_clean"], cwd=tmp_path, check=True)
    cells = nbformat.read(folder / TABLE_NOTEBOOKS[0].name, as_version=4).cells
    assert [c.metadata.tags for c in cells if c.metadata.get("tags")] == [["parameters"]]


def test_papermill_with_an_unknown_parameter_fails(tmp_path):
    "papermill sets any name that it is given; the notebook itself refuses one that it does not know."
    wanted = pytest.raises(papermill.PapermillExecutionError, match="unknown parameter lamda2: this notebook accepts")
    with forked_kernels(), wanted:
        papermill.execute_notebook(
            str(TABLE_NOTEBOOKS[0]), str(tmp_path / "out.ipynb"), {"lamda2": 0.0}, kernel_name="python3", progress_bar=False
        )
    assert not (tmp_path / "runs").exists()


TRAINS = """
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace
result = Workspace(device="cpu").result(plan_run("smoke", "synthetic", depth=18))
"""


def test_training_in_a_notebook_looks_like_no_error(tmp_path, monkeypatch):
    "JupyterLab shows stderr in red: notes and progress bars go to stdout."
    monkeypatch.setenv("TQDM_MININTERVAL", "0")  # every step is drawn, also one within a tenth of a second of the last
    notebook = new_notebook(cells=[new_code_cell(TRAINS)])
    (cell,) = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute().cells
    assert {output.name for output in cell.outputs} == {"stdout"}
    printed = "".join(output.text for output in cell.outputs)
    assert printed.startswith("ResNet18 on NRGB, seed 0: cpu, ") and "40/40" in printed


def test_results_go_to_the_checkout_of_the_current_folder(tmp_path, monkeypatch):
    "JupyterLab starts a notebook in its own folder, papermill in the caller's; outside of a checkout, the current folder is used."
    monkeypatch.delenv("AGRIVISION_OUT", raising=False)
    other = tmp_path / "other" / "nbs"
    for folder in (other, tmp_path / "other" / "agrivision_repro"):
        folder.mkdir(parents=True)
    (tmp_path / "other" / "settings.ini").write_text("")
    for cwd, root in ((ROOT, ROOT), (ROOT / "nbs" / "tables", ROOT), (other, other.parent), (tmp_path, tmp_path)):
        monkeypatch.chdir(cwd)
        assert default_out() == root / "out"


@pytest.mark.parametrize("path", MODULES + TABLE_NOTEBOOKS + HOWTO_NOTEBOOKS, ids=stem)
def test_notebook_is_small_and_shows_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert len(notebook.cells) <= 80 and path.stat().st_size <= 400_000
    is_without = path in TABLE_NOTEBOOKS and is_smoke(notebook)
    assert any(c.outputs for c in code) != is_without, "outputs of smoke runs, or none at all: run make notebooks"
    assert not any("skip_exec" in c.source or "eval: false" in c.source for c in notebook.cells)


def smoke_outputs(notebook: nbformat.NotebookNode) -> list[int]:
    "List the cells with the banner of a run that learned nothing among their saved outputs."
    outputs = {k: json.dumps(cell.outputs) for k, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    return [k for k, output in outputs.items() if NOTHING_LEARNED in output]


@pytest.mark.parametrize("path", MODULES + TABLE_NOTEBOOKS + HOWTO_NOTEBOOKS + EXECUTED, ids=stem)
def test_no_saved_output_shows_a_smoke_run(path):
    assert smoke_outputs(nbformat.read(path, as_version=4)) == []


def test_a_smoke_output_is_found_and_dropped(tmp_path):
    "The banner itself is found; the export removes the outputs of a table that trains at smoke by default, and of no other."
    banner = banner_text([SimpleNamespace(run=plan_run("smoke", "synthetic"))])
    folder = tmp_path / "nbs" / "tables"
    folder.mkdir(parents=True)
    for name in ("table1_modality", "fig_schedule"):
        notebook = nbformat.read(ROOT / "nbs" / "tables" / f"{name}.ipynb", as_version=4)
        notebook.cells[2].outputs = [nbformat.v4.new_output("display_data", {"text/markdown": banner})]
        assert smoke_outputs(notebook) == [2]
        nbformat.write(notebook, folder / f"{name}.ipynb")
    drop_smoke_outputs(tmp_path)
    kept = {path.stem: nbformat.read(path, as_version=4) for path in folder.iterdir()}
    assert {name: smoke_outputs(notebook) for name, notebook in kept.items()} == {"table1_modality": [], "fig_schedule": [2]}
    head = kept["table1_modality"].cells[0].source
    assert head.endswith("Results are made by\n`agrivision reproduce table1_modality --scale laptop --data synthetic --seeds 0,1,2`.")


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_a_table_links_to_its_results(path):
    head = nbformat.read(ROOT / "nbs" / "tables" / path.name, as_version=4).cells[0].source
    assert f"[{path.parents[1].name}]({BLOB}/{path.relative_to(ROOT)})" in head and f"`agrivision reproduce {path.stem} --scale" in head


@pytest.mark.parametrize("path", MODULES + TABLE_NOTEBOOKS + HOWTO_NOTEBOOKS, ids=stem)
def test_no_example_scrolls_sideways(path):
    "JupyterLab shows about 95 columns beside its file browser; definitions keep the package's lines."
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    examples = [cell for cell in cells if not cell.startswith("#| export")]
    assert [line for cell in examples for line in cell.splitlines() if len(line) > 88] == []


@pytest.mark.parametrize("path", MODULES + TABLE_NOTEBOOKS + HOWTO_NOTEBOOKS + EXECUTED, ids=stem)
def test_no_line_is_lost_on_the_site(path):
    "MyST, which makes the site, takes a line that begins with % for a comment."
    cells = nbformat.read(path, as_version=4).cells
    shown = [output.data.get("text/markdown", "") for cell in cells for output in cell.get("outputs", ()) if "data" in output]
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"] + shown
    assert [line for text in texts for line in text.splitlines() if line.lstrip().startswith("%")] == []


@pytest.mark.parametrize("path", MODULES + HOWTO_NOTEBOOKS, ids=stem)
def test_cells_are_short(path):
    "At most 25 lines, but for one class or table of constants a cell."
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        lines = [line for line in cell.source.splitlines() if line.strip()]
        body = ast.parse("\n".join(line for line in lines if not line.startswith("%"))).body
        functions = [n for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.FunctionDef)]
        for function in functions:
            first = function.body[0].lineno  # the signature's parameter comments do not count
            assert function.end_lineno - first < 25, f"{path.stem}: {function.name} is too long"
