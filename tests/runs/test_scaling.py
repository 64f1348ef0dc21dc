"A plan tells what is to be paid; over Ray every Run ends, killed workers go on, and a Run that raises stops no other."

import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from forked import run as run_program

from agrivision_repro.cli.app import main
from agrivision_repro.cli.reproduce import _announce, _check_can_run, plan_tables
from agrivision_repro.runs import plan
from agrivision_repro.runs.jobs import Interrupted, train_one
from agrivision_repro.runs.launch import launch
from agrivision_repro.runs.local import _divide_cores
from agrivision_repro.runs.plan import Throughput, estimate, gmacs_of, kind_of, makespan, name_runs, time_steps
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.tables import table1
from agrivision_repro.training.checkpoint import read_tensors
from agrivision_repro.training.engine import make_engine
from agrivision_repro.training.loop import Trainer

PAPER = plan_run("paper", "agrivision-2020", channels="rgb", lovasz=1.0)


@pytest.fixture
def paces(monkeypatch):
    "Time nothing: a tile takes a second to train on, half of one to score."
    timed = []
    monkeypatch.setattr(plan, "time_steps", lambda kind, *_: timed.append(kind) or Throughput(1.0, 0.5, 1, True))
    return timed


@pytest.fixture
def command(monkeypatch, capsys):
    "Run the command in this process; give exit code, stdout and the lines of stderr."

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["agrivision", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, [line for line in printed.err.splitlines() if "agrivision" in line]

    return run


# --- the plan


def test_hours_by_hand(paces, tmp_path):
    "The paper's schedule, its evaluations, and a Run that two tables share."
    other = replace(PAPER, channels="nir3", seed=1)
    plan = estimate({"one": [PAPER, other], "two": [other]}, Workspace(tmp_path, device="cpu"))
    each = (25_000 * 32 * 1.0 + (25 + 2 * 2) * 4_431 * 0.5) / 3600
    assert plan.table.hours.tolist() == pytest.approx([each, each])
    assert plan.table.tables.tolist() == ["one", "one, two"]
    assert plan.table["tiles/s"].tolist() == [1.0, 1.0]
    assert [plan.hours(n) for n in (1, 2, 8)] == pytest.approx([2 * each, each, each])
    assert paces == [kind_of(PAPER)]  # seeds and modalities are timed once
    assert not list(tmp_path.iterdir())


def test_kinds_without_time_are_scaled(paces, tmp_path):
    half = replace(PAPER, depth=50)
    plan = estimate({"one": [PAPER, half]}, Workspace(tmp_path, device="cpu"), seconds=0)
    ratio = gmacs_of(kind_of(half), 512) / gmacs_of(kind_of(PAPER), 512)
    assert plan.table.by.tolist() == ["timed", "scaled"]
    assert plan.table.hours[1] / plan.table.hours[0] == pytest.approx(ratio)


def test_crops_are_trained_on_and_whole_tiles_scored(paces, tmp_path):
    run = plan_run("laptop", "synthetic", channels="rgb")
    run = replace(run, recipe=replace(run.recipe, crop=64))
    plan = estimate({"one": [run]}, Workspace(tmp_path, device="cpu"))
    n_looks = 1 + 2 * 2  # 500 iterations, one look at their end, then two checkpoints on two modalities
    assert plan.hours() * 3600 == pytest.approx(500 * 8 * 1.0 + n_looks * 96 * 0.5 * 4)  # batches of 8; four times the area


@pytest.mark.parametrize("seed", range(20))
def test_longest_first_is_within_grahams_bound(seed):
    "Against every way of dealing seven runs out to three devices."
    hours = np.random.default_rng(seed).integers(1, 20, 7).tolist()
    ways = (max(sum(h for h, d in zip(hours, way, strict=True) if d == k) for k in range(3)) for way in product(range(3), repeat=7))
    best = min(ways)
    assert best <= makespan(hours, 3) <= best * (4 / 3 - 1 / 9)


def test_a_batch_that_does_not_fit(monkeypatch):
    "The largest one that does is timed, and that is said."
    step = Trainer.step

    def little_memory(trainer, batches):
        if len(batches[0].x) > 2:
            raise torch.OutOfMemoryError("no more")
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "step", little_memory)
    pace = time_steps(kind_of(plan_run("smoke", "synthetic")), 32, make_engine("cpu"), seconds=60)
    assert (pace.n_tiles, pace.is_full) == (2, False)


@pytest.mark.slow
def test_paper_plan_on_a_laptop(command, tmp_path):
    "No data, no GPU, really timed: on one screen, and nothing is written."
    words = ["--scale", "paper", "--data", "agrivision-2020", "--device", "cpu", "--devices", "4", "--seeds", "0,1"]
    code, text, complaints = command("plan", "table1_modality", *words, "--out", tmp_path / "out")
    assert code == 0 and not complaints and not (tmp_path / "out").exists()
    for words in ("4 Runs, 0 finished", "25,000", "88.6", "4 devices", "tiles/s", "agrivision-2020", "ImageNet", "no GPU"):
        assert words in text, text
    assert len(text.splitlines()) <= 32 and max(map(len, text.splitlines())) <= 80
    assert re.search(r"^ *[\d,]+ days  ResNet101 on NIR, seed 1$", text, re.M), text


