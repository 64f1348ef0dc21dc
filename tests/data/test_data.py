"Every edition in its true layout, and every fault of a copy named."

import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from trees import (
    AG_NET_TILES,
    CLASSES_2021,
    FARM,
    ag_net,
    ag_net_codes,
    ag_net_reflectance,
    farm_2020,
    farm_2021,
    farm_cvpr2020,
    naip_chips,
)

from agrivision_repro.cli.app import main
from agrivision_repro.data.archives import unpack_archive
from agrivision_repro.data.check import ALIKE, alike_pairs, check_data, thumbnail
from agrivision_repro.data.editions import AGRIVISION_2020, AGRIVISION_2021, detect_edition, field_of, open_splits, open_tiles
from agrivision_repro.data.readers import CROPS, WHITE
from agrivision_repro.data.synthetic_files import write_synthetic
from agrivision_repro.data.tiles import BadFile, places_in_both, unpack_labels

SHARED = Path(__file__).resolve().parents[3] / "shared"  # beside a developer's checkout only
NAIP = SHARED / "naip-trees"  # 120 chips
NAIP_SHARED = ("claremont_10", "riverside_12", "riverside_14", "long_beach_98")  # places in two splits
AG_NET = SHARED / "ag-net" / "ag-net.tar.xz"  # 272 tiles


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("farm") / "farm", FARM)


def bit(tile, classes: tuple[str, ...], name: str) -> np.ndarray:
    "The mask of one class."
    return (tile.labels >> classes.index(name) & 1).astype(bool)


@pytest.mark.parametrize(("layout", "edition"), [(farm_2021, "agrivision-2021"), (farm_cvpr2020, "agrivision-cvpr2020")])
def test_other_editions(layout, edition, farm, tmp_path):
    "Every pixel and label of the farm comes back; storm damage alone is neither background nor scored."
    root = layout(tmp_path / "data")
    assert detect_edition(root) == edition
    for split in ("train", "val"):
        tiles = open_tiles(edition, root, split)
        assert tiles.classes == ("background", *AGRIVISION_2021)
        truth = {tile.name: tile for tile in open_tiles("synthetic", farm, split)}
        assert tiles.names == sorted(truth)
        for tile in tiles:
            old = truth[tile.name]
            np.testing.assert_array_equal(tile.image, old.image)
            for name in AGRIVISION_2021:
                np.testing.assert_array_equal(bit(tile, AGRIVISION_2021, name), bit(old, AGRIVISION_2020, CLASSES_2021[name]))
            storm = bit(old, AGRIVISION_2020, CLASSES_2021["storm_damage"])
            np.testing.assert_array_equal(tile.valid, old.valid & (~storm | (tile.labels > 0)))


def test_storm_damage_alone_is_invalid(tmp_path):
    root = farm_2021(tmp_path / "data")
    tiles = open_tiles("agrivision-2021", root, "train")
    files = tiles.files(tiles.names[0])
    size = tiles[0].labels.shape
    for role in tiles.label_roles:
        Image.new("L", size).save(files[role])
    Image.new("L", size, 255).save(files["storm_damage"])
    assert not open_tiles("agrivision-2021", root, "train")[0].valid.any()


def test_the_papers_edition_is_found_from_above_and_within(tmp_path):
    root = farm_2020(tmp_path / "data")
    assert detect_edition(root) == detect_edition(root / "Agriculture-Vision") == "agrivision-2020"
    assert open_tiles("agrivision-2020", root, "val").names == open_tiles("agrivision-2020", root / "Agriculture-Vision", "val").names


def test_own_classes(farm):
    tiles = open_tiles("classes:waterway,weed_cluster", farm, "train")
    whole = open_tiles("synthetic", farm, "train")
    assert tiles.classes == ("background", "waterway", "weed_cluster")
    for ours, theirs in zip(tiles, whole, strict=True):
        np.testing.assert_array_equal(ours.labels, theirs.labels >> 4 & 3)
    with pytest.raises(FileNotFoundError, match="lacks train/labels/road"):
        open_tiles("classes:road", farm, "train")


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"train": []}'])
def test_bad_split_lists(text, tmp_path):
    root = farm_cvpr2020(tmp_path / "data")
    (root / "data2017_splits.json").write_text(text)
    with pytest.raises(ValueError, match="data2017_splits.json does not list the fields of val"):
        open_tiles("agrivision-cvpr2020", root, "val")


