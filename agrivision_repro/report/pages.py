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
from jinja2 import DictLoader, Environment
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from PIL import Image

from agrivision_repro.report.render import banner_text, html_table
from agrivision_repro.runs.plan import PAPERS_DATA, gmacs_of, kind_of, name_runs
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace

_NOTEBOOK_PAGE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock html_head_js -%}
{%- block html_head_js_mathjax -%}{%- endblock html_head_js_mathjax -%}
{%- block html_head_js_mermaidjs -%}{%- endblock html_head_js_mermaidjs -%}
{%- block html_head_css -%}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
{{ super() }}
{{ resources.include_css("static/theme-dark.css") | replace("<style", '<style media="(prefers-color-scheme: dark)"') }}
<style>
:root { color-scheme: light dark; } main { max-width: 66rem; margin: 0 auto; } math[display=block] { margin: .8em 0; }
img { max-width: 100%; height: auto; background: #fff; } .jp-OutputArea-output, .highlight pre { overflow-x: auto; }
@media (min-width: 40rem) { .jp-RenderedHTMLCommon th[scope=row] { white-space: nowrap; } }
.jp-RenderedHTMLCommon table.prose :is(th, td) { text-align: left; }
.jp-RenderedHTMLCommon table.prose td:nth-of-type(odd) { min-width: 11rem; }
</style>
{%- endblock html_head_css -%}
"""


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
    math = _stash_math(notebook)
    exporter = HTMLExporter(template_name="lab", extra_loaders=[DictLoader({"page.html.j2": _NOTEBOOK_PAGE})], embed_images=True)
    exporter.template_file = "page.html.j2"
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    page = exporter.from_notebook_node(notebook)[0]
    return re.sub(r"MATHMARK(\d{5})", lambda match: math[int(match[1])], page)


def _notebook_title(notebook: nbformat.NotebookNode) -> tuple[str, str]:  # title, subtitle
    "Return a notebook's title and subtitle, from its first cell."
    title, _, rest = notebook.cells[0].source.partition("\n")
    subtitle = " ".join(line.removeprefix(">").strip() for line in rest.strip().splitlines() if line.startswith(">"))
    return title.removeprefix("# "), subtitle


_INDEX_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>agrivision_repro · report</title>
<style>
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --line: #d5dbe1; --soft: #f3f6f8; --note: #fff4d6; --link: #0b62a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe6ec; --paper: #14191f; --line: #36414c; --soft: #1d242c; --note: #3b3316; --link: #7db9ef; } }
body { margin: 0 auto; max-width: 66rem; padding: 1rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
a { color: var(--link); } .note { background: var(--note); padding: .7rem 1rem; border-radius: .4rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; vertical-align: top; }
th[scope=row], td:first-child, .prose th, .prose td { text-align: left; } .prose td:nth-of-type(odd) { min-width: 11rem; }
@media (min-width: 40rem) { th[scope=row] { white-space: nowrap; } } thead th { background: var(--soft); border-top: 2px solid var(--ink); }
img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem; }
caption { caption-side: bottom; text-align: left; font-size: .88rem; opacity: .85; padding-top: .4rem; }
figure { margin: 1.2rem 0; } figcaption, .small { font-size: .88rem; opacity: .85; }
</style></head><body>
<h1>Reducing the feature divergence of RGB and near-infrared images using Switchable Normalization</h1>
<p>Yang, Yu, Zhao and Wang, CVPR Workshops 2020, rerun by agrivision_repro {{ version }}.</p>
<nav><p>{% for s in sections %}<a href="#{{ s.name }}">{{ s.title }}</a>{{ " · " if not loop.last }}{% endfor %}</p></nav>
{% for s in sections %}<section id="{{ s.name }}"><h2>{{ s.title }}</h2>
{% if s.error %}<p class="note"><strong>Failed:</strong> {{ s.error }}</p>
{% else %}<p>{{ s.question }}</p>
{% if s.banner %}<p class="note">{{ s.banner }}</p>
{% endif %}{% for t in s.tables %}<div class="wide">{{ t.html }}</div>
<p class="small">{% for kind, ending in [("CSV", "csv"), ("Markdown", "md"), ("LaTeX", "tex")] %}{{ " · " if not loop.first }}
<a href="tables/{{ t.name }}.{{ ending }}">{{ kind }}</a>{% endfor %}</p>
{% endfor %}{% if s.basis %}<p class="small">{{ s.basis }} The paper's numbers are in separate columns.</p>
{% endif %}{% for p in s.pictures %}<figure><img alt="{{ p.alt }}" src="data:image/png;base64,{{ p.png }}">
<figcaption>{{ p.alt }}{% if s.credit %} Data: {{ s.credit }}.{% endif %}
<a href="figures/{{ p.name }}.png">PNG</a> · <a href="figures/{{ p.name }}.pdf">PDF</a></figcaption></figure>
{% endfor %}<p><a href="notebooks/{{ s.name }}.html">The executed notebook</a> · <a href="notebooks/{{ s.name }}.ipynb">ipynb</a></p>
{% endif %}</section>
{% endfor %}{% if origin %}<section id="origin"><h2>Where the numbers come from</h2>
<div class="wide">{{ origin }}</div></section>{% endif %}
</body></html>
"""


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


def _report_section(
    name: str,  # of the executed notebook
    results: Sequence[Result],  # that it uses; may be empty
    folder: Path,  # of the report
) -> dict:  # the values that INDEX_PAGE needs
    "Collect one section of the report from the files that its notebook saved."
    title, question = _notebook_title(nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4))
    tables, pictures = (
        sorted((folder / kind).glob(f"{name}{ending}")) + sorted((folder / kind).glob(f"{name}-*{ending}"))
        for kind, ending in {"tables": ".html", "figures": ".png"}.items()
    )
    return {
        "name": name, "title": escape(title), "question": escape(question.split("?")[0] + "?"),
        "banner": re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(banner_text(results), quote=False)) if results else "",
        "tables": [{"name": p.stem, "html": p.read_text().replace('href="../index.html#', 'href="#')} for p in tables],
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
        path.with_suffix(".html").write_text(_notebook_page(path))
        sections.append(_report_section(name, own, folder))
    has_any = any(results.values())
    page = Environment().from_string(_INDEX_PAGE).render(
        sections=sections, version=version("agrivision_repro"), origin=html_table(_origin_table(results, workspace)) if has_any else ""
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page)
    return folder / "index.html"
