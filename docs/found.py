"Write the pages of what was found: one per folder of results, with its executed notebooks."

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path

from api import BLOB
from conf import SETTINGS
from PIL import Image

from agrivision_repro.data.editions import find_edition
from agrivision_repro.report.results import list_results, reproduce_command
from agrivision_repro.runs.logs import read_logs
from agrivision_repro.runs.run import LATER_FIELDS, describe_run
from agrivision_repro.study.tables import TABLES, table_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
load_logs = cache(read_logs)


def count(counts: dict[str, int], short: int = 0) -> str:
    "Format the values of a record and, if there are several, how many runs have each."
    names = {name: name[: short or None] for name in counts}
    return ", ".join(names[name] + f" ({n} {'runs' if n > 1 else 'run'})" * (len(counts) > 1) for name, n in counts.items())


def spell_time(seconds: float) -> str:
    "Format a duration in hours and minutes, or in seconds below two minutes."
    minutes, rest = divmod(timedelta(seconds=round(seconds)), timedelta(minutes=1))
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes + (rest > timedelta(seconds=29))} min"


def find_notebooks(name: str, about: dict) -> list[Path]:
    "List the executed notebooks of a folder of results in the order of its tables."
    return [path for table in about["tables"] if (path := RESULTS / name / "notebooks" / f"{table}.ipynb").is_file()]


def page_title(name: str, about: dict) -> str:
    "Return the title of a folder of results: its data and scale."
    title = find_edition(about["data"]).title
    return f"{title[0].upper()}{title[1:]}, {about['scale']} ({name})"


def spell_run(described: dict) -> str:
    "Return the fields of a Run as text, with the defaults of fields that older records lack."
    return json.dumps(LATER_FIELDS | described, sort_keys=True)


def describe_making(path: Path, about: dict) -> str:  # Markdown
    "Return the command that makes an executed notebook, how long that took, and on what."
    logs = {spell_run(log["record"]["run"]): log["record"]["seconds"] for log in load_logs(path.parents[1] / "logs")}
    wanted = [spell_run(describe_run(run)) for run in TABLES[path.stem](about["scale"], about["data"], about["seeds"])]
    seconds = [logs[run] for run in dict.fromkeys(wanted) if run in logs]
    own = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]["duration"]
    trained = f"{len(seconds)} runs, {spell_time(sum(seconds))} together on {count(about['device'])} ({count(about['precision'])}); then "
    return f"```sh\n{reproduce_command(about, path.stem)}\n```\n\n{trained * bool(seconds)}{spell_time(own)} for the notebook."


def list_facts(name: str, about: dict) -> dict[str, str]:
    "Return what a reader must know of a folder of results, each under a short name."
    seconds = sum(log["record"]["seconds"] for log in load_logs(RESULTS / name / "logs"))
    edition, days = find_edition(about["data"]), dict.fromkeys(about["trained"])
    return {
        "data": f"{edition.title} (`{about['data']}`); {edition.credit}",
        "tiles": f"{about['tiles']}: {about['n_train']:,} for training, {about['n_val']:,} for scoring",
        "scale, seeds": f"`{about['scale']}`; {', '.join(map(str, about['seeds']))}",
        "runs": f"{about['runs']}, {spell_time(seconds)} together",
        "device": f"{count(about['device'])}; {count(about['precision'])}",
        "last known good": f"{' to '.join(days)}, commit {count(about['commit'], 10)}",
        "versions": f"agrivision_repro {SETTINGS['DEFAULT']['version']}, torch {count(about['torch'])}",
    }


def show_picture(path: Path) -> list[str]:
    "Return the lines that show a figure with its text alternative, if there is one."
    if not path.is_file():
        return []
    with Image.open(path) as image:
        return [f"![{image.info.get('Description', path.stem)}](figures/{path.name})", ""]


def write_page(name: str, about: dict) -> str:  # Markdown
    "Write the page of a folder of results."
    lines = [f"# {page_title(name, about)}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {text} |" for key, text in list_facts(name, about).items()]
    lines += ["", "All of it:", "", f"```sh\n{reproduce_command(about, *about['tables'])}\n```", ""]
    for path in find_notebooks(name, about):
        title, quote = read_lead(path)
        lines += [f"## [{title}]({path.name})", "", f"{quote.partition('?')[0]}?", "", describe_making(path, about), ""]
        figures, numbers = (
            sorted(p for p in (RESULTS / name / kind).iterdir() if table_of(p.stem) == path.stem) for kind in ("figures", "tables")
        )
        lines += show_picture(min(figures, key=lambda p: len(p.stem))) if figures else []
        links = ", ".join(f"[{p.name}]({BLOB}/results/{name}/tables/{p.name})" for p in numbers)
        lines += [f"Numbers: {links}.", ""] if numbers else []
    pages = [path.stem for path in find_notebooks(name, about)]
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", *pages, "```", ""])


def read_lead(path: Path) -> tuple[str, str]:
    "Return a notebook's title and the sentence quoted below it."
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, _, rest = first.partition("\n")
    quote = re.search(r"(?:^> .*\n?)+", rest, re.M)
    return title.removeprefix("# "), " ".join(re.findall(r"^> (.*)$", quote[0], re.M)) if quote else ""


def each_notebook() -> Iterator[tuple[str, Path, str, str]]:
    "Yield each executed notebook: folder of results, path, title on the site, how it was made."
    for name, about in list_results(RESULTS).items():
        for path in find_notebooks(name, about):
            yield name, path, f"{read_lead(path)[0]} ({name})", describe_making(path, about)