def test_missing_masks_are_said_once(farm, tmp_path):
    root = shutil.copytree(farm, tmp_path / "copy")
    for split in ("train", "val", "test"):
        shutil.rmtree(root / split / "boundaries")
        shutil.rmtree(root / split / "masks")
    with pytest.warns(UserWarning, match="lacks boundaries/ or masks/") as warned:
        tiles = open_tiles("synthetic", root, "train")
        assert all(tile.valid.all() for tile in tiles)
    assert len(warned) == 1


def test_counts_are_right(farm):
    report = check_data(farm, n_workers=2)
    assert report.is_trustworthy and not report.faults and report.labeled == {"train": True, "val": True, "test": False}
    for split in report.labeled:
        tiles, found = list(open_tiles("synthetic", farm, split)), report.describe(split)
        labels, valid = (np.stack([getattr(tile, name) for tile in tiles]) for name in ("labels", "valid"))
        n_labels = sum((labels >> k & 1).astype(int) for k in range(6))
        assert found["tiles"] == len(tiles) and found["fields"] == len({field_of(tile.name) for tile in tiles})
        assert (found["pixels"], found["valid"], found["sizes"]) == (valid.size, valid.sum(), {"64x64": len(tiles)})
        assert found["overlapping"] == ((n_labels > 1) & valid).sum()
        wanted = [((n_labels == 0) & valid).sum(), *(((labels >> k & 1) * valid).sum() for k in range(6))]
        np.testing.assert_array_equal(report.class_table(split)["pixels"], wanted)
        shown = [valid.any((1, 2)).sum(), *(((labels >> k & 1) * valid).any((1, 2)).sum() for k in range(6))]
        np.testing.assert_array_equal(report.class_table(split)["tiles"][1:], shown[1:])
        nir = np.concatenate([tile.image[3][tile.valid] for tile in tiles]) / 255
        np.testing.assert_allclose(report.channel_table(split).loc["NIR"], [nir.mean(), nir.std()], atol=1e-4)


def test_a_damaged_test_split_is_not_passed_over(farm, tmp_path):
    root = shutil.copytree(farm, tmp_path / "copy")
    shutil.rmtree(root / "test/images/nir")
    with pytest.raises(FileNotFoundError, match="lacks test/images/nir"):
        check_data(root, n_workers=1)
    shutil.rmtree(root / "test")
    assert list(check_data(root, n_workers=1).labeled) == ["train", "val"]  # without it, a copy is a copy


def plant_faults(root: Path) -> dict[str, str]:
    "Damage a copy in twelve ways; give kind → a word that must stand in the message."
    tiles = open_tiles("synthetic", root, "train")
    names, planted = iter(tiles.names), {}

    def spoil(kind: str, role: str, write) -> None:
        path = tiles.files(next(names))[role]
        write(path)
        planted[kind] = str(path)

    spoil("missing", "nir", Path.unlink)
    spoil("unreadable", "rgb", lambda p: p.write_bytes(b"not an image"))
    spoil("truncated", "rgb", lambda p: p.write_bytes(p.read_bytes()[:-200]))
    spoil("wrong mode", "masks", lambda p: Image.new("RGB", (64, 64), "white").save(p))
    spoil("wrong size", "waterway", lambda p: Image.new("L", (63, 64)).save(p))
    spoil("not binary", "weed_cluster", lambda p: Image.new("L", (64, 64), 128).save(p))
    spoil("no valid pixel", "boundaries", lambda p: Image.new("L", (64, 64)).save(p))
    planted["no valid pixel"] = Path(planted["no valid pixel"]).stem
    first, second, moved, shared = (next(names) for _ in range(4))
    shutil.copy(tiles.files(first)["rgb"], tiles.files(second)["rgb"])
    planted["duplicate"] = second
    for old, new, folder in ((moved, "nameless", "train"), (shared, shared, "val"), (shared, f"{field_of(shared)}_9-9-73-73", "val")):
        for role, path in tiles.files(old).items():
            copy = root / folder / path.relative_to(root / "train").with_stem(new)
            path.rename(copy) if old == moved else shutil.copy(path, copy)
            if role == "rgb" and new != old and old == shared:  # another image of the same field
                Image.fromarray(np.asarray(Image.open(path))[::-1]).save(copy, quality=95)
    planted |= {"bad name": "nameless", "name in two splits": shared, "field in two splits": field_of(shared)}
    stray = root / "val/labels/waterway/XXXXXXXXX_0-0-64-64.png"
    Image.new("L", (64, 64)).save(stray)
    return planted | {"without image": str(stray)}


