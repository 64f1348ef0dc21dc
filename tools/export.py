"""Regenerate the package and README.md from the notebooks, and clean the notebooks.

usage: export.py [--run] [NAME ...]     --run executes the notebooks (all, or those named) and saves their outputs
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor, TagRemovePreprocessor

from agrivision_repro.plots import shrink_outputs
from agrivision_repro.report.results import list_results, reproduce_command

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
BLOB = f"{SETTINGS['DEFAULT']['git_url']}/blob/{SETTINGS['DEFAULT']['branch']}"
UNMADE = {"scale": "laptop", "data": "synthetic", "seeds": [0, 1, 2]}  # for a table without results
WITHOUT_OUTPUTS = "In `nbs/tables` this notebook is saved without outputs: with its defaults nothing is learned."


def find_notebooks(names: list[str]) -> list[Path]:
    "List the notebooks in reading order, with the index last: it shows the others' outputs."
    every = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    every.sort(key=lambda p: (p.stem == "index", p.parent != NBS, p.name))
    unknown = set(names) - {p.stem for p in every}
    if unknown:
        sys.exit(f"no notebook {', '.join(sorted(unknown))}: wanted {', '.join(p.stem for p in every)}")
    return [p for p in every if not names or p.stem in names]


def run(path: Path) -> None:
    "Execute a notebook in its own folder and save its outputs, without progress bars and with small pictures."
    notebook = nbformat.read(path, as_version=4)
    executor = ExecutePreprocessor(timeout=600, kernel_name="python3", coalesce_streams=True)
    executor.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for output in (o for o in cell.outputs if o.output_type == "stream"):
                output.text = re.sub(r"[^\n]*\r", "", output.text)  # progress bars
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and (o.name == "stderr" or not o.text.strip()))]
    shrink_outputs(notebook.cells)
    path.write_text(nbformat.writes(notebook).replace(f"{Path(os.environ['AGRIVISION_OUT']).parent}/", "") + "\n")
    print(f"ran {path.relative_to(ROOT)}")


def write_readme(root: Path) -> None:
    "Render nbs/index.ipynb as README.md."
    notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    exporter = MarkdownExporter()
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"hide-input"}), enabled=True)
    text, resources = exporter.from_notebook_node(notebook)
    if resources["outputs"]:
        sys.exit("nbs/index.ipynb shows a picture as an output: show a file of results/ instead")
    text = text.replace("](../", "](")
    text = re.sub(r"\]\((?!https?:|nbs/|#)([\w/]+\.ipynb)\)", r"](nbs/\1)", text)
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{3,}", "\n\n", text)).strip()
    (root / "README.md").write_text(f"<!-- generated from nbs/index.ipynb: do not edit -->\n\n{text}\n", encoding="utf-8")


def is_smoke(notebook: nbformat.NotebookNode) -> bool:
    "Return True if a table notebook trains at `smoke` by default, where nothing is learned."
    return any("parameters" in cell.metadata.get("tags", []) and 'scale: str = "smoke"' in cell.source for cell in notebook.cells)


def link_results(table: str, root: Path) -> str:  # Markdown
    "Link to the executed notebooks of a table in results/, and name the command that makes one."
    about, ending = list_results(root / "results"), f"notebooks/{table}.ipynb"
    links = {name: f"[{name}]({BLOB}/results/{name}/{ending})" for name in about if (root / "results" / name / ending).is_file()}
    command = reproduce_command(about.get(next(iter(links), ""), UNMADE), table)
    found = f"Results: {', '.join(links.values())}. The command of the first:" if links else "Results are made by"
    return f"{WITHOUT_OUTPUTS} {found}\n`{command}`."


def drop_smoke_outputs(root: Path) -> None:
    "Remove the outputs of table notebooks that train at `smoke` by default, and link to their results instead."
    for path in sorted((root / "nbs" / "tables").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if is_smoke(notebook):
            for cell in notebook.cells:
                cell.update({"outputs": []} if cell.cell_type == "code" else {})
            head = notebook.cells[0]
            head.source = f"{head.source.partition(WITHOUT_OUTPUTS)[0].rstrip()}\n\n{link_results(path.stem, root)}"
            nbformat.write(notebook, path)


def export(root: Path) -> None:
    "Export the package, clean the notebooks and write README.md in the checkout `root`."
    drop_smoke_outputs(root)
    bin_folder = Path(sys.executable).parent
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([bin_folder / command], cwd=root, check=True)
    write_readme(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    export(ROOT)
    if args.run:
        os.environ["AGRIVISION_OUT"] = f"{tempfile.mkdtemp()}/out"  # so that notebooks retrain
        for notebook_path in find_notebooks(args.names):
            run(notebook_path)
        export(ROOT)