def test_tables_without_runs_need_nothing(command, tmp_path, monkeypatch):
    "Neither time nor a GPU, nor packages for notebooks, to be planned."
    monkeypatch.setattr("agrivision_repro.runs.workspace.has_gpu", lambda: False)
    monkeypatch.setitem(sys.modules, "papermill", None)
    code, text, complaints = command("plan", "fig_schedule", "fig1_blocks", "--scale", "paper", "--out", tmp_path / "out")
    assert (code, text, complaints) == (0, "nothing to train: these tables use no run\n", [])
    assert estimate({"fig_schedule": []}, Workspace(tmp_path)).hours(8) == 0
    _check_can_run({"fig_schedule": []}, Workspace(tmp_path))
    with pytest.raises(ValueError, match=r"nothing was started: no GPU was found \(--device cpu trains without one\)"):
        _check_can_run({"table1_modality": table1("smoke")[:1]}, Workspace(tmp_path))


def test_other_results_are_found_from_any_folder(tmp_path, monkeypatch):
    "The kernel of a notebook runs in another one."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    _, parameters = plan_tables(["claims"], {"scale": "smoke", "seeds": "0"}, ['others=["results/farm", "~/farm"]'])
    assert parameters["claims"]["others"] == [str(tmp_path / "results" / "farm"), str(tmp_path / "home" / "farm")]


def test_names_tell_runs_apart():
    twins = [PAPER, replace(PAPER, dice=0.0), replace(PAPER, channels="nir3")]
    assert name_runs(twins) == [
        "ResNet101 on RGB, seed 0 (dice=1.0)",
        "ResNet101 on RGB, seed 0 (dice=0.0)",
        "ResNet101 on NIR, seed 0",
    ]


