"""Write the license of every run-time dependency, from its metadata, between the two markers in THIRD_PARTY_LICENSES.md.

usage: list_licenses.py [--check]     --check writes nothing and fails if a dependency is not listed
"""

import re
import shlex
import sys
from configparser import ConfigParser
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "THIRD_PARTY_LICENSES.md"
RUN_TIME = ("requirements", "notebooks_requirements", "cluster_requirements", "geo_requirements", "onnx_requirements")
BEGIN, END = "<!-- begin: tools/list_licenses.py -->", "<!-- end -->"


def list_dependencies(root: Path = ROOT) -> list[str]:
    "List the run-time requirements in settings.ini, including the extras `notebooks`, `cluster`, `geo` and `onnx`."
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    asked = [word for key in RUN_TIME for word in shlex.split(parser["DEFAULT"][key])]
    return [re.split(r"[<>=!\[;]", word)[0] for word in asked]


def name_license(name: str) -> str:
    "Return the license of an installed distribution: its expression, else its classifiers, else the first line of its text."
    known = metadata(name)
    if known.get("License-Expression"):
        return known["License-Expression"]
    classifiers = [c.split(" :: ")[-1] for c in known.get_all("Classifier") or [] if c.startswith("License ::")]
    return ", ".join(classifiers) or (known.get("License") or "not stated").strip().splitlines()[0]


def make_table() -> str:
    "Format one row per dependency."
    rows = [f"| {name} | {name_license(name)} |" for name in list_dependencies()]
    return "\n".join(["| package | license |", "|---|---|", *rows])


def listed(page: str) -> dict[str, str]:
    "Read the table of a page: package → license."
    table = page.split(BEGIN)[1].split(END)[0].split("|---|---|")[-1]
    return dict(re.findall(r"^\| (\S+) \| (.+) \|$", table, re.MULTILINE))


def main() -> None:
    page = PAGE.read_text()
    if "--check" in sys.argv[1:]:
        missing = set(list_dependencies()) - listed(page).keys()
        sys.exit(f"THIRD_PARTY_LICENSES.md lacks {', '.join(sorted(missing))}: run tools/list_licenses.py" if missing else 0)
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{make_table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
