"A list of runs fits a terminal, has one unit, and names what another version wrote."

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from agrivision_repro.cli.app import main
from agrivision_repro.core import write_json
from agrivision_repro.runs.listing import compare_runs, list_runs, show_run
from agrivision_repro.runs.run import LATER_FIELDS, Run, describe_run, plan_run, run_id
from agrivision_repro.runs.store import OtherVersion, Result, RunFolder
from agrivision_repro.training.evaluate import METRICS

PROVENANCE = {"device": "a GPU", "commit": "c" * 40, "is_dirty": True, "processes": 1, "precision": "bf16"}


def write_run(out, name, share=0.25, **fields):
    "A finished Run on two inputs whose scores are all alike."
    run = replace(plan_run("paper", "agrivision-cvpr2020", channels="rgb", norm="ibn_s", lovasz=1.0), **fields)
    folder = RunFolder(out / "runs" / name)
    folder.write_record({"run": asdict(run), "title": run.title, "state": "finished", **PROVENANCE})
    metric = {"per_class": [None, *[share] * (len(run.edition.classes) - 1)], "mean": share, "background_only": 0.1}
    scores = {channels: dict.fromkeys(METRICS, metric) for channels in run.test_inputs}
    folder.write_scores({name: {"iteration": 25_000, "scores": scores} for name in ("last", "best")})
    return folder


def write_old_run(out, name):
    "The fields that the previous version wrote."
    described = json.loads(json.dumps(asdict(plan_run("smoke", "synthetic"))))
    source, recipe = described.pop("source"), described["recipe"]
    described |= {"data": source["name"], "farm": source["synthetic"]}
    recipe["is_pretrained"] = recipe.pop("pretrained")
    folder = RunFolder(out / "runs" / name)
    write_json(folder.record_file, {"run": described, "title": "old", "state": "finished", **PROVENANCE})
    folder.write_scores({})
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["agrivision", "runs", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err.splitlines()

    return run


def test_a_run_of_another_version_is_refused_in_a_line(tmp_path, command):
    old, new = write_old_run(tmp_path, "0" * 12), write_run(tmp_path, "1" * 12)
    for read in (old.record, old.run, old.result, lambda: show_run(old), lambda: compare_runs([old, new])):
        with pytest.raises(OtherVersion, match=r"run.json is from another version .*\(fields data, farm, recipe.is_pretrained\): remove"):
            read()
    assert list_runs(tmp_path).set_index("id").state[new.name] == "finished"
    code, text, _ = command("--out", tmp_path)
    assert code == 0 and "000000000000  –\n" in text and "from another version of agrivision_repro: remove it" in " ".join(text.split())
    assert command("list", "--out", tmp_path) == command("--out", tmp_path, "list") == (0, text, [])
    code, text, (complaint,) = command("--out", tmp_path, "show", "0")
    assert code == 2 and not text and complaint.startswith(f"agrivision: {old.record_file} is from another version")


def test_a_damaged_record_stops_no_list(tmp_path, command):
    new, bad = write_run(tmp_path, "1" * 12), RunFolder(tmp_path / "runs" / ("2" * 12))
    bad.path.mkdir()
    bad.record_file.write_text("{")
    code, text, _ = command("--out", tmp_path)
    assert code == 0 and new.name in text and "damaged: remove its folder" in text


def test_lists_fit_80_columns(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = write_run(tmp_path, "a" * 12), write_run(tmp_path, "b" * 12, share=0.5, seed=1)
    third = write_run(tmp_path, "c" * 12, share=0.75, norm="bn")
    for words in ([], ["show", "a"], ["compare", "a", "b"], ["compare", "a", "b", "c"]):
        code, text, _ = command("--out", ".", *words)
        assert code == 0 and max(map(len, text.splitlines())) <= 80, text
    assert [second.name, third.name] == [line.split()[0] for line in text.splitlines() if line.endswith(("50.0 %", "75.0 %"))][:2]
    assert first.result().score("rgb") == first.result().score("nir3", "gated") == 0.25


def test_the_hints_name_the_folder_unless_it_is_the_default(tmp_path, command, monkeypatch):
    "What is printed next can be typed as it is, from home too."
    folder = write_run(tmp_path / "out", "a" * 12)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder_now, where in ((Path.cwd(), f" --out {tmp_path / 'out'}"), (tmp_path, "")):
        monkeypatch.chdir(folder_now)
        code, text, _ = command("--out", "~/out")
        assert code == 0 and text.endswith(f"\nnext: agrivision runs{where} show ID\nor:   agrivision runs{where} compare ID ID\n")
    shown = command("--out", "~/out", "show", folder.name[:3])
    assert shown[0] == 0 and command("show", folder.name[:3], "--out", "~/out") == shown


def test_scores_have_one_unit_and_the_names_of_the_tables(tmp_path):
    shown = show_run(write_run(tmp_path, "a" * 12))
    row = shown["challenge, gated, tested on nir3, best weights"]
    assert row.startswith("25.0 % (background –, ") and row.endswith(" 25.0 %)")
    assert list_runs(tmp_path).mIoU.tolist() == ["rgb 25.0 %, nir3 25.0 %"]


def test_a_result_compares_by_its_run(tmp_path):
    folder = write_run(tmp_path, "a" * 12)
    assert folder.result() == Result(folder.run(), folder, {}, {}) and folder.progress() == "finished"


@pytest.mark.parametrize(
    ("data", "how"),
    [("ag-net", "agrivision data fetch ag-net"), ("agrivision-2021", "aws s3 cp --no-sign-request"), ("agrivision-2020", "ask its makers")],
)
def test_missing_data_comes_with_the_way_to_get_it(data, how, tmp_path, capsys):
    "One line: what is missing, and the command or the address."
    with pytest.raises(SystemExit, match="2"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["agrivision", "train", "--data", data, "--scale", "smoke", "--out", str(tmp_path)])
        main()
    error = capsys.readouterr().err
    assert how in error and "--data-root" in error and error.count("\n") == 1


def test_a_field_added_later_changes_no_id_and_loads_from_older_records(tmp_path):
    "Ids computed by the version that had no `intervention`; its record reads as a Run without one."
    assert {name: getattr(Run, name) for name in LATER_FIELDS} == LATER_FIELDS
    run = plan_run("laptop", "naip-trees", channels="rgb", norm="ibn_s", lovasz=1.0, seed=2, shared_places="val")
    assert run_id(run, "0123456789ab") == "317038b322ae" != run_id(replace(run, intervention="sham(0.1)"), "0123456789ab")
    assert "intervention" not in describe_run(run) and run.title == "IBN-Net101-s on RGB, seed 2"
    changed = write_run(tmp_path, "b" * 12, intervention="sham(0.1)")
    assert changed.run().intervention == "sham(0.1)" and changed.run().title == "IBN-Net101-s, sham(0.1) on RGB, seed 0"
    old = write_run(tmp_path, "a" * 12)
    record = old.record()
    del record["run"]["intervention"]
    old.write_record(record)
    assert old.run() == replace(changed.run(), intervention="") and old.record()["run"]["intervention"] == ""
    assert compare_runs([old, changed]).loc["run.intervention"].tolist() == ["", "sham(0.1)"]