KEEPS = """
import resource, torch
from agrivision_repro.runs.jobs import keep_freed_memory
def faults():
    "Count the pages that the system gives while 64 MB are used and freed, ten times."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(1 << 22) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
print(keep_freed_memory(), faults() < before / 4)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc here")
def test_memory_of_a_step_is_kept_for_the_next():
    assert run_program(sys.executable, "-c", KEEPS).stdout.split() == ["True", "True"]


def test_a_signal_to_a_worker_is_no_failure(tmp_path):
    "A worker that a scheduler takes back has saved its Run's state, and says so in an error that is queued again."
    run = plan_run("smoke", "synthetic")
    run = replace(run, recipe=replace(run.recipe, decay=100_000))
    folder = Workspace(tmp_path, device="cpu").folder(run)

    def interrupt() -> None:
        while not folder.state.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command resumes from its saved state"):
        train_one(run, {"out": str(tmp_path), "device": "cpu", "save_every": 2}, torch.get_num_threads())
    assert folder.saved_iteration() > 0


# --- Ray


def test_without_ray(monkeypatch, command, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, complaints = command("reproduce", "table1_modality", "--scale", "smoke", "--out", tmp_path / "out", "--ray", "local")
    assert code == 2 and not (tmp_path / "out").exists()
    (complaint,) = complaints
    assert complaint.startswith("agrivision: Ray is not installed: pip install '.[cluster]' in the checkout, or ")


def test_without_a_cluster(monkeypatch, tmp_path):
    ray = pytest.importorskip("ray")

    def nobody(**_):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(ValueError, match=r"no Ray at 'auto' \(nobody answers\): start it with `ray start --head`, or use --ray local"):
        launch(table1("smoke"), Workspace(tmp_path), "ray")


def test_an_address_that_nobody_listens_at(tmp_path):
    "Ray itself would wait for many minutes."
    pytest.importorskip("ray")
    began = time.monotonic()
    with pytest.raises(ValueError, match="no Ray at '127.0.0.1:9'"):
        launch(table1("smoke"), Workspace(tmp_path), "ray", address="127.0.0.1:9")
    assert time.monotonic() - began < 30


@pytest.fixture(scope="module")
def cluster():
    "Ray on this machine with two GPUs that it is told of."
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_gpus=2, num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def kill_in_training(folder, killed: list) -> None:
    "Wait for the second saved state of a Run, and kill the process that holds its lock."
    while folder.saved_iteration() < 10:
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        try:
            if str(folder.lock) in {file.path for file in process.open_files()}:
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
        except psutil.Error:
            continue


@pytest.fixture(scope="module")
def trained(cluster, tmp_path_factory):
    "Small nets of Table 1, the worker of one of them killed, and a Run whose loss is no number, all in one queue."
    workspace = Workspace(tmp_path_factory.mktemp("ray") / "out", save_every=5)
    short, other = (replace(run, depth=18) for run in table1("smoke"))
    victim = replace(short, recipe=replace(short.recipe, decay=76, evaluate_every=100))
    runs, failing = [victim, other], replace(short, recipe=replace(short.recipe, lr=1e30), norm="ibn_s")
    killed = []
    killer = threading.Thread(target=kill_in_training, args=(workspace.folder(victim), killed), daemon=True)
    killer.start()
    outcome = launch([*runs, failing, other], workspace, "ray")
    return SimpleNamespace(workspace=workspace, runs=runs, victim=victim, failing=failing, killed=killed, outcome=outcome)


@pytest.mark.slow
def test_all_runs_of_table_1_end(trained):
    assert set(trained.outcome.results) == set(trained.runs)
    for run in trained.runs:
        assert trained.outcome.results[run].folder == trained.workspace.folder(run)


@pytest.mark.slow
def test_a_killed_worker_goes_on_from_its_saved_state(trained, tmp_path):
    assert len(trained.killed) == 1
    result = trained.outcome.results[trained.victim]
    assert result.record["resumed_at"] >= 10
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    undisturbed = Workspace(tmp_path, device="cpu", precision=result.record["precision"]).result(trained.victim)
    torch.set_num_threads(n_threads)
    if not torch.accelerator.is_available():
        (ours, about), (same, known) = (read_tensors(r.folder.weights()) for r in (result, undisturbed))
        assert about == known  # checksum and iteration
        assert ours.keys() == same.keys() and all(torch.equal(ours[name], same[name]) for name in ours)


@pytest.mark.slow
def test_a_run_that_raises_is_reported_once(trained):
    "It is not tried again: its worker was not lost."
    assert list(trained.outcome.failures) == [trained.failing]
    message = trained.outcome.failures[trained.failing]
    assert message.startswith("ValueError: the loss is ") and "\n" not in message
    assert trained.workspace.folder(trained.failing).record()["state"].startswith("failed: the loss is ")


@pytest.mark.slow
def test_the_plan_knows_what_is_finished(trained, paces, tmp_path):
    "With the data beside the results, and by description where only the results were copied."
    wanted = {"table1_modality": [*trained.runs, replace(trained.runs[0], seed=9)]}
    shutil.copytree(trained.workspace.out / "runs", tmp_path / "runs")
    for workspace in (trained.workspace, Workspace(tmp_path)):
        plan = estimate(wanted, workspace)
        assert plan.table.state.tolist() == ["open", "finished", "finished"]
        assert plan.table.hours.tolist()[1:] == [0, 0]
        assert "3 Runs, 2 finished" in plan.as_text()


@pytest.mark.slow
def test_the_command_names_what_failed(trained, command):
    "A damaged state fails its Run; the other is trained, the exit code tells, and there is no traceback."
    broken, whole = table1("smoke", seeds=[1])
    state = trained.workspace.folder(broken).state
    state.parent.mkdir(parents=True)
    state.write_bytes(b"nothing")
    code, text, complaints = command(
        "reproduce", "table1_modality", "--scale", "smoke", "--seeds", "1", "--out", trained.workspace.out, "--ray", "auto"
    )
    assert code == 1 and text.startswith("report: ")
    assert len(complaints) == 2 and complaints[0].startswith("agrivision: ResNet101 on RGB, seed 1 failed: ValueError: ")
    assert complaints[1].startswith("agrivision: table1_modality failed: its run ResNet101 on RGB, seed 1 failed: ")
    assert "is not a complete safetensors file" in complaints[0]
    assert trained.workspace.finished(whole) and not trained.workspace.finished(broken)


def test_a_long_training_is_announced(tmp_path, paces, capsys):
    "Three seeds of long runs: how many runs are left, and for how long; short ones are not announced."
    workspace = Workspace(tmp_path, device="cpu")
    _announce({"table1_modality": table1("smoke", seeds=[0, 1])}, workspace)
    assert capsys.readouterr().err == "" and not paces
    runs = [replace(run, recipe=replace(run.recipe, decay=1_000)) for run in table1("smoke", seeds=[0, 1, 2])]
    _announce({"table1_modality": runs}, workspace)
    line = capsys.readouterr().err
    assert re.fullmatch(r"6 runs, 0 finished; the others take about [\d.]+ (h|days) on this machine; interrupt it .*\n", line), line


@pytest.mark.parametrize(
    ("n_runs", "is_one_by_one", "asked", "wanted"),
    [
        (24, True, 0, (1, 16)),
        (24, True, 14, (14, 1)),
        (3, True, 14, (3, 5)),
        (24, False, 0, (8, 2)),
        (24, False, 2, (2, 8)),
        (1, False, 40, (1, 16)),
    ],
)
def test_sixteen_cores_are_divided_among_the_runs(n_runs, is_one_by_one, asked, wanted):
    "On a GPU one run at a time unless more are asked for; never more than there are runs, never less than a thread each."
    runs = [plan_run("laptop", "synthetic", seed=seed) for seed in range(n_runs)]
    assert _divide_cores(runs, is_one_by_one, 16, asked) == wanted
