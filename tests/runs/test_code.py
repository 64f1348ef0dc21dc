"Which code decided a number: what counts as a change of it, and that results say when it changed."

from pathlib import Path

import pytest

from agrivision_repro.core import read_json
from agrivision_repro.runs.code import changed_since, code_at, code_now, fingerprint
from agrivision_repro.runs.store import git

RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_only_what_runs_counts():
    plain = 'def f(x):\n    "Return x."\n    return x + 1\n'
    assert fingerprint(plain) == fingerprint('# a comment\ndef f(x):\n    "Another docstring."\n\n    return (x + 1)  # more\n')
    assert fingerprint(plain) != fingerprint(plain.replace("1", "2"))
    assert fingerprint(plain) == "04186b75"  # in every version of Python


def test_the_code_that_trains_is_found():
    now = code_now()
    assert {"losses.py", "models/norms.py", "training/loop.py", "runs/run.py", "data/batches.py"} <= now.keys()
    assert not any(name.startswith(("cli", "report", "study")) for name in now)
    assert changed_since({"now": now}) == []
    other = {**now, "losses.py": "0" * 8}
    assert changed_since({"now": now, "before": other}) == ["losses.py"] and changed_since({"unknown": {}}) == sorted(now)


def test_the_code_of_a_commit():
    if not git("rev-parse", "HEAD"):
        pytest.skip("not a git checkout")
    assert code_at("HEAD").keys() >= code_now().keys() and code_at("no such commit") == {}


@pytest.mark.parametrize("about", sorted(RESULTS.glob("*/about.json")), ids=lambda path: path.parent.name)
def test_results_name_their_code_and_machine(about):
    known = read_json(about)
    assert all(known[key] for key in ("commit", "device", "torch", "trained", "code", "n_train", "n_val"))
    assert all(known["code"].values())  # the fingerprints of every commit
    if "verified" in known:
        equal = known["verified"]["equal"]  # run → bool
        assert equal and (known["verified"]["commit"] in known["code"]) == all(equal.values())
        assert set(known["code"]) - {known["verified"]["commit"]} <= set(known["commit"])
