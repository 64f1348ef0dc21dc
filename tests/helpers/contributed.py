"What the diffs of CONTRIBUTING.md make, checked by test_care.py in a copy of the checkout to which they were applied."

import importlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import agrivision_repro
from agrivision_repro.analysis.divergence import divergence
from agrivision_repro.cli.app import app
from agrivision_repro.data.editions import detect_edition, find_edition, open_tiles
from agrivision_repro.data.synthetic_files import SyntheticConfig, write_synthetic
from agrivision_repro.losses import FocalLoss, HybridLoss
from agrivision_repro.runs.run import build_model, plan_run
from agrivision_repro.runs.store import find_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study import tables
from agrivision_repro.study.class_tables import backbone_row, class_scores, class_table
from agrivision_repro.study.paper import TABLE2
from agrivision_repro.training.engine import make_engine
from agrivision_repro.training.loop import Trainer, fit

COPY = Path(agrivision_repro.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A Run of `agrivision train` with the new norm and the new loss."
    out = tmp_path_factory.mktemp("out")
    words = ["train", "--scale", "smoke", "--device", "cpu", "--precision", "float32", "--out", str(out)]
    assert not app([*words, "-p", "norm=ibn_g", "-p", "focal=0.5"], standalone_mode=False)
    return find_run(out, "").result()


def test_this_is_the_copy():
    assert COPY == Path.cwd().resolve()


def test_norm_that_no_table_lists(trained):
    assert "ibn_g" not in {run.norm for run in tables.all_runs()}
    assert trained.run.norm == "ibn_g" and any(isinstance(m, nn.GroupNorm) for m in trained.model().modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in timm.create_model("resnet50_ibn_g").modules()) == 13


def test_norm_that_the_study_lists(trained):
    subprocess.run(["git", "apply", "studied.diff"], cwd=COPY, check=True)
    importlib.reload(tables)
    assert all("ibn_g" in {run.norm for run in table()} for table in (tables.table2, tables.fig2))
    planned = [run for run in tables.table2() if run.depth == 50 and run.norm in ("bn", "ibn_g")]
    scores = class_scores([replace(trained, run=run) for run in planned], backbone_row, TABLE2)
    assert class_table(scores).loc["f1"].index.tolist() == ["ResNet50", "+ IBN-Net50-g"]


def test_loss(trained):
    logits, targets, valid = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1, 0]]]]), torch.tensor([[[True, False]]])
    assert torch.isclose(FocalLoss()(logits, targets, valid), torch.log(torch.tensor(2.0)) / 4 / 2)
    assert HybridLoss().term_names == ("bce", "dice", "lovasz")
    assert trained.folder.history.read_text().splitlines()[0].split(",")[1:] == ["lr", "loss", "bce", "dice", "focal"]


def test_loss_as_any_module(tmp_path):
    run, workspace = plan_run("smoke", "synthetic", depth=18), Workspace(tmp_path, device="cpu", precision="float32")
    trainer = Trainer(build_model(run), FocalLoss(), run.recipe, seed=0, engine=make_engine("cpu", "float32"))
    fit(trainer, workspace.feed(run, "train"), tmp_path / "state.safetensors")
    assert trainer.columns == ("lr", "loss") and len(trainer.history) == run.recipe.iterations


def test_metric(trained):
    iou, f1 = (trained.scores["rgbn"][metric]["per_class"] for metric in ("multilabel", "f1"))
    assert f1 == [None if x is None else pytest.approx(2 * x / (1 + x)) for x in iou] and max(filter(None, f1)) > 0


def test_estimator():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    table = divergence(nn.Sequential(nn.Identity()).eval(), [x], [3 * x], ["0"], ("sample", "contrast")).set_index("estimator")
    a = x.flatten(2).std(2, correction=0).double()
    (mean, var), means = (a.mean(0), a.var(0)), 3 * a.mean(0)
    gap = (means - mean).square()
    wanted = (var + gap) / (18 * var) + (9 * var + gap) / (2 * var) - 1
    assert table.divergence["contrast"] == pytest.approx(wanted.mean().item(), rel=1e-5)


def test_edition(tmp_path):
    root = write_synthetic(tmp_path / "orchards", SyntheticConfig(64, 1, 1, 1))
    for split in ("train", "val"):
        labels = root / split / "labels"
        (labels / "standing_water").rename(labels / "canopy"), (labels / "waterway").rename(labels / "gap")
    (root / "farmland.json").unlink()
    shutil.rmtree(root / "test")
    assert detect_edition(root) == "orchards"
    tiles = open_tiles("orchards", root, "val")
    assert tiles.classes == find_edition("orchards").classes == ("background", "canopy", "gap") and tiles[0].image.shape == (4, 64, 64)


def test_table(capsys, tmp_path):
    folder = COPY / "nbs" / "tables"
    text = (folder / "table3_losses.ipynb").read_text()
    (folder / "table4_stride.ipynb").write_text(text.replace("table3_losses", "table4_stride").replace("table3", "table4"))
    app(["plan", "table4_stride", "--scale", "smoke", "--seeds", "0,1", "--device", "cpu", "--out", str(tmp_path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed.startswith("4 Runs") and "(output_stride=8)" in printed
    runs = tables.TABLES["table4_stride"](seeds=(0, 1))
    assert [(r.seed, r.output_stride, r.norm) for r in runs] == [(s, o, "ibn_s") for s in (0, 1) for o in (16, 8)]
