"""Build the site: the notebooks with their saved outputs, and the API, as self-contained pages.

usage: build.py [OUT]     OUT defaults to _docs; its contents are replaced
"""

import ast
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from api import BLOB, Module, definitions, list_modules, write_api
from sphinx.cmd.build import main as run_sphinx

ROOT = Path(__file__).resolve().parents[1]
NBS, RESULTS = ROOT / "nbs", ROOT / "results"
# the sidebar: each caption, and the notebooks of nbs/ under it, sorted by name
PARTS = {
    "The paper": ["0?_*"],
    "Data": ["1?_*"],
    "Models": ["2?_*"],
    "Losses and metrics": ["3?_*"],
    "Divergence": ["4?_*"],
    "Training and runs": ["5?_*", "6[0-5]_*"],
    "Figures and report": ["6[6-9]_*", "7?_*"],
    "Prediction, deviations": ["8?_*", "9?_*"],
    "Benchmarks": ["benchmarks"],
    "Tables and figures": ["tables/*"],
    "How-to": ["howto/*"],
}
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
        return match[1] if target.is_relative_to(NBS) and target.suffix in (".ipynb", ".png") else f"{BLOB}/{target.relative_to(ROOT)}"

    for name in re.findall(rf"{re.escape(BLOB)}/([\w./-]+\w)", text):
        if not (ROOT / name).exists():
            raise ValueError(f"link to {name} in the repository: no such file")
    return LINK.sub(rewrite, text)


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
    notebook["cells"] = cells + extra
    target = stage / path.relative_to(NBS)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")
    title = "".join(notebook["cells"][0]["source"]).partition("\n")[0].removeprefix("# ")
    return Module(module, title, path.stem, labels) if module else None


def show(metadata: dict) -> dict:
    "Translate a cell's tags to those of myst-nb."
    return metadata | {"tags": ["remove-input" if tag == "hide-input" else tag for tag in metadata.get("tags", [])]}


def link_tables(outputs: list[dict]) -> list[dict]:
    "Point links into the report to the notebook of the same name."
    return json.loads(re.sub(r"(?:\.\./)?index\.html#(\w+)", r"\1.html", json.dumps(outputs)))


def toctree(caption: str, pages: list[str]) -> dict:
    "Make a cell that lists pages under a caption in the sidebar."
    return markdown_cell(caption, "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))


def read_lead(path: Path) -> tuple[str, str]:
    "Return a notebook's title and the sentence quoted below it."
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, _, rest = first.partition("\n")
    return title.removeprefix("# "), " ".join(re.findall(r"^> (.*)$", rest, re.M))


def map_page(parts: dict[str, list[Path]]) -> str:
    "Write the map of the site: every notebook with the sentence that says what it teaches."
    lines = ["# Map", "", "Every notebook in reading order."]
    for caption, paths in parts.items():
        lines += ["", f"## {caption}", "", "| notebook | what it teaches |", "|---|---|"]
        leads = [(path.relative_to(NBS), *read_lead(path)) for path in paths]
        lines += [f"| [{title}]({name}) | {lead} |" for name, title, lead in leads]
    return "\n".join(lines) + "\n"


def stage_site(stage: Path) -> None:
    "Write all input files for Sphinx."
    parts = sort_notebooks()
    staged = [stage_notebook(path, stage, []) for paths in parts.values() for path in paths]
    write_api(list_modules([module for module in staged if module]), stage / "api")
    trees = [toctree(caption, [str(p.relative_to(NBS).with_suffix("")) for p in paths]) for caption, paths in parts.items()]
    stage_notebook(NBS / "index.ipynb", stage, [toctree("Overview", ["map"]), *trees, toctree("API", ["api/index"])])
    (stage / "map.md").write_text(map_page(parts), encoding="utf-8")
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
            (site / ".nojekyll").touch()  # otherwise GitHub Pages omits _static/
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(site, out)
    return status


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"))
