"""Executed notebooks as HTML pages, and the index of the report."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

import nbformat
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from PIL import Image

from agrivision_repro.core import REPOSITORY
from agrivision_repro.report.render import banner_text, html_table
from agrivision_repro.runs.plan import PAPERS_DATA, gmacs_of, kind_of, name_runs
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace

_TEMPLATES = Path(__file__).parent / "templates"


_MATH = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?!\d)", re.S
)


def _stash_math(
    notebook: nbformat.NotebookNode,  # changed in place
) -> list[str]:  # MathML, in the order of the placeholders in the text
    "Replace the equations in Markdown cells by placeholders that nbconvert does not change."
    found: list[str] = []

    def stash(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        tex, display = (match["block"], "block") if match["block"] else (match["inline"], "inline")
        found.append(convert(tex.strip(), display=display))
        return f"MATHMARK{len(found) - 1:05d}"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _MATH.sub(stash, cell.source)
    return found


def _notebook_page(
    path: Path,  # an executed notebook
) -> str:  # HTML
    "Render a notebook as one self-contained page without scripts."
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["title"] = _notebook_title(notebook)[0]
    for cell in notebook.cells:
        cell.source = _link_to_repository(cell.source) if cell.cell_type == "markdown" else cell.source
    math = _stash_math(notebook)
    exporter = HTMLExporter(template_name="lab", extra_loaders=[FileSystemLoader(_TEMPLATES)], embed_images=True)
    exporter.template_file = "notebook.html.j2"
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    page = exporter.from_notebook_node(notebook)[0]
    return re.sub(r"MATHMARK(\d{5})", lambda match: math[int(match[1])], page)


def _link_to_repository(text: str) -> str:
    "Let links to notebooks, which do not stand beside a report, lead to the repository."

    def link(found: re.Match) -> str:
        return f"]({REPOSITORY}/blob/main/nbs/{'' if found[1] else 'tables/'}{found[2]})"

    return re.sub(r"\]\((\.\./)?([\w/]+\.ipynb)\)", link, text)


def _notebook_title(notebook: nbformat.NotebookNode) -> tuple[str, str]:  # title, subtitle
    "Return a notebook's title and subtitle, from its first cell."
    title, _, rest = notebook.cells[0].source.partition("\n")
    subtitle = " ".join(line.removeprefix(">").strip() for line in rest.strip().splitlines() if line.startswith(">"))
    return title.removeprefix("# "), subtitle


def _origin_table(
    results: dict[str, Sequence[Result]],  # table → the results that it uses
    workspace: Workspace,
) -> pd.DataFrame:
    "List every run: the tables that use it, its cost, its data, device and code version."
    unique = list(dict.fromkeys(r for own in results.values() for r in own))
    rows = {}
    for r, title in zip(unique, name_runs([r.run for r in unique]), strict=True):
        rows[title] = {
            "for": ", ".join(name.split("_")[0] for name, own in results.items() if r in own),
            "GMACs a tile": f"{gmacs_of(kind_of(r.run), r.run.recipe.crop or PAPERS_DATA.side):.3g}",
            "seconds": r.record["seconds"],
            "tiles (train, val)": f"{r.record['n_train']}, {r.record['n_val']}",
            "data": f"{r.run.source.name} {workspace.identify(r.run.source)}",
            "device": f"{r.record['device']}, {r.record['precision']}",
            "commit": (r.record["commit"][:10] or "installed package") + (" + changes" if r.record["is_dirty"] else ""),
            "torch": r.record["versions"]["torch"],
            "folder": f"runs/{r.folder.name}",
        }
    return pd.DataFrame(rows).T


def _describe_origin(table: pd.DataFrame) -> dict[str, str]:  # html; empty without runs
    "State once what all runs have in common, above the table of what they do not."
    if table.empty:
        return {}
    shared = [column for column in table if table[column].nunique() == 1] if len(table) > 1 else []
    words = "; ".join(f"{column}: {escape(str(table[column].iloc[0]))}" for column in shared)
    return {"shared": f"All {len(table)} runs: {words}." if shared else "", "table": html_table(table.drop(columns=shared))}


def _report_section(
    name: str,  # of the executed notebook
    results: Sequence[Result],  # that it uses; may be empty
    folder: Path,  # of the report
) -> dict:  # the values that report.html.j2 needs
    "Collect one section of the report from the files that its notebook saved."
    notebook = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)
    title, question = _notebook_title(notebook)
    made = sorted((folder / file for file in notebook.metadata["agrivision_repro"]["files"]), key=lambda p: (p.stem != name, p.stem))
    tables, pictures = ([p for p in made if p.suffix == ending] for ending in (".html", ".png"))
    return {
        "name": name, "title": escape(title), "question": re.sub(r"\*(.+?)\*", r"<em>\1</em>", escape(question.split("?")[0] + "?")),
        "banner": re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(banner_text(results), quote=False)) if results else "",
        "tables": [{"name": p.stem, "html": p.read_text(encoding="utf-8").replace('href="../index.html#', 'href="#')} for p in tables],
        "pictures": [_read_picture(p) for p in pictures],
        "basis": _basis_text(results) if results else "", "credit": escape(results[0].run.edition.credit) if results else "",
    }  # fmt: skip


def _basis_text(results: Sequence[Result]) -> str:
    "Describe what scores are based on: tiles, checkpoint, seeds, time, device."
    n_seeds, record = len({r.run.seed for r in results}), results[0].record
    seeds = "one seed, so the spread is unknown" if n_seeds == 1 else f"mean ± standard deviation of {n_seeds} seeds"
    devices, seconds = dict.fromkeys(r.record["device"] for r in results), sum(r.record["seconds"] for r in results)
    return (
        f"{record['n_val']} validation tiles, last checkpoint, no test-time augmentation; {seeds}. {len(results)} runs, "
        f"{seconds:,.0f} s on {' and '.join(map(escape, devices))}."
    )


def _read_picture(path: Path) -> dict[str, str]:
    "Return a picture as the page embeds it: name, alt text and encoded bytes."
    with Image.open(path) as image:
        alt = escape(image.info.get("Description", path.stem))
    return {"name": path.stem, "alt": alt, "png": base64.b64encode(path.read_bytes()).decode()}


def write_report(
    results: dict[str, list[Result]],  # executed notebook → the results that it uses
    workspace: Workspace,
    failures: dict[str, str] | None = None,  # failed notebook → error message
) -> Path:  # index.html
    "Write each executed notebook as a page, and the report that links to them; a failed section shows its error."
    folder, failures, sections = workspace.report, failures or {}, []
    for name, own in results.items():
        if name in failures:
            sections.append({"name": name, "title": name, "error": escape(failures[name])})
            continue
        path = folder / "notebooks" / f"{name}.ipynb"
        path.with_suffix(".html").write_text(_notebook_page(path), encoding="utf-8")
        sections.append(_report_section(name, own, folder))
    page = Environment(loader=FileSystemLoader(_TEMPLATES)).get_template("report.html.j2").render(
        sections=sections, version=version("agrivision_repro"), origin=_describe_origin(_origin_table(results, workspace))
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"
