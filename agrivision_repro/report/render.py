"""Tables as Markdown, HTML, CSV and LaTeX; pictures; the banner."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.training.schedule import Recipe

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown


LEARNS_FROM = 100  # iterations; after fewer, scores mean nothing
NOTHING_LEARNED = "nothing is learned; this shows that the code runs"


def banner_text(
    results: Sequence[Result],
) -> str:  # Markdown
    "Return a statement of data and schedule, in two or three sentences."
    run = results[0].run
    recipe, paper = run.recipe, Recipe()
    what = (
        f"{recipe.iterations:,} iterations (paper: {paper.iterations:,}) of batch {recipe.batch_size}, "
        f"{f'{recipe.crop}² crops' if recipe.crop else 'whole tiles'}, width × {recipe.width:g}, "
        f"{'ImageNet start' if recipe.pretrained else 'random start'}."
    )
    if run.edition.is_papers and recipe == paper:
        return f"**The paper's data and schedule.** {what}"
    verdict = "**The paper's data, not its schedule.**" if run.edition.is_papers else "**Not the paper's data.**"
    if recipe.iterations < LEARNS_FROM:
        return f"**{recipe.iterations} iterations: {NOTHING_LEARNED}.** {verdict} {what}"
    return f"{verdict} These scores are on {run.edition.title}; they can show a direction, but not reproduce the paper's values. {what}"


def banner(results: Sequence[Result]) -> Markdown:
    "Return `banner_text`, the data's credit and what the runs are for a notebook."
    from IPython.display import Markdown

    devices = " and ".join(dict.fromkeys(f"{r.record['device']}, {r.record['precision']}" for r in results))
    runs = f"{len(results)} finished runs in `{_short_path(results[0].folder.path.parent)}`, trained on {devices}"
    rounding = "another device or number of threads rounds differently, which can change the scores of a short run by points"
    return Markdown(f"> {banner_text(results)}\n>\n> Data: {results[0].run.edition.credit}.\n>\n> {runs}; {rounding}.")


def spread(values: Sequence[float]) -> float:  # NaN for one value
    "Compute the standard deviation over seeds."
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def format_score(mean: float, sd: float = float("nan")) -> str:
    "Format a score with one decimal, with its spread if there is one."
    if np.isnan(mean):
        return "–"
    mean = round(mean, 1) + 0.0  # not "-0.0"
    return f"{mean:.1f}" if np.isnan(sd) else f"{mean:.1f} ± {sd:.1f}"


def to_markdown(
    table: pd.DataFrame,
) -> str:
    "Format a table of text cells as Markdown, row labels first."
    flat = table.reset_index(names=[""] * table.index.nlevels) if table.index.nlevels == 1 else table.reset_index()
    header = ["" if str(c).startswith("level_") else str(c) for c in flat.columns]
    lines = [header, ["---"] * len(header), *flat.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def html_table(
    table: pd.DataFrame,
    caption: str = "",  # what the numbers are
) -> str:  # HTML
    "Format a table as HTML: header cells with a scope, long cells of class `sentence`, numbers unbroken; `**…**` and `[…](…)` as in Markdown."
    table = table.rename_axis(index=[name or None for name in table.index.names])  # an empty name would be an empty row
    html = re.sub(r"<td>(?=[^<]{41})", '<td class="sentence">', table.to_html(border=0, escape=True))
    html = re.sub(r"(?<=\d) (%|(±|to) (?=[-+\d]))", lambda m: m[0].replace(" ", "\N{NO-BREAK SPACE}"), html)  # a number with its spread
    html = re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", html).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    html = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html)
    html = re.sub(r"\[([^\]]+)\]\((\S+?)\)", r'<a href="\2">\1</a>', html)
    html = html.replace(">", f"><caption>{escape(caption)}</caption>", 1) if caption else html
    head, body = html.split("</thead>")
    body = re.sub(r"<th(?=[ >])", '<th scope="row"', body)
    return re.sub(r"<th(?=[ >])", '<th scope="col"', head) + "</thead>" + body


_LATEX = {"λ": r"$\lambda$", "±": r"$\pm$", "×": r"$\times$", "≥": r"$\ge$", "−": "$-$", "–": "--", "²": "$^2$", "…": r"\dots{}"}


_LATEX_TABLE = r"""\begin{table}
\centering
\caption{%s}\label{tab:%s}
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%%
%s}
\end{table}
"""


def _to_latex(
    table: pd.DataFrame,
    caption: str = "",
    label: str = "",
) -> str:  # for the packages booktabs and graphicx
    "Format a table of text cells as LaTeX, at most as wide as the page."
    flat = table.reset_index(names=[""] * table.index.nlevels) if table.index.nlevels == 1 else table.reset_index()
    flat.columns = ["" if str(c).startswith("level_") else str(c) for c in flat.columns]
    flat = flat.astype(str).replace(r"\[([^\]]+)\]\(\S+?\)", r"\1", regex=True)
    cells = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", flat.to_latex(index=False, escape=True))
    whole = _LATEX_TABLE % (re.sub(r"([&%$#_{}])", r"\\\1", caption), label, cells)
    return "".join(_LATEX.get(c, c) for c in whole)


def save_table(
    name: str,  # of the files, without extension; the report shows a notebook's `NAME` and `NAME-…`
    numbers: pd.DataFrame,  # written to the CSV file
    shown: pd.DataFrame,  # text cells, the best between `**`: for Markdown, LaTeX and the report
    workspace: Workspace,
    caption: str,  # what the numbers are
) -> HTML:  # for a notebook
    "Save a table as numbers (CSV), as text (Markdown, LaTeX) and for the report (HTML)."
    from IPython.display import HTML

    save_numbers(name, numbers, workspace)
    html, path = html_table(shown, caption), workspace.report / "tables" / name
    for ending, text in {"md": to_markdown(shown), "tex": _to_latex(shown, caption, name), "html": html}.items():
        path.with_name(f"{name}.{ending}").write_text(text, encoding="utf-8")
    print(f"table: {_short_path(path)}.csv, .md, .tex, .html")
    return HTML(html)


def save_numbers(name: str, numbers: pd.DataFrame, workspace: Workspace) -> None:
    "Save numbers as CSV among the tables."
    folder = workspace.report / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    numbers.to_csv(folder / f"{name}.csv", index=False)


def _short_path(path: Path) -> str:
    "Return a path as it is, or relative to the current folder, whichever is shorter."
    return min(os.path.relpath(path), str(path), key=len)


def save_picture(
    name: str,  # of the files; the report shows a notebook's `NAME.png` and `NAME-….png`
    figure: Figure,
    workspace: Workspace,
    alt: str,  # text alternative, stored in the files
) -> None:
    "Save a figure as PNG and PDF, and show it with its text alternative in a notebook."
    from IPython.display import display

    folder = workspace.report / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Description": alt})
    figure.savefig(folder / f"{name}.pdf", metadata={"Subject": alt})
    print(f"figure: {_short_path(folder / name)}.png, .pdf")
    display(figure, metadata={"image/png": {"alt": alt}})
