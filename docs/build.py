"""Build the site: the notebooks with their saved outputs, and the API, as self-contained pages.

usage: build.py [OUT]     OUT defaults to _docs; its contents are replaced
"""

import ast
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Container
from pathlib import Path

import found
import llms
from api import BLOB, Module, definitions, list_modules, write_api
from found import read_lead
from sphinx.cmd.build import main as run_sphinx

from agrivision_repro.report.results import list_results
from agrivision_repro.study.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
NBS, RESULTS = ROOT / "nbs", ROOT / "results"
# the sidebar: each caption, and the notebooks of nbs/ under it, sorted by name
PARTS = {
    "What we found": ["answer", "explore", "benchmarks"],  # after the pages of results/
    "The paper": ["0?_*"],
    "Data": ["1?_*"],
    "Models": ["2?_*"],
    "Losses and metrics": ["3?_*"],
    "Divergence": ["4?_*"],
    "Training and runs": ["5?_*", "6[0-5]_*"],
    "Figures and report": ["6[6-9]_*", "7?_*"],
    "Prediction, deviations": ["8?_*", "9?_*"],
    "Tables and figures": ["tables/*"],
    "How-to": ["howto/*"],
}
FOUND = next(iter(PARTS))
EXECUTED = re.compile(rf"{re.escape(BLOB)}/results/([\w.-]+)/notebooks/(\w+\.ipynb)")
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=[)#])")


