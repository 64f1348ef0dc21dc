"A pack holds every pixel and label, survives being killed, and hides no damage."

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import AGRIVISION, Forked, agrivision, run
from PIL import Image
from trees import FARM, ag_net, farm_2020, farm_2021, farm_cvpr2020, naip_chips

from agrivision_repro.data import pack
from agrivision_repro.data.batches import make_batch, scoring_loader
from agrivision_repro.data.editions import fingerprint, open_splits, open_tiles
from agrivision_repro.data.pack import PackedTiles, open_split, pack_folder, pack_split
from agrivision_repro.data.readers import UrbanTrees
from agrivision_repro.data.synthetic_files import SyntheticConfig, write_synthetic
from agrivision_repro.data.tiles import places_in_both, unpack_labels

NAIP = Path(__file__).resolve().parents[3] / "shared" / "naip-trees"  # beside a developer's checkout only
BIN = Path(sys.executable).parent


def naip(folder: Path) -> Path:
    if not NAIP.is_dir():
        pytest.skip("the NAIP chips are not beside this checkout")
    return shutil.copytree(NAIP, folder)


def synthetic(folder: Path) -> Path:
    return write_synthetic(folder, FARM)


LAYOUTS = {
    "synthetic": synthetic, "agrivision-2020": farm_2020, "agrivision-2021": farm_2021, "agrivision-cvpr2020": farm_cvpr2020,
    "classes:waterway,planter_skip": synthetic, "naip-trees": naip, "ag-net": ag_net,
}  # fmt: skip


@pytest.mark.parametrize("edition", LAYOUTS)
def test_round_trip(edition, tmp_path):
    "Written, read, packed, made a batch: every pixel and label bit."
    root = LAYOUTS[edition](tmp_path / "data")
    for tiles in open_splits(edition, root):
        pack_split(tiles, pack_folder(edition, root), n_workers=2)
        packed = open_split(edition, root, tiles.split)
        assert isinstance(packed, PackedTiles) and fingerprint([packed]) == fingerprint([tiles])
        (samples,) = scoring_loader(packed, batch_size=len(packed))
        batch = make_batch(samples, "rgbn", len(tiles.classes))
        for k, tile in enumerate(tiles):
            np.testing.assert_array_equal(packed[k].image, tile.image)
            np.testing.assert_array_equal(samples.planes[k, :4], tile.image)
            np.testing.assert_array_equal(batch.targets[k], unpack_labels(tile.labels, len(tiles.classes)))
            np.testing.assert_array_equal(batch.valid[k], tile.valid)
            restored = batch.x[k] * torch.tensor([0.229, 0.224, 0.225, 0.229])[:, None, None]
            restored = (restored + torch.tensor([0.485, 0.456, 0.406, 0.485])[:, None, None]) * 255
            np.testing.assert_array_equal(restored.round(), tile.image)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix in (".npy", ".json")}


def test_killed_ten_times(tmp_path):
    "SIGKILL at random moments, then once to the end: the bytes of an undisturbed run."
    root = write_synthetic(tmp_path / "farm", SyntheticConfig(size=256, train_fields=12, val_fields=2, test_fields=1))
    command = ["data", "pack", root, "--workers", "2"]
    agrivision(*command).check_returncode()
    undisturbed = contents(root / "packed")
    shutil.rmtree(root / "packed")
    moments, n_midway, n_done = random.Random(0), 0, 0
    for _ in range(10):
        process = Forked(AGRIVISION, *command)
        target = n_done + moments.randrange(5)
        while n_written(root) <= target and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        n_done = n_written(root)
        n_midway += 0 < n_done < 56
    agrivision(*command).check_returncode()
    assert contents(root / "packed") == undisturbed
    assert n_midway > 1  # how many kills fall midway depends on the load of the machine


def n_written(root: Path) -> int:
    "How many tiles a pack in the making, or the finished splits, hold."
    n_lines = sum(len(path.read_text().split("\n")) - 1 for path in (root / "packed").glob(".*.part/journal.jsonl"))
    return n_lines + sum(len(PackedTiles(path.parent)) for path in (root / "packed").glob("[!.]*/index.json"))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "index.json"])
def test_a_flipped_byte_is_found(name, tmp_path):
    root = synthetic(tmp_path / "farm")
    tiles = open_tiles("synthetic", root, "train")
    pack_split(tiles, root / "packed", n_workers=1)
    path = root / "packed/train" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="make the pack again with agrivision data pack"):
        list(open_split("synthetic", root, "train"))
    pack_split(tiles, root / "packed", n_workers=1)
    assert len(list(open_split("synthetic", root, "train"))) == len(tiles)


def test_a_shortened_pack_is_found_on_opening(tmp_path):
    root = synthetic(tmp_path / "farm")
    pack_split(open_tiles("synthetic", root, "val"), root / "packed", n_workers=1)
    path = root / "packed/val/images.npy"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="make the pack again"):
        open_split("synthetic", root, "val")


def test_no_room(tmp_path, monkeypatch):
    root = synthetic(tmp_path / "farm")
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"packing train needs 0\.00 GB, .* has 0\.00 GB left: make room"):
        pack_split(open_tiles("synthetic", root, "train"), root / "packed", n_workers=1)
    assert not any((root / "packed").glob(".*.part"))


def test_tiles_of_two_sizes(tmp_path):
    root = synthetic(tmp_path / "farm")
    tiles = open_tiles("synthetic", root, "train")
    for role, path in tiles.files(tiles.names[-1]).items():
        Image.new("RGB" if role == "rgb" else "L", (32, 32)).save(path)
    with pytest.raises(ValueError, match="a pack holds tiles of one size"):
        pack_split(tiles, root / "packed", n_workers=1)
    assert not (root / "packed/train").exists()


