"What a contributor is told is true, and what a forge reads is well-formed."

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ADDED = ["A norm", "A loss", "A metric", "An estimator", "An edition", "A table"]


def test_contributing_diffs(tmp_path):
    "The diffs apply to this checkout, and the export has what they add: see helpers/contributed.py."
    sections = dict(re.findall(r"^### (.+?)\n(.+?)(?=^##)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL))
    diffs = {heading: re.findall(r"^```diff\n(.+?)^```", text, re.MULTILINE | re.DOTALL) for heading, text in sections.items()}
    assert list(diffs) == ADDED and all(diffs.values())
    (tmp_path / "studied.diff").write_text(diffs["A norm"].pop())  # applied after the norm was trained without it
    for folder in ("nbs", "agrivision_repro"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path / name)
    for heading, diff in ((heading, diff) for heading, own in diffs.items() for diff in own):
        applied = subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, capture_output=True, text=True)
        assert applied.returncode == 0, f"{heading}: {applied.stderr}"
    subprocess.run([BIN / "nbdev_export"], cwd=tmp_path, check=True)
    shutil.copy2(ROOT / "tests" / "helpers" / "contributed.py", tmp_path)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "tmp", "contributed.py"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


CFF_KEYS = set(
    "abstract authors cff-version commit contact date-released doi identifiers keywords license license-url message preferred-citation "
    "references repository repository-artifact repository-code title type url version".split()
)  # of the Citation File Format 1.2.0
PERSON_KEYS = {"address", "affiliation", "alias", "city", "country", "email", "family-names", "given-names", "name-particle", "name-suffix",
               "orcid", "website"}  # fmt: skip


def find_cff_faults(citation: dict) -> list[str]:
    "Name what the schema of version 1.2.0 would refuse."
    faults = [f"unknown key {key}" for key in citation.keys() - CFF_KEYS]
    faults += [f"lacks {key}" for key in ("cff-version", "message", "title", "authors") if not citation.get(key)]
    faults += ["type"] if citation.get("type", "software") not in ("software", "dataset") else []
    faults += ["cff-version"] if citation.get("cff-version") != "1.2.0" else []
    preferred = citation.get("preferred-citation", {"type": "generic", "title": "-", "authors": [{"name": "-"}]})
    faults += [f"preferred-citation lacks {key}" for key in ("type", "title", "authors") if not preferred.get(key)]
    for author in [*(citation.get("authors") or []), *(preferred.get("authors") or [])]:
        is_named = "name" in author or author.keys() & {"family-names", "given-names", "alias"}
        faults += [] if is_named and ("name" in author or author.keys() <= PERSON_KEYS) else [f"author {author}"]
    if citation.get("date-released"):
        datetime.date.fromisoformat(str(citation["date-released"]))
    return faults


def test_citation_is_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert find_cff_faults(citation) == []
    assert citation["license"] == "Apache-2.0" and all(isinstance(word, str) for word in citation["keywords"])
    spoiled = {k: v for k, v in citation.items() if k != "message"} | {"titel": "x", "type": "paper", "authors": [{"first": "A"}]}
    assert find_cff_faults(spoiled) == ["unknown key titel", "lacks message", "type", "author {'first': 'A'}"]


def test_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100 and (ROOT / ".ci/run").read_text().rstrip().endswith("make test")
    oldest = re.search(r"min_python = (.+)", (ROOT / "settings.ini").read_text())[1]
    assert job["strategy"]["matrix"]["python-version"][0] == oldest


def test_hooks_are_local_and_run_what_make_runs():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = {hook["id"]: hook for hook in repos[0]["hooks"]}
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks.values())
    make = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    assert hooks["in-step"]["entry"] in make and hooks["ruff"]["entry"] in make
    assert (BIN / Path(hooks["clean"]["entry"]).name).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem)
def test_issue_form(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    ids = [item["id"] for item in form["body"]]
    assert len(set(ids)) == len(ids)
    for item in form["body"]:
        assert item["type"] in ("textarea", "input", "checkboxes", "dropdown") and item["attributes"]["label"]
    asked = str(form)
    commands = set(re.findall(r"`agrivision ((?:runs|data)? ?[a-z]+)", asked))
    assert commands <= {"runs show", "runs compare", "data check"}