def sort_notebooks() -> dict[str, list[Path]]:
    "Assign the notebooks to parts; raise ValueError for one that is in no part, or in two."
    parts = {caption: [p for glob in globs for p in sorted(NBS.glob(f"{glob}.ipynb"))] for caption, globs in PARTS.items()}
    placed = [NBS / "index.ipynb", *(p for paths in parts.values() for p in paths)]
    every = [p for p in sorted(NBS.rglob("*.ipynb")) if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)]
    wrong = [str(p.relative_to(NBS)) for p in every if placed.count(p) != 1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: wanted each notebook in one part of PARTS")
    return {caption: paths for caption, paths in parts.items() if paths}


def link_outwards(text: str, folder: Path) -> str:
    "Point links to files that are not pages to the repository; raise ValueError if there is no such file."

    def rewrite(match: re.Match) -> str:
        target = next((p for p in ((folder / match[1]).resolve(), ROOT / match[1]) if p.exists()), None)
        if target is None:
            raise ValueError(f"link to {match[1]} from {folder.relative_to(ROOT)}: no such file")
        if target.is_relative_to(RESULTS) and target.suffix == ".png":
            return f"/results/{target.relative_to(RESULTS)}"
        is_page = target.is_relative_to(NBS) and target.suffix in (".ipynb", ".png")
        return f"/{target.relative_to(NBS)}" if is_page else f"{BLOB}/{target.relative_to(ROOT)}"

    for name in re.findall(rf"{re.escape(BLOB)}/([\w./-]+\w)", text):
        if not (ROOT / name).exists():
            raise ValueError(f"link to {name} in the repository: no such file")
    return EXECUTED.sub(r"/results/\1/\2", LINK.sub(rewrite, text))


def markdown_cell(name: str, text: str) -> dict:
    return {"id": re.sub(r"\W", "-", name), "cell_type": "markdown", "metadata": {}, "source": text}


def stage_notebook(path: Path, stage: Path, extra: list[dict]) -> Module | None:
    "Copy a notebook without directives; return the module that it exports, with the cell that defines each name."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells, labels, module = [], {}, None
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(cell | {"source": link_outwards(source, path.parent)})
            continue
        found = re.search(r"^#\s*\|\s*default_exp\s+(\S+)", source, re.M)
        module = found[1] if found else module
        if re.search(r"^#\s*\|\s*export\b", source, re.M):
            label = f"{path.stem}-{number}"
            labels |= dict.fromkeys(definitions(ast.parse(source)), label)
            cells.append(markdown_cell(label, f"({label})="))
        source = DIRECTIVE.sub("", source).strip()
        if source:
            cells.append(cell | {"source": source, "metadata": show(cell["metadata"]), "outputs": link_tables(cell["outputs"])})
    write_notebook(notebook | {"cells": cells + extra}, stage / path.relative_to(NBS))
    title = "".join(cells[0]["source"]).partition("\n")[0].removeprefix("# ")
    return Module(module, title, path.stem, labels) if module else None


def write_notebook(notebook: dict, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def stage_results(stage: Path) -> list[str]:  # pages
    "Write a page per folder of results, and its executed notebooks with their outputs."
    for name, about in list_results(RESULTS).items():
        page = stage / "results" / name / "index.md"
        page.parent.mkdir(parents=True)
        page.write_text(found.write_page(name, about), encoding="utf-8")
    for name, path, title, making in found.each_notebook():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        made = {p.stem for p in path.parent.glob("*.ipynb")}
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            is_text = cell["cell_type"] == "markdown"
            cell.update({"source": link_outwards(source, NBS / "tables")} if is_text else {"outputs": link_tables(cell["outputs"], made)})
        head = notebook["cells"][0]["source"].partition("\n")[2].partition("\n\nIn `nbs/tables`")[0]
        notebook["cells"][0]["source"] = f"# {title}\n{head}\n\n{making} [All of {name}](index.md)."
        write_notebook(notebook, stage / "results" / name / path.name)
    return [f"results/{name}/index" for name in list_results(RESULTS)]


def show(metadata: dict) -> dict:
    "Translate a cell's tags to those of myst-nb."
    return metadata | {"tags": ["remove-input" if tag == "hide-input" else tag for tag in metadata.get("tags", [])]}


def link_tables(outputs: list[dict], made: Container[str] = TABLES) -> list[dict]:
    "Point links into the report to the notebook of the same name, executed beside this one if it was."

    def rewrite(match: re.Match) -> str:
        return f"{'' if match[1] in made else '../../tables/'}{match[1]}.html"

    return json.loads(re.sub(r"(?:\.\./)?index\.html#(\w+)", rewrite, json.dumps(outputs)))


def toctree(caption: str, pages: list[str]) -> dict:
    "Make a cell that lists pages under a caption in the sidebar."
    return markdown_cell(caption, "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))


def list_pages(parts: dict[str, list[Path]]) -> dict[str, list[tuple[str, str, str]]]:  # part → title, page with its suffix, sentence
    "List the pages of every part with the sentence that says what each teaches."
    pages = {caption: [(*read_lead(path), str(path.relative_to(NBS))) for path in paths] for caption, paths in parts.items()}
    for name, about in reversed(list_results(RESULTS).items()):
        pages[FOUND].insert(0, (found.page_title(name, about), ", ".join(about["tables"]), f"results/{name}/index.md"))
    return {caption: [(title, page, lead) for title, lead, page in own] for caption, own in pages.items()}


def map_page(pages: dict[str, list[tuple[str, str, str]]]) -> str:
    "Write the map of the site: every notebook with the sentence that says what it teaches."
    lines = ["# Map", "", "Every notebook in reading order."]
    for caption, own in pages.items():
        lines += ["", f"## {caption}", "", "| notebook | what it teaches |", "|---|---|"]
        lines += [f"| [{title}]({page}) | {lead} |" for title, page, lead in own]
    return "\n".join(lines) + "\n"


def write_llms(site: Path) -> None:
    "Write llms.txt and llms-full.txt."
    parts = sort_notebooks()
    pages = {caption: [(t, str(Path(p).with_suffix(".html")), lead) for t, p, lead in own] for caption, own in list_pages(parts).items()}
    (site / "llms.txt").write_text(llms.write_index(NBS / "index.ipynb", pages), encoding="utf-8")
    whole = [llms.write_text(path) for path in (NBS / "index.ipynb", *(path for paths in parts.values() for path in paths))]
    (site / "llms-full.txt").write_text("\n\n".join(whole) + "\n", encoding="utf-8")


def stage_site(stage: Path) -> None:
    "Write all input files for Sphinx."
    parts = sort_notebooks()
    staged = [stage_notebook(path, stage, []) for paths in parts.values() for path in paths]
    write_api(list_modules([module for module in staged if module]), stage / "api")
    pages = {caption: [str(p.relative_to(NBS).with_suffix("")) for p in paths] for caption, paths in parts.items()}
    pages[FOUND] = stage_results(stage) + pages[FOUND]
    trees = [toctree(caption, own) for caption, own in pages.items()]
    stage_notebook(NBS / "index.ipynb", stage, [toctree("Overview", ["map"]), *trees, toctree("API", ["api/index"])])
    (stage / "map.md").write_text(map_page(list_pages(parts)), encoding="utf-8")
    for picture in [*NBS.rglob("*.png"), *RESULTS.rglob("*.png")]:
        target = stage / picture.relative_to(NBS if picture.is_relative_to(NBS) else ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)


def build(out: Path) -> int:
    "Build the site in `out`; return the exit status."
    with tempfile.TemporaryDirectory() as folder:
        stage, site = Path(folder) / "stage", Path(folder) / "site"
        stage_site(stage)
        options = ["-b", "html", "-W", "--keep-going", "-q", "-c", str(ROOT / "docs"), "-d", str(Path(folder) / "doctrees")]
        status = run_sphinx([*options, str(stage), str(site)])
        if status == 0:
            write_llms(site)
            (site / ".nojekyll").touch()  # otherwise GitHub Pages omits _static/
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(site, out)
    return status


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"))
