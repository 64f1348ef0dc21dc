"A training ends with the same bits whatever happens to it, and says in a line what it cannot do."

import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import notebook_launcher
from accelerate.tracking import GeneralTracker
from forked import AGRIVISION, Forked, run, wait_until
from torch import nn

from agrivision_repro.cli.app import main
from agrivision_repro.core import Stopped
from agrivision_repro.data.batches import TileDataset
from agrivision_repro.data.tiles import Tile
from agrivision_repro.runs.listing import list_runs
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.training.checkpoint import read_tensors
from agrivision_repro.training.engine import compile_model, make_engine
from agrivision_repro.training.loop import Trainer, fit, history_table, load_state, save_state
from agrivision_repro.training.schedule import RECIPES, Recipe, learning_rate

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def contents(out: Path) -> dict[str, bytes]:
    "Everything that a training leaves, but for its record of when and where."
    (folder,) = out.glob("runs/*")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in ("run.json", ".lock")}


@pytest.mark.parametrize(("n_kills", "n_midway", "length"), [(5, 3, 20), pytest.param(22, 15, 120, marks=pytest.mark.slow)])
def test_killed_again_and_again(n_kills, n_midway, length, tmp_path):
    "SIGKILLs, then two SIGTERMs, at random moments: weights, history and scores of an undisturbed training, bit by bit."
    done = {n: run(HELPERS / "killing.py", tmp_path / str(n), n, "0", length, env=ONE_THREAD) for n in (0, n_kills)}
    assert [process.returncode for process in done.values()] == [0, 0], done
    assert int(done[n_kills].stdout) >= n_midway, done[n_kills].stderr  # killed while a training was under way
    wanted, found = (contents(tmp_path / str(n)) for n in (0, n_kills))
    assert sorted(found) == ["best.safetensors", "history.csv", "scores.json", "tiles.npy", "weights.safetensors"]
    assert found == wanted
    (folder,) = (tmp_path / str(n_kills)).glob("runs/*")
    assert not list(folder.glob("**/*.new")) and not (folder / "state").exists()


LONG = ["-p", "depth=18", "-p", "recipe.decay=100000", "--save-every", "2", "--device", "cpu"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(signum, code, tmp_path):
    "Ctrl-C, and what a scheduler sends: the state is saved, the exit code is the signal's, one line says so."
    process = Forked(AGRIVISION, "train", "--scale", "smoke", "--out", tmp_path, *LONG, env=ONE_THREAD)
    wait_until(lambda: list(tmp_path.glob("runs/*/state/state.safetensors")))
    process.send_signal(signum)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == code
    assert printed.splitlines()[-1] == "agrivision: stopped; the same command resumes from the last saved state"
    (row,) = list_runs(tmp_path).to_dict("records")
    assert row["state"].startswith(f"stopped: {signum.name}, saved at ")
    (state,) = tmp_path.glob("runs/*/state/state.safetensors")
    tensors, metadata = read_tensors(state)
    assert metadata["iteration"] == len(tensors["history"]) > 0


def test_two_processes_want_one_run(tmp_path):
    "One trains, the other says that it waits; both end with the same, in one folder."
    words = ["train", "--scale", "smoke", "--out", tmp_path, "--device", "cpu", "-p", "depth=18", "-p", "recipe.decay=60"]
    both = [Forked(AGRIVISION, *words, env=ONE_THREAD) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0]
    assert sum("another process is training the Run" in err for _, err in printed) == 1
    assert len(list(tmp_path.glob("runs/*"))) == 1 and list_runs(tmp_path).state.tolist() == ["finished"]


@pytest.fixture
def stopped(tmp_path):
    "A small Run that was stopped after its sixth iteration; its workspace, Run and state."
    run, options = plan_run("smoke", "synthetic", depth=18), {"device": "cpu", "save_every": 3}

    class Interrupting(GeneralTracker):
        name, requires_logging_directory = "interrupting", False
        tracker = None

        def __init__(self):
            super().__init__()

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **_):
            if step == 6:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        Workspace(tmp_path / "out", trackers=[Interrupting()], **options).result(run)
    workspace = Workspace(tmp_path / "out", **options)
    return workspace, run, workspace.folder(run).state


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", ["flipped", "cut", "pickled", "torch"])
def test_damaged_or_hostile_state(damage, stopped, tmp_path):
    "Refused in words, nothing run; the file is left for its owner to look at, and without it the training ends."
    workspace, run, state = stopped
    content = bytearray(state.read_bytes())
    content[-10] ^= 1
    if damage == "pickled":
        content = pickle.dumps(Hostile(tmp_path / "ran"))
    elif damage == "torch":
        torch.save({"weight": Hostile(tmp_path / "ran")}, tmp_path / "bad.pt")
        content = (tmp_path / "bad.pt").read_bytes()
    state.write_bytes(content[:-100] if damage == "cut" else content)
    with pytest.raises(ValueError, match="remove it to restart its run"):
        workspace.result(run)
    assert state.exists() and not (tmp_path / "ran").exists()
    state.unlink()
    assert workspace.result(run).checkpoints["last"]["iteration"] == 10