def test_twelve_faults_are_all_named(farm, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(farm, tmp_path / "copy")
    planted = plant_faults(root)
    assert len(planted) == 12
    report = check_data(root, n_workers=1)
    found = {fault.kind: [f.message for f in report.faults if f.kind == fault.kind] for fault in report.faults}
    assert found.keys() == planted.keys()
    for kind, word in planted.items():
        assert any(word in message for message in found[kind]), kind
    assert not report.is_trustworthy
    monkeypatch.setattr(sys, "argv", ["agrivision", "data", "check", str(root), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1 and len(printed["faults"]) == len(report.faults)


def test_a_tile_without_valid_pixel_is_no_reason_for_distrust(farm, tmp_path):
    root = shutil.copytree(farm, tmp_path / "copy")
    tiles = open_tiles("synthetic", root, "train")
    Image.new("L", (64, 64)).save(tiles.files(tiles.names[0])["masks"])
    report = check_data(root, n_workers=1)
    assert [fault.kind for fault in report.faults] == ["no valid pixel"] and report.is_trustworthy


@pytest.mark.skipif(not NAIP.is_dir(), reason="the NAIP chips are not beside this checkout")
def test_naip_chips():
    assert detect_edition(NAIP) == "naip-trees"
    report = check_data(NAIP, n_workers=2)
    assert report.is_trustworthy
    assert [(fault.kind, fault.where) for fault in report.faults] == [("place in two splits", place) for place in NAIP_SHARED]
    assert len(report.tiles) == 120 and (report.tiles[["height", "width"]] == 256).all(axis=None)


def test_ag_net_tiles(tmp_path):
    "Every band, code and split of a generated tree, against a reading by hand."
    root = ag_net(tmp_path / "data")
    assert detect_edition(root) == "ag-net"
    for tiles in open_splits("ag-net", root):
        assert tiles.names == sorted(AG_NET_TILES[tiles.split]) and tiles.classes == ("background", *CROPS)
        for tile in tiles:
            reflectance, codes = ag_net_reflectance(tile.name) / 1e4, ag_net_codes(tile.name)
            for channel, found, white in zip(reflectance, tile.image, (0.22, 0.18, 0.18, 0.55), strict=True):
                np.testing.assert_allclose(found, 255 * np.clip(channel / white, 0, 1), atol=0.5 + 1e-9)
            np.testing.assert_array_equal(tile.valid, (reflectance != -1e-4).all(0))
            assert not tile.valid.all()
            masks = unpack_labels(tile.labels, 9)
            for mask, wanted in zip(masks[1:], CROPS.values(), strict=True):
                np.testing.assert_array_equal(mask, np.isin(codes, wanted))
            np.testing.assert_array_equal(masks.sum(0), 1)


def test_ag_net_fields_are_blocks(tmp_path):
    tiles = open_tiles("ag-net", ag_net(tmp_path / "data"), "train")
    assert dict(zip(tiles.names, tiles.fields, strict=True)) == {"3_7": "0_1", "4_8": "1_2", "30_39": "7_9"}


def spoil_ag_net(fault: str, root: Path) -> None:
    "Damage the generated tile 3_44."
    band, label = root / "input_32bit/lc8_2015245_3_44_5.tif", root / "target/cdl_2015245_3_44.tif"
    if fault == "damaged label":
        label.write_bytes(label.read_bytes()[:900])
    elif fault == "cut band":
        band.write_bytes(band.read_bytes()[:30_000])
    elif fault == "8-bit band":
        tifffile.imwrite(band, np.full((128, 128), 255, np.uint8))
    elif fault == "another size":
        tifffile.imwrite(band, np.zeros((64, 128), np.int32))
    elif fault == "label of another size":
        Image.new("L", (64, 64), 1).save(label, compression="tiff_lzw")
    elif fault == "unknown codes":
        Image.fromarray(np.resize(np.array([1, 5, 7, 255], np.uint8), (128, 128))).save(label, compression="tiff_lzw")
    else:
        {"missing band": band, "missing label": label}[fault].unlink()


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("damaged label", ("unreadable", "truncated"), "cdl_2015245_3_44.tif cannot be read"),
        ("cut band", ("unreadable", "truncated"), "_3_44_5.tif cannot be read"),
        ("8-bit band", ("wrong mode",), "_3_44_5.tif is not int32: NIR is clipped in the 8-bit files, so unpack input_32bit, not input"),
        ("another size", ("wrong size",), "_3_44_5.tif is 64×128 pixels, wanted 128×128"),
        ("label of another size", ("wrong size",), "cdl_2015245_3_44.tif is 64×64 pixels, wanted 128×128"),
        ("unknown codes", ("unknown code",), "cdl_2015245_3_44.tif has crop codes that cdlvalue.csv lacks (7, 255): unpack it again"),
        ("missing band", ("missing",), "_3_44_5.tif is missing: unpack it again"),
        ("missing label", ("missing",), "cdl_2015245_3_44.tif is missing: unpack it again"),
    ],
)
def test_ag_net_faults(fault, kind, message, tmp_path):
    "A fault of one file is one line, when the tile is read and in the check."
    root = ag_net(tmp_path / "data")
    spoil_ag_net(fault, root)
    tiles = open_tiles("ag-net", root, "val")
    with pytest.raises((BadFile, FileNotFoundError)) as refused:
        tiles[tiles.names.index("3_44")]
    assert message in str(refused.value) and "\n" not in str(refused.value)
    report = check_data(root, n_workers=1)
    assert [f.message for f in report.faults] == [str(refused.value)] and report.faults[0].kind in kind and not report.is_trustworthy


def test_ag_net_needs_the_folder_of_32_bits_and_every_band(tmp_path):
    root = ag_net(tmp_path / "data")
    for path in (root / "input_32bit").glob("*_5.tif"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no input_32bit/lc8_2015245_ROW_COL_5.tif of the split 'train'"):
        open_tiles("ag-net", root, "train")
    (root / "input_32bit").rename(root / "input")
    with pytest.raises(FileNotFoundError, match="has input, clipped to 8 bits, but not input_32bit"):
        check_data(root, n_workers=1)
    (root / "input").rename(root / "input_rgb")
    with pytest.raises(FileNotFoundError, match="lacks input_32bit of the layout 'ag-net'"):
        open_tiles("ag-net", root, "train")


@pytest.mark.skipif(not AG_NET.is_file(), reason="the sample of Ag-Net is not beside this checkout")
def test_ag_net_sample(tmp_path):
    root = unpack_archive(AG_NET, tmp_path / "sample")
    report = check_data(root, n_workers=2)
    assert report.edition == "ag-net" and report.is_trustworthy and not report.faults
    assert [report.describe(split)["tiles"] for split in report.labeled] == [200, 60, 12]
    assert all((report.class_table(split)["pixels"] > 0).all() for split in report.labeled)
    n_saturated = 0
    for tiles in open_splits("ag-net", root):
        for name in tiles.names:
            bands = np.stack([tifffile.imread(path) for role, path in tiles.files(name).items() if role != "crops"])
            n_saturated += (bands > WHITE).any(0).sum()
    assert 0 < n_saturated < 0.003 * report.tiles["valid"].sum()


CHIPS = {
    "train": ("elm_town_2018_1", "elm_town_2020_1", "elm_town_2018_2"), "val": ("elm_town_2016_1", "oak_2018_2"), "test": ("oak_2020_2",),
}  # fmt: skip


def test_places_of_chips_are_shared_across_years(tmp_path):
    root = naip_chips(tmp_path / "chips", CHIPS)
    train, val, test = open_splits("naip-trees", root)
    assert train.fields == ["elm_town_1", "elm_town_2", "elm_town_1"]  # in the order of the names
    assert places_in_both(train, val) == {"elm_town_1"} and places_in_both(val, test) == {"oak_2"} and not places_in_both(train, test)
    report = check_data(root, n_workers=1)
    assert [(f.kind, f.where) for f in report.faults] == [("place in two splits", "elm_town_1"), ("place in two splits", "oak_2")]
    assert "elm_town_1 has tiles in train and in val" in report.faults[0].message
    assert "leave them out of val for a score that is independent of train" in report.faults[0].message and report.is_trustworthy
    assert set(report.tiles["field"]["train"]) == {"elm_town_1", "elm_town_2"}


def test_a_place_under_two_names_is_hinted_at(tmp_path):
    "What the names hide the images show: a hint for each pair, which leaves the data trustworthy."
    root = naip_chips(tmp_path / "chips", CHIPS)
    for listing, old in (("val.txt", "elm_town_2016_1"), ("test.txt", "oak_2020_2")):
        (root / f"images/{old}.tif").rename(root / f"images/elsewhere_{old}.tif")
        (root / listing).write_text((root / listing).read_text().replace(old, f"elsewhere_{old}"))
    report = check_data(root, n_workers=1)
    assert {fault.kind for fault in report.faults} == {"same place?"} and report.is_trustworthy
    pairs = [(f"train/elm_town_{year}_1", "val/elsewhere_elm_town_2016_1") for year in (2018, 2020)]
    pairs += [("val/oak_2018_2", "test/elsewhere_oak_2020_2")]
    assert len(report.faults) == len(pairs)
    for fault, (here, there) in zip(report.faults, pairs, strict=True):
        assert fault.where == there and f"{here} and {there} may show one place" in fault.message


def test_alike_pairs_equal_all_pairs():
    "A few rows at a time, every pair above the threshold and no other, with its correlation."
    draw = np.random.default_rng(0)
    one = draw.normal(size=(30, 256)).astype(np.float32)
    two = one[draw.permutation(30)][:20] + draw.normal(size=(20, 256)).astype(np.float32) * draw.uniform(0.2, 2, (20, 1)).astype(np.float32)
    one, two = (d - d.mean(1, keepdims=True) for d in (one, two))
    one, two = (d / np.linalg.norm(d, axis=1, keepdims=True) for d in (one, two))
    found = {(i, j): likeness for i, j, likeness in alike_pairs(one, two, n_rows=7)}
    wanted = {(i, j): np.corrcoef(one[i], two[j])[0, 1] for i in range(30) for j in range(20)}
    assert found == pytest.approx({pair: likeness for pair, likeness in wanted.items() if likeness > ALIKE}, abs=1e-5)
    assert 3 < len(found) < 20


def test_thumbnails_ignore_what_is_invalid(farm):
    "Pixels outside a field change nothing; a tile without details is like no other."
    tile = open_tiles("synthetic", farm, "train")[0]
    tile.valid[:20] = False
    before = thumbnail(tile)
    tile.image[:, :20] = 255
    np.testing.assert_array_equal(thumbnail(tile), before)
    tile.image[:] = 7
    assert not thumbnail(tile).any()
    tile.valid[:] = False
    assert not thumbnail(tile).any()


def hostile_archive(path: Path, name: str, link: str = "") -> Path:
    "A tar archive with one member of that name, or a link to there."
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        if link:
            member.type, member.linkname = tarfile.SYMTYPE, link
        archive.addfile(member, io.BytesIO(b""))
    return path


@pytest.mark.parametrize(("name", "link"), [("../out.txt", ""), ("/tmp/out.txt", ""), ("a/../../out.txt", ""), ("inside", "/etc")])
def test_archives_that_reach_outside(name, link, tmp_path):
    with pytest.raises(ValueError, match="is a link or would land outside the folder"):
        unpack_archive(hostile_archive(tmp_path / "bad.tar", name, link), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


def zip_archive(path: Path, method: int) -> bytearray:
    "A zip archive with one member of noise; its bytes."
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.bin", np.random.default_rng(0).integers(0, 99, 5000, np.uint8).tobytes())
    return bytearray(path.read_bytes())


@pytest.mark.parametrize(
    ("method", "says"), [(zipfile.ZIP_STORED, "Bad CRC-32"), (zipfile.ZIP_DEFLATED, "rror"), (zipfile.ZIP_STORED, "password required")]
)
def test_damaged_zip(method, says, tmp_path):
    "A flipped byte, in a compressed member too, and a member with a password."
    path = tmp_path / "bad.zip"
    content = zip_archive(path, method)
    if "password" in says:
        content[content.index(b"PK\x01\x02") + 8] |= 1
        content[6] |= 1
    else:
        content[45] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad.zip is damaged \(.*{says}.*\): get it again"):
        unpack_archive(path, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_truncated_archive(farm, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        archive.add(farm, "Agriculture-Vision")
    half = tmp_path / "half.tar.gz"
    half.write_bytes((tmp_path / "whole.tar.gz").read_bytes()[:20_000])
    with pytest.raises(ValueError, match="is damaged"):
        unpack_archive(half, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    new = unpack_archive(tmp_path / "whole.tar.gz", "~/new")
    assert new == tmp_path / "new"
    assert detect_edition(new) == detect_edition(new / "Agriculture-Vision") == "synthetic"  # whatever its folder is called
