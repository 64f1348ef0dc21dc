"A workspace refuses a mistake in a line before it writes, scores only the data of the training, and leaves the user's folders."

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from trees import farm_2020

from agrivision_repro.cli.app import main
from agrivision_repro.data.editions import open_tiles
from agrivision_repro.runs.check import MAX_SEED
from agrivision_repro.runs.run import Source, plan_run
from agrivision_repro.runs.workspace import Workspace, score_again
from agrivision_repro.study.tables import check_seeds

DATA = "agrivision-2020"


@pytest.fixture
def farm(tmp_path):
    return farm_2020(tmp_path / "farm")


def find_nir(root: Path, split: str) -> Path:
    "The NIR image of one tile."
    tiles = open_tiles(DATA, root, split)
    return tiles.files(tiles.names[0])["nir"]


@pytest.mark.parametrize(("kind", "is_gpu"), [("mps", False), ("cuda", True)])
def test_apples_gpu_is_not_used(kind, is_gpu, monkeypatch, tmp_path):
    "It has no float64."
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    workspace = Workspace(tmp_path)
    assert workspace.on_gpu == is_gpu and not Workspace(tmp_path, device="cpu").on_gpu
    assert is_gpu or workspace.torch_device.type == "cpu"


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("channels=nir", "channels is 'nir': wanted one of rgb, nir3"),
        ("statistics=mine", "statistics is 'mine': wanted one of imagenet, dataset"),
        ("depth=99", "depth is 99: wanted one of 18"),
        ("dice=-1", "each must be at least 0"),
        ("intervention=kl", "intervention is 'kl': wanted one of"),
        (f"seed={MAX_SEED + 1}", f"seed is {MAX_SEED + 1}: wanted 0 to {MAX_SEED}"),
        ("seed=-1", "seed is -1: wanted 0 to"),
        ("recipe.evaluate_every=0", "recipe.evaluate_every is 0: wanted at least 1"),
        ("recipe.batch_size=0", "recipe.batch_size is 0: wanted at least 1"),
        ("recipe.width=0", "recipe.width is 0.0: wanted at least"),
        ("recipe.stop=1000", "the recipe has 1000 iterations: wanted 1 to 10"),
        ("recipe.sampler=mine", "recipe.sampler is 'mine': wanted one of shuffle, rare"),
    ],
)
def test_a_field_with_which_nothing_can_be_trained(pair, says, tmp_path, monkeypatch, capsys):
    words = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path / "out"), "-p", pair]
    monkeypatch.setattr(sys, "argv", ["agrivision", "train", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("agrivision: ") and says in line and not (tmp_path / "out").exists()


def test_seeds_beyond_the_largest_are_refused():
    assert check_seeds(MAX_SEED) == [MAX_SEED]
    with pytest.raises(ValueError, match=r"all different integers from 0 to 2\^31 - 1"):
        check_seeds(MAX_SEED + 1)
    torch.manual_seed((2**15 - 1 << 48) + (MAX_SEED << 32) + 2**32 - 1)  # the largest of `Trainer.backward`


def test_other_data_are_not_scored(farm, tmp_path):
    "Validation tiles that changed after the training; as they were, they are."
    run, workspace = plan_run("smoke", DATA), Workspace(tmp_path / "out", farm, device="cpu", precision="float32")
    folder = workspace.result(run).folder
    path = find_nir(farm, "val")
    before = path.read_bytes()
    Image.effect_noise((64, 64), 60).save(path, quality=95)
    with pytest.raises(ValueError, match=rf"the data differ from those of {folder}: pass with --data-root the folder"):
        score_again(folder, Workspace(tmp_path / "out", farm, device="cpu", precision="float32"), tta="d4")
    assert not folder.more_scores("last", "d4").exists()
    path.write_bytes(before)
    assert score_again(folder, workspace) == folder.result().scores


@pytest.mark.parametrize("kept", ["user", "user/out"])
def test_a_failed_pack_leaves_the_users_folders(kept, farm, tmp_path):
    "What was made for it is removed, and no more."
    find_nir(farm, "train").write_bytes(b"")
    (tmp_path / kept).mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be read"):
        Workspace(tmp_path / "user" / "out", farm).open(Source(DATA), "train")
    assert (tmp_path / kept).is_dir() and not list((tmp_path / kept).iterdir())


def test_a_folder_that_cannot_be_removed_hides_no_error(farm, tmp_path, monkeypatch):
    "As a mount, which is busy."
    find_nir(farm, "train").write_bytes(b"")

    def refuse(path: Path) -> None:
        raise OSError("busy")

    monkeypatch.setattr(Path, "rmdir", refuse)
    with pytest.raises(ValueError, match="cannot be read"):
        Workspace(tmp_path / "out", farm).open(Source(DATA), "train")