def test_damaged_weights(stopped):
    workspace, run, _ = stopped
    result = workspace.result(run)
    path = result.folder.weights()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, its checksum differs"):
        result.model()


def test_full_disk(stopped):
    "No room for the next state: an error that says so, the last state whole, nothing half-written; with room it goes on."
    workspace, run, state = stopped
    before, limits = state.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    iteration = read_tensors(state)[1]["iteration"]
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(OSError, match="cannot be written .*make room.* what was saved before is kept"):
            workspace.result(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert state.read_bytes() == before and not list(state.parent.glob("*.new"))
    assert workspace.result(run).record["resumed_at"] == iteration > 5


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["agrivision", "train", "--scale", "smoke", "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and printed.count("\n") == 0 and "Not a directory" in printed


def test_nothing_needs_unpickling(stopped):
    "Every file of a finished workspace is JSON, CSV, safetensors, an image, or an array without objects."
    workspace, run, _ = stopped
    workspace.result(run)
    files = [p for p in workspace.out.rglob("*") if p.is_file() and p.name != ".lock" and p.suffix != ".lock"]
    assert {p.suffix for p in files} <= {".json", ".csv", ".safetensors", ".png", ".jpg", ".npy"}, {p.suffix for p in files}
    for path in files:
        if path.suffix == ".npy":
            np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".safetensors":
            assert read_tensors(path)[0]


def authors_rate(iteration: int, warmup: int, static: int, decay: int) -> float:
    "As read in the authors' code (train.py:306-318)."
    if iteration < warmup:
        return 0.01 * (iteration + 1) / warmup
    if iteration < warmup + static:
        return 0.01
    return 0.01 * (1 - (iteration - warmup - static) / decay) ** 0.9


PAPERS, SHIPPED = (1000, 7000, 17000), (2000, 8000, 20000)


@pytest.mark.parametrize(
    ("name", "n", "schedule"),
    [("paper", 25_000, PAPERS), ("epochs", 24_986, PAPERS), ("shipped", 29_822, SHIPPED), ("shipped-30000", 30_000, SHIPPED)],
)
def test_the_authors_schedule_at_every_iteration(name, n, schedule):
    recipe = RECIPES[name]
    assert recipe.iterations == n
    ours, theirs = np.array([(learning_rate(recipe, t), authors_rate(t, *schedule)) for t in range(n)]).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.crop) == (32, 0.9, 5e-4, 0)


def test_the_rate_that_the_optimizer_uses(stopped):
    workspace, run, _ = stopped
    history = np.loadtxt(workspace.result(run).folder.history, delimiter=",", skiprows=1)
    np.testing.assert_allclose(history[:, 1], [learning_rate(run.recipe, t) for t in range(10)], rtol=1e-6)


def test_no_compiler_is_a_line_not_a_crash():
    script = (
        "import torch; from agrivision_repro.training.engine import compile_model; m = torch.nn.Conv2d(4, 2, 1); "
        "print(compile_model(m, torch.device('cpu'))); print(tuple(m(torch.zeros(1, 4, 8, 8)).shape))"
    )
    environment = ONE_THREAD | {"CXX": "/nowhere/c++", "TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_CACHE_DIR": "/nowhere/cache"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    said, shape = done.stdout.splitlines()
    assert said.startswith("not compiled, no compiler works here (") and shape == "(1, 2, 8, 8)"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_in_place():
    "The keys stay, and the result."
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1), torch.nn.ReLU()), torch.randn(1, 4, 8, 8)
    keys, wanted = list(model.state_dict()), model(x)
    assert compile_model(model, torch.device("cpu")) == "compiled"
    torch.testing.assert_close(model(x), wanted)
    assert list(model.state_dict()) == keys


