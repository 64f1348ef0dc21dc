"Two processes with gloo: the same training as one, the same scores, and whole Runs of every norm."

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import run_in_parts
from norms import EVERY_NORM

from agrivision_repro.models.backbones import NORMS
from agrivision_repro.runs.listing import list_runs
from agrivision_repro.runs.store import run_folders
from agrivision_repro.runs.workspace import Workspace, score_again
from agrivision_repro.training.checkpoint import read_tensors

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*words) -> str:
    done = subprocess.run([str(w) for w in words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "What one process and two made of the same net."

    @cache
    def make(norm: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("sharing")
        for name in ("one", "two"):
            (folder / name).mkdir()
            run_in_parts(2 if name == "two" else 1, HELPERS / "sharing.py", folder / name, norm)
        return folder / "one", folder / "two"

    return make


@pytest.mark.parametrize("loss", ["bce", "hybrid"])
@pytest.mark.parametrize("norm", EVERY_NORM)
def test_two_processes_equal_one(norm, loss, folders):
    "BCE: one process on the whole batch. Dice and Lovász: one that averages the losses of both halves. Weights and buffers to 1e-9."
    one, two = (read_tensors(folder / f"{norm}-{loss}.safetensors")[0] for folder in folders(norm))
    assert one.keys() == two.keys() and len(one) > 100
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    scores = [json.loads((folder / f"{norm}-{loss}.json").read_text()) for folder in folders(norm)]
    for metric in scores[0]:
        assert scores[1][metric]["background_only"] == scores[0][metric]["background_only"]
        assert scores[1][metric]["mean"] == pytest.approx(scores[0][metric]["mean"], abs=1e-6)


def test_the_losses_differ(folders):
    "A check of the checks: halves of their own are another training."
    bce, hybrid = (read_tensors(folders("ibn_s")[0] / f"ibn_s-{loss}.safetensors")[0]["history"] for loss in ("bce", "hybrid"))
    assert bce.shape[1] == 3 and hybrid.shape[1] == 5


@pytest.mark.slow
def test_runs_over_two_processes(tmp_path):
    "A smoke Run of each norm ends, is recorded as two halves, and its weights score the same in one process: identical numbers."
    run_in_parts(2, HELPERS / "sharing.py", tmp_path, "--runs")
    assert list_runs(tmp_path).state.tolist() == ["finished"] * len(NORMS)
    workspace = Workspace(tmp_path, device="cpu", precision="float32")
    for folder in run_folders(tmp_path):
        result = folder.result()
        assert (result.record["processes"], result.record["micro_batches"]) == (2, 2)
        assert score_again(folder, workspace) == result.scores


@pytest.mark.slow
def test_the_command_over_two_processes(tmp_path):
    "Started by torchrun it trains once and speaks once."
    words = ["train", "--scale", "smoke", "--out", tmp_path, "-p", "norm=ibn_s", "-p", "depth=18"]
    printed = run(*TWO, "--no-python", BIN / "agrivision", *words)
    assert printed.count("tested on rgbn") == printed.count("2 processes (which share its cores: no faster than one)") == 1
    assert "strides do not match" not in printed
    assert list_runs(tmp_path).title.tolist() == ["IBN-Net18-s on NRGB, seed 0"]
