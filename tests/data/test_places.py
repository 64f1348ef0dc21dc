"A place that a run was trained on is not scored, in whatever year it was seen."

import shutil
from dataclasses import replace

import pytest
from trees import farm_2020

from agrivision_repro.data.editions import field_of
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace


@pytest.fixture
def mixed(tmp_path):
    "Tiles of a field that is in train, seen in val under the name of other corners."
    root = farm_2020(tmp_path) / "Agriculture-Vision"
    name = sorted(path.stem for path in (root / "train/images/rgb").iterdir())[0]
    moved = f"{field_of(name)}_900-900-964-964"
    for path in (root / "train").rglob(f"{name}.*"):
        shutil.copy(path, root / "val" / path.relative_to(root / "train").with_name(moved + path.suffix))
    return tmp_path, moved


def test_validation_tiles_left_out(mixed, tmp_path):
    folder, moved = mixed
    workspace, run = Workspace(tmp_path / "out", folder, "cpu"), plan_run("laptop", "agrivision-2020", shared_places="val")
    tiles = workspace.open(run.source, "val")
    assert workspace.left_out(run) == [moved]
    assert [tile.name for tile in workspace.tiles(run, "val")] == [name for name in tiles.names if name != moved]
    assert workspace.fields(run) == [field_of(tile.name) for tile in workspace.tiles(run, "val")]

    every = replace(run, shared_places="keep")
    assert workspace.left_out(every) == []
    assert len(workspace.tiles(every, "val")) == len(tiles) == len(workspace.tiles(run, "val")) + 1


def test_training_tiles_left_out_by_default(mixed, tmp_path):
    folder, moved = mixed
    workspace, run = Workspace(tmp_path / "out", folder, "cpu"), plan_run("laptop", "agrivision-2020")
    trained = [tile.name for tile in workspace.tiles(run, "train")]
    assert moved in [tile.name for tile in workspace.tiles(run, "val")]
    assert field_of(moved) not in map(field_of, trained)
    assert sorted(trained + workspace.left_out(run)) == workspace.open(run.source, "train").names
    with pytest.raises(ValueError, match="shared_places is 'both': wanted one of val, train, keep"):
        workspace.left_out(replace(run, shared_places="both"))


def test_nothing_left_to_score(mixed, tmp_path):
    folder, moved = mixed
    for path in (folder / "Agriculture-Vision/val").rglob("*.*"):
        if path.stem != moved:
            path.unlink()
    with pytest.raises(ValueError, match="all 1 tiles of val show places of train: set shared_places='train', or split by place"):
        Workspace(tmp_path / "out", folder, "cpu").tiles(plan_run("laptop", "agrivision-2020", shared_places="val"), "val")


def test_record_names_what_is_left_out(mixed, tmp_path, capsys):
    folder, moved = mixed
    result = Workspace(tmp_path / "out", folder, "cpu").result(plan_run("smoke", "agrivision-2020", depth=18))
    left_out = result.record["left_out"]
    assert left_out and set(map(field_of, left_out)) == {field_of(moved)}
    assert f"{len(left_out)} tiles of train are left out because both splits show their places: {left_out[0]}" in capsys.readouterr().err