def test_from_a_notebook(tmp_path):
    "Accelerate's launcher takes a workspace's own function."
    run, workspace = plan_run("smoke", "synthetic", depth=18), Workspace(tmp_path, device="cpu")
    notebook_launcher(workspace.result, (run,), num_processes=1)
    assert workspace.finished(run).record["processes"] == 1


def test_micro_batches_are_recorded_and_change_the_training(tmp_path):
    workspace = Workspace(tmp_path, device="cpu")
    run = plan_run("smoke", "synthetic", depth=18, lovasz=1.0)
    halves = replace(run, recipe=replace(run.recipe, micro_batches=2))
    whole, cut = workspace.result(run), workspace.result(halves)
    assert (whole.record["micro_batches"], cut.record["micro_batches"]) == (1, 2) and whole.folder != cut.folder
    assert whole.folder.history.read_text() != cut.folder.history.read_text()


class Squared(nn.Module):
    "A loss of one's own: one scalar, no terms."

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return ((logits.float().sigmoid() - targets.float()).square() * valid[:, None]).mean()


def test_any_module_that_returns_a_scalar_is_a_loss(tmp_path):
    "It trains and its state is saved and loaded; its history has the learning rate and the loss."
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (4, 4, 8, 8), np.uint8)
    tiles = [Tile.of(f"tile {k}", x, (x[3] > 128).astype(np.uint8), np.ones((8, 8), bool)) for k, x in enumerate(images)]
    feed = TileDataset(tiles, "rgbn", 2)
    recipe = Recipe(1, 30, 1, lr=1.0, batch_size=4, micro_batches=2, pretrained=False)
    make = partial(Trainer, loss=Squared(), recipe=recipe, seed=0, engine=make_engine("cpu", "float32"))
    trainer = make(nn.Conv2d(4, 2, 1))
    fit(trainer, feed, tmp_path / "state", validation=feed)
    save_state(trainer, tmp_path / "state")
    load_state(resumed := make(nn.Conv2d(4, 2, 1)), tmp_path / "state")
    for history in map(history_table, (trainer, resumed)):
        assert list(history.columns) == ["lr", "loss"] and len(history) == 32
        assert history.loss.iloc[-1] < history.loss.iloc[0] / 2


def test_both_checkpoints_are_kept_and_named(tmp_path):
    run = plan_run("smoke", "synthetic", depth=18, channels="rgb")
    result = Workspace(tmp_path, device="cpu").result(run)
    seen = dict(result.record["evaluations"])
    assert list(seen) == [5, 10]
    best = max(seen, key=seen.get)
    assert result.checkpoints["best"]["iteration"] == best and result.checkpoints["last"]["iteration"] == 10
    for name, iteration in (("best", best), ("last", 10)):
        assert result.checkpoints[name]["scores"]["rgb"]["multilabel"]["mean"] == pytest.approx(seen[iteration], abs=1e-12)