def test_changed_files_are_packed_again(tmp_path):
    root = synthetic(tmp_path / "farm")
    tiles = open_tiles("synthetic", root, "train")
    before = pack_split(tiles, root / "packed", n_workers=1).fingerprint
    Image.effect_noise((64, 64), 60).save(tiles.files(tiles.names[0])["nir"], quality=95)
    assert pack_split(tiles, root / "packed", n_workers=1).fingerprint != before


@pytest.mark.parametrize("change", ["added", "removed", "corrected", "not there", "none"])
def test_a_pack_made_before_its_files_changed(change, tmp_path):
    "It is refused and made again; one whose files were removed stands for them."
    root = synthetic(tmp_path / "farm")
    tiles = open_tiles("synthetic", root, "train")
    pack_split(tiles, root / "packed", n_workers=1)
    name, files = tiles.names[1], tiles.files(tiles.names[1])
    if change == "corrected":
        Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(files["waterway"])
    elif change == "added":
        name = "a_0"
        for path in files.values():
            shutil.copyfile(path, path.with_stem(name))
    elif change == "removed":
        for path in files.values():
            path.unlink()
    elif change == "not there":
        shutil.rmtree(root / "train")
    if change in ("not there", "none"):
        assert len(list(open_split("synthetic", root, "train"))) == len(tiles)
        return
    with pytest.raises(ValueError, match=rf"train was packed before its files changed \({name}\): make the pack again"):
        open_split("synthetic", root, "train")
    packed = pack_split(open_tiles("synthetic", root, "train"), root / "packed", n_workers=1)
    assert open_split("synthetic", root, "train").fingerprint == packed.fingerprint


def test_a_pack_of_other_places(tmp_path, monkeypatch):
    "A pack made when the places of tiles were told otherwise is refused, and made again, also where it was not finished."
    root = naip_chips(tmp_path / "chips", {"train": ("elm_2018_1", "elm_2020_1"), "val": ("elm_2018_2",)})
    with monkeypatch.context() as patch:
        patch.setattr(UrbanTrees, "field", classmethod(lambda cls, name: name))
        old = open_tiles("naip-trees", root, "train")
        pack_split(old, root / "packed", n_workers=1)
        partly = root / "packed/.val.part"
        pack.start_pack(open_tiles("naip-trees", root, "val"), partly)
        (partly / "journal.jsonl").write_text(json.dumps(pack.pack_tile(open_tiles("naip-trees", root, "val"), partly, 0)))
    with pytest.raises(ValueError, match="records other places than naip-trees has now: make the pack again with agrivision data pack"):
        open_split("naip-trees", root, "train")
    for split, places in (("train", ["elm_1", "elm_1"]), ("val", ["elm_2"])):
        pack_split(open_tiles("naip-trees", root, split), root / "packed", n_workers=1)
        assert open_split("naip-trees", root, split).fields == places


def test_places_in_both_of_packs(tmp_path):
    root = naip_chips(tmp_path / "chips", {"train": ("elm_2018_1", "oak_2020_1"), "val": ("elm_2020_1", "elm_2018_2")})
    packed = [pack_split(open_tiles("naip-trees", root, split), root / "packed", n_workers=1) for split in ("train", "val")]
    assert places_in_both(*packed) == {"elm_1"}


def test_files_that_changed_after_the_kill(tmp_path):
    "A tile that was done before, of a file that is another now, is decoded again."
    root = synthetic(tmp_path / "farm")
    tiles, partly = open_tiles("synthetic", root, "train"), root / "packed/.train.part"
    pack.start_pack(tiles, partly)
    (partly / "journal.jsonl").write_text(json.dumps(pack.pack_tile(tiles, partly, 0)))
    Image.effect_noise((64, 64), 60).save(tiles.files(tiles.names[0])["nir"], quality=95)
    packed = pack_split(tiles, root / "packed", n_workers=1)
    np.testing.assert_array_equal(packed[0].image, tiles[0].image)


MEMORY = """
import resource, sys
from agrivision_repro.runs.run import Source, plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.training.schedule import Recipe
from agrivision_repro.data.synthetic_files import SyntheticConfig
from dataclasses import replace
farm = SyntheticConfig(size=256, train_fields=int(sys.argv[2]), val_fields=1, test_fields=1)
n_tiles = 4 * farm.train_fields
recipe = Recipe(1, 1, 18, lr=0.01, batch_size=4, crop=32, width=1 / 16, pretrained=False)  # the same work for both
run = replace(plan_run("smoke", "synthetic", depth=18), source=Source("synthetic", farm), recipe=recipe)
workspace = Workspace(sys.argv[1], device="cpu")
if len(sys.argv) > 3:  # make and pack the farm
    for split in ("train", "val"):
        workspace.open(run.source, split)
else:
    print(workspace.result(run).record["n_train"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_tiles(tmp_path):
    "A training on ten times the tiles (of which it sees eighty): less than 5 % more resident memory."
    found = []
    for n_fields in (2, 20):
        words = [sys.executable, "-c", MEMORY, tmp_path / str(n_fields), str(n_fields)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        run(*words, "pack", env=environment).check_returncode()
        done = run(*words, env=environment)  # a process of its own memory
        found.append([int(word) for word in done.stdout.split()])
    (few, small), (many, large) = found
    assert many == 10 * few
    assert large < 1.05 * small, found
