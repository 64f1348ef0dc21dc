"All tables at once: every number of the report comes from the runs, a failure stays where it is, nothing is done twice."

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
from forked import AGRIVISION, Forked, agrivision, run, wait_until

from agrivision_repro.analysis.significance import NOT_JUDGED
from agrivision_repro.cli.reproduce import _warn_of_replacing
from agrivision_repro.core import read_json, write_json
from agrivision_repro.report.kernels import forked_kernels
from agrivision_repro.runs.launch import launch
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.store import RunFolder
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.claims import JUDGES, UNTESTED
from agrivision_repro.study.paper import CLAIMS
from agrivision_repro.study.tables import ON_REQUEST, TABLES, all_runs, table1, table_notebook
from agrivision_repro.training.evaluate import METRICS

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["reproduce", "--scale", "smoke", "--device", "cpu", "--out"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "The whole paper, in seconds a training; in `make test`, of the runs that the notebooks have just trained."
    out = tmp_path_factory.mktemp("paper") / "out"
    if "SMOKE" in os.environ:
        notebooks = Workspace(ROOT / os.environ["SMOKE"], device="cpu")
        for folder in map(notebooks.folder, all_runs()):
            shutil.copytree(folder.path, out / "runs" / folder.name)
        shutil.copytree(notebooks.out / "data", out / "data")
    done = agrivision(*SMOKE, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"report: {out / 'index.html'}"
    return out


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "out")


def scores_of(out, **fields):
    "Read `scores.json` of the one Run with such fields, by hand."
    found = []
    for path in out.glob("runs/*/run.json"):
        record = json.loads(path.read_text())["run"]
        if all(record[name] == value for name, value in fields.items()):
            found.append(json.loads((path.parent / "scores.json").read_text())["last"]["scores"])
    assert len(found) == 1, fields
    return found[0]


class Cells(HTMLParser):
    "Collect the texts of all table cells, links and anchors of a page."

    def __init__(self, page):
        super().__init__()
        self.cells, self.links, self.ids, self.alts, self.scopes = [], [], set(), [], []
        self.is_inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag in ("td", "th"):
            self.cells.append("")
            self.is_inside = True
            self.scopes.append((tag, attrs.get("scope")))
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "img":
            self.alts.append(attrs.get("alt"))

    def handle_endtag(self, tag):
        self.is_inside &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.is_inside:
            self.cells[-1] += data


# --- every number comes from the runs


def test_24_runs_serve_all_notebooks(out):
    assert len(list(out.glob("runs/*/scores.json"))) == len(all_runs()) == 24
    assert all((out / "notebooks" / f"{name}.html").is_file() for name in TABLES if name not in ON_REQUEST)


def test_the_folder_is_sorted(out):
    assert {path.name for path in out.iterdir()} == {"data", "figures", "index.html", "notebooks", "runs", "tables"}
    endings = {"tables": {".csv", ".md", ".tex", ".html"}, "figures": {".png", ".pdf"}, "notebooks": {".ipynb", ".html"}}
    for folder, wanted in endings.items():
        assert {path.suffix for path in (out / folder).iterdir()} == wanted


def test_table_1(out):
    table = pd.read_csv(out / "tables" / "table1_modality.csv").set_index(["metric", "trained_on", "tested_on"])
    for (metric, trained, tested), row in table.iterrows():
        own = scores_of(out, channels=trained, norm="bn", lovasz=1.0)
        assert row["mean"] == pytest.approx(100 * own[tested][metric]["mean"], abs=1e-9)
        assert row["background_only"] == pytest.approx(100 * own[tested][metric]["background_only"], abs=1e-9)


@pytest.mark.parametrize("name", ["table2_backbones", "table3_losses"])
def test_tables_2_and_3(out, name):
    table = pd.read_csv(out / "tables" / f"{name}.csv")
    assert set(table.metric) == set(METRICS) and table["class"].nunique() == 8
    for (metric, row), cells in table.groupby(["metric", "row"]):
        fields = {"channels": "rgbn", "dice": 1.0, "lovasz": 0.0, "depth": int(re.search(r"\d+", row)[0]) if "Net" in row else 101}
        fields["norm"] = "bn" if "ResNet" in row else f"ibn_{re.search(r'Net[0-9]+-([abs])', row)[1]}" if "Net" in row else "ibn_a"
        if weights := re.search(r"λ1 = (\d), λ2 = (\d)", row):
            fields |= {"dice": float(weights[1]), "lovasz": float(weights[2])}
        if light := re.search(r", (RGB with red repeated|RGB|NIR)$", row):
            fields["channels"] = {"RGB with red repeated": "rgbr", "RGB": "rgb", "NIR": "nir3"}[light[1]]
        own = scores_of(out, **fields)[fields["channels"]][metric]
        found = cells["mean"].to_numpy()
        wanted = [*own["per_class"], own["mean"]]
        np.testing.assert_allclose(found, [np.nan if v is None else 100 * v for v in wanted], atol=1e-9)


def test_the_papers_numbers_stand_in_no_table_of_other_data(out):
    for name in ("table1_modality", "table2_backbones", "table3_losses"):
        assert "paper" not in pd.read_csv(out / "tables" / f"{name}.csv") and "Paper" not in (out / "tables" / f"{name}.md").read_text()


def test_tile_counts_add_up_to_the_scores(out):
    "The paired differences rest on the same pixels as the table."
    found = pd.read_csv(out / "tables" / "table3_losses-differences.csv").iloc[0]
    means = pd.read_csv(out / "tables" / "table3_losses.csv").query("`class` == 'mean' and metric == 'multilabel'").set_index("row")["mean"]
    assert found.difference == pytest.approx(means[found["of"]] - means[found["against"]], abs=1e-9)
    assert found.verdict == NOT_JUDGED and np.isnan(found.low)  # one seed


def test_tables_are_made_again_from_logs(out, tmp_path, monkeypatch):
    "In another folder; a table that differs or is missing is named; what was verified is kept if the logs are the same."
    results, tables = tmp_path / "results", ["table1_modality", "section7"]
    words = ["collect", out, "farm", *tables, "--results", results, "--data", "synthetic", "--scale", "smoke", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    collect = runpy.run_path(ROOT / "tools" / "collect_results.py")["main"]
    collect()
    runs = pd.read_csv(results / "runs.csv")
    assert runs.id.nunique() == 8 and set(runs.metric) == set(METRICS)
    kept = results / "farm" / "tables" / "table1_modality.csv"
    table = pd.read_csv(kept)
    table.loc[1, "mean"] += 1
    table.to_csv(kept, index=False)
    table.to_csv(kept.with_stem("section7-old"), index=False)
    done = agrivision("report", "--from", results, "--out", tmp_path / "again")
    made = {path.name for path in (tmp_path / "again" / "farm" / "tables").glob("*.csv")}
    assert made == {path.name for path in (results / "farm" / "tables").iterdir()} - {"section7-old.csv"} >= {"section7.csv"}
    assert done.returncode == 1 and done.stderr.count("agrivision: ") == 2, done.stderr
    assert "table1_modality.csv: row 1, mean: " in done.stderr and "section7-old.csv is not made again" in done.stderr
    assert not list((tmp_path / "again").rglob("*.safetensors"))
    verify = [ROOT / "tools" / "verify_results.py", "farm", "--results", results, "--norms", "bn"]
    run(*verify).check_returncode()
    about = read_json(results / "farm" / "about.json")
    (name, is_equal), *_ = about["verified"]["equal"].items()
    assert is_equal  # trained again, with as many threads
    collect()
    assert read_json(results / "farm" / "about.json") == about
    log = read_json(results / "farm" / "logs" / f"{name}.json")
    log["checkpoints"]["last"]["iteration"] += 1
    write_json(results / "farm" / "logs" / f"{name}.json", log)
    assert run(*verify).stdout.count("other scores") == 1
    collect()
    assert "verified" not in read_json(results / "farm" / "about.json")


def test_the_same_net_under_other_seeds(copy, tmp_path):
    "Two seeds can be halved in one way; rows of a data set are replaced, and one seed against one is not judged."
    words = [ROOT / "tools" / "compare_seeds.py", "synthetic", "--scale", "smoke", "--seeds", "0,1", "--out", copy, "--results", tmp_path]
    for _ in range(2):
        assert run(*words).returncode == 0
    same, seeds = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("same_net", "seeds"))
    assert same.seeds.unique().tolist() == ["0 against 1"] and len(same) == 6 and len(seeds) == 4
    assert set(same.verdict) == set(same.holm) == {NOT_JUDGED}
    own = seeds[seeds.trained_on == "rgb"].sort_values("seed")["multilabel, own"]
    (gain,) = same[(same.trained_on == "rgb") & (same.quantity == "points, own")].estimate
    assert gain == pytest.approx(own.diff().iloc[1], abs=1e-3)


def test_a_study_of_another_machine_is_kept(out, tmp_path):
    "Its verdicts are those of its table of claims; rows of the same machine are replaced, and other claims are refused."
    (tmp_path / "farm" / "tables").mkdir(parents=True)
    shutil.copy(out / "tables" / "claims.csv", tmp_path / "farm" / "tables")
    words = [ROOT / "tools" / "keep_replication.py", out, "farm", "--results", tmp_path, "--machine"]
    for machine in ("one", "two", "one"):
        assert run(*words, machine).returncode == 0
    kept, judged = (pd.read_csv(path, keep_default_na=False) for path in (tmp_path / "replicated.csv", out / "tables" / "claims.csv"))
    assert kept.machine.value_counts().to_dict() == {"one": len(judged), "two": len(judged)}
    assert kept[kept.machine == "one"].verdict.tolist() == judged.verdict.tolist()
    judged.iloc[1:].to_csv(tmp_path / "farm" / "tables" / "claims.csv", index=False)
    refused = run(*words, "three")
    assert refused.returncode == 1 and f"judges other claims than results/farm: {judged.key[0]}" in refused.stderr


def test_a_study_on_a_bare_machine_leaves_a_record(out, tmp_path):
    "The tool for a GPU machine without notebooks, on finished runs: nothing is trained, and everything but weights is recorded."
    shutil.copytree(out, tmp_path / "out" / "synthetic")
    words = [ROOT / "tools" / "gpu_study.py", tmp_path / "record", "synthetic=", "--scale", "smoke", "--device", "cpu"]
    done = run(*words, "--at-once", "2", "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.count(": done") == 8, done.stderr
    record = tmp_path / "record" / "synthetic"
    runs = json.loads((record / "runs.json").read_text())["runs"]
    assert {run["id"] for run in runs} == {path.name for path in (record / "runs").iterdir()} and len(runs) == 8
    assert len(pd.read_csv(record / "fig2_layers.csv")) == 8 * 3 * 34 and (record / "fig2.png").is_file()
    assert not list(record.rglob("*.safetensors"))


def test_every_claim_has_a_verdict(out):
    judged = pd.read_csv(out / "tables" / "claims.csv")
    assert judged.key.tolist() == [claim.key for claim in CLAIMS]
    assert set(judged.verdict) == {UNTESTED}  # in ten iterations nothing is learned
    assert judged.set_index("key").loc[list(JUDGES), "measured"].str.contains(r"\d").all()
    matrix = pd.read_csv(out / "tables" / "claims_matrix.csv")
    assert matrix.key.tolist() == judged.key.tolist() and matrix.iloc[:, -1].tolist() == judged.holm.tolist()
    page = (out / "index.html").read_text()
    assert "claims_matrix.png" in page and "<em>one thing changed</em>" in page


def test_every_number_of_the_report_is_in_its_files(out):
    "What index.html shows is what the notebooks left, cell by cell."
    page = Cells((out / "index.html").read_text())
    for path in out.glob("tables/*.html"):
        own = Cells(path.read_text())
        assert own.cells and set(own.cells) <= set(page.cells)
        assert all(scope in ("row", "col") for tag, scope in own.scopes if tag == "th")
    assert all(page.alts)
    alts = [alt for path in out.glob("notebooks/*.html") for alt in Cells(path.read_text()).alts]
    assert any(alt.startswith("Verdict on each claim") for alt in alts) and set(alts) == set(page.alts)


def test_links_lead_somewhere(out):
    for path in [out / "index.html", out / "tables" / "claims.html", *(out / "notebooks").glob("*.html")]:
        for link in Cells(path.read_text()).links:
            file, _, anchor = link.partition("#")
            if link.startswith("http") or (path.parent.name == "notebooks" and not file):
                continue
            target = path.parent / file if file else path
            assert target.is_file(), link
            assert not anchor or target.name != "index.html" or anchor in Cells(target.read_text()).ids, link
    assert "#table2_backbones" in Cells((out / "index.html").read_text()).links
    assert "../index.html#table2_backbones" in Cells((out / "notebooks" / "claims.html").read_text()).links


def test_pages_load_nothing(out):
    for page in [out / "index.html", *out.glob("notebooks/*.html")]:
        text = page.read_text()
        assert "<script" not in text and 'src="http' not in text and "@import" not in text


def test_tables_and_pictures_in_all_formats(out):
    for path in out.glob("tables/*.html"):
        assert all(path.with_suffix(f".{ending}").stat().st_size for ending in ("csv", "md", "tex"))
        assert r"\toprule" in path.with_suffix(".tex").read_text()
    assert all(path.with_suffix(".pdf").read_bytes().startswith(b"%PDF") for path in out.glob("figures/*.png"))


# --- a wrong number is seen, a failure stays where it is, nothing is done twice


def test_a_planted_score_is_seen_and_a_deleted_file_made_again(copy):
    "A score changed in a run folder changes the table, its bold, the report; notebooks of whole tables are not run again."
    (copy / "tables" / "table3_losses.tex").unlink()
    path = next(p for p in copy.glob("runs/*/run.json") if json.loads(p.read_text())["title"].startswith("ResNet50 "))
    scores = json.loads((path.parent / "scores.json").read_text())
    scores["last"]["scores"]["rgbn"]["multilabel"]["mean"] = 0.98765
    (path.parent / "scores.json").write_text(json.dumps(scores))
    before = {p.name: p.stat().st_mtime_ns for p in copy.glob("notebooks/*.ipynb")}
    assert agrivision(*SMOKE, copy).returncode == 0
    assert "<strong>98.8</strong>" in (copy / "index.html").read_text()
    changed = {p.stem for p in copy.glob("notebooks/*.ipynb") if p.stat().st_mtime_ns != before[p.name]}
    assert changed == {"table2_backbones", "claims", "table3_losses"} and (copy / "tables" / "table3_losses.tex").is_file()
    assert "of the other seven" in (copy / "tables" / "claims.md").read_text()


def test_a_failing_notebook_loses_no_other(copy):
    "Counts of one training are damaged: the tables that compare it fail and are named, the others stand."
    for path in copy.glob("runs/*/run.json"):
        if json.loads(path.read_text())["run"]["depth"] == 50:
            (path.parent / "tiles.npy").write_bytes(b"nothing")
            os.utime(path)
            path.write_text(path.read_text() + "\n")  # the grounds changed
    done = agrivision(*SMOKE, copy, "table2_backbones", "table3_losses")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("agrivision: ")]
    assert any("table2_backbones failed" in line and f"agrivision runs --out {copy} score " in line for line in lines), done.stderr
    page = (copy / "index.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert page.count("<strong>Failed:</strong>") == len(lines)
    assert 'id="table3_losses"' in page and "λ1 = 1, λ2 = 1" in page


def test_a_notebook_opened_by_hand_overwrites_nothing(copy):
    "Its tables and figures go to a folder for its data and scale, and their paths are printed."
    before = {p: p.read_bytes() for folder in ("tables", "figures", "notebooks") for p in (copy / folder).iterdir()}
    own = {"out": str(copy), "device": "cpu", "seeds": "0"}  # as `papermill -p seeds 0,1` passes it
    paths, options = (str(table_notebook("table1_modality")), str(copy / "by_hand.ipynb")), {"progress_bar": False, "cwd": str(copy)}
    with forked_kernels():
        done = papermill.execute_notebook(*paths, own, kernel_name="python3", **options)
    assert before == {p: p.read_bytes() for p in before} and len(list(copy.glob("runs/*"))) == 24
    printed = "".join(output.get("text", "") for cell in done.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "table: synthetic-smoke/tables/table1_modality.csv, .md, .tex, .html\n" in printed
    for name in ("tables/table1_modality.csv", "tables/table1_modality.md"):
        assert (copy / "synthetic-smoke" / name).read_bytes() == (copy / name).read_bytes()
    assert (copy / "synthetic-smoke" / "figures" / "table1_modality.png").is_file()
    assert any("2 finished runs in `runs`, trained on" in str(output) for cell in done.cells for output in cell.get("outputs", ()))


def test_a_report_of_another_scale_is_replaced_with_a_line(copy, capsys):
    _warn_of_replacing({"table1_modality": {"data": "synthetic", "scale": "smoke"}, "fig1_blocks": {}}, copy)
    assert capsys.readouterr().err == ""
    _warn_of_replacing({"table1_modality": {"data": "ag-net", "scale": "smoke"}, "fig1_blocks": {}}, copy)
    said = f"agrivision: the report of synthetic at scale smoke in {copy} is replaced; with another --out, both are kept\n"
    assert capsys.readouterr().err == said


def test_the_papers_scale_without_data_or_gpu(tmp_path, monkeypatch):
    "One screen: the plan, and what is missing; nothing is started."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = agrivision("reproduce", "--scale", "paper", "--data", "agrivision-2020", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "24 Runs, 0 finished" in done.stdout and "4,431 of them to score" in done.stdout and len(done.stdout.splitlines()) < 45
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("agrivision: ")]
    assert "nothing was started" in line and "--data-root" in line and "no GPU was found" in line
    assert not (tmp_path / "out").exists()


# --- runs side by side


def children(process):
    return [p for p in psutil.Process(process.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def test_stopped_notebooks_leave_nothing(copy):
    "Ctrl-C while notebooks are executed: one line, no process and no half-written notebook stays."
    shutil.rmtree(copy / "notebooks")
    process = Forked(AGRIVISION, *SMOKE, copy)
    wait_until(lambda: list(copy.glob("notebooks/*.new.ipynb")) and len(children(process)) >= 3, 120)  # the server and two kernels
    time.sleep(1)  # some cells
    family = children(process)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(60)
    lines = [line for line in printed.replace("\r", "\n").splitlines() if line.strip() and "notebooks: " not in line]
    assert process.returncode == 130 and len(lines) == 1 and "the same command resumes" in lines[0], printed
    assert not psutil.wait_procs(family, timeout=30)[1]
    assert not list(copy.glob("notebooks/*.new.ipynb"))


def test_a_run_that_fails_stops_no_other(tmp_path):
    runs = table1("smoke")
    bad = replace(runs[0], recipe=replace(runs[0].recipe, crop=96))  # larger than the tiles
    outcome = launch([bad, *runs], Workspace(tmp_path, device="cpu"))
    assert set(outcome.results) == set(runs)
    assert list(outcome.failures) == [bad] and "the crop 96" in outcome.failures[bad]


def test_a_killed_training_is_named(tmp_path, monkeypatch):
    from agrivision_repro.runs import local

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(local, "train_alone", die)
    monkeypatch.setattr(local, "fork_server", lambda _: multiprocessing.get_context("fork"))
    outcome = launch(table1("smoke"), Workspace(tmp_path, device="cpu"))
    assert not outcome.results and all("signal 9; too little memory?" in why for why in outcome.failures.values())


@pytest.fixture(scope="module")
def laptop_data(tmp_path_factory):
    "The results folder of a study that has its tiles, and no run yet."
    workspace, source = Workspace(tmp_path_factory.mktemp("laptop"), device="cpu"), plan_run("laptop", "synthetic").source
    for split in ("train", "val"):
        workspace.open(source, split)
    return workspace.out


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_runs_save_their_states(laptop_data, tmp_path, signum):
    "The command stopped, or killed: the runs save what they have, and no process stays."
    shutil.copytree(laptop_data, tmp_path / "out")
    words = ["reproduce", "table1_modality", "--scale", "laptop", "--device", "cpu", "--out", tmp_path / "out"]
    process = Forked(AGRIVISION, *words)

    def started():
        return [p for p in tmp_path.glob("out/runs/*/run.json") if json.loads(p.read_text()).get("resumed_at") is not None]

    wait_until(lambda: len(started()) == 2, 120)
    time.sleep(3)  # some iterations
    family = children(process)
    process.send_signal(signum)
    assert process.wait(60) == (128 + signum if signum == signal.SIGTERM else -signum)
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    saved = [RunFolder(path.parent).saved_iteration() for path in started()]
    assert len(saved) == 2 and 0 < min(saved) <= max(saved) < plan_run("laptop", "synthetic").recipe.iterations
