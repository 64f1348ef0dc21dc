"Faults of data sets that once passed silently, or killed the check that should have named them."

import json
import shutil
import sys

import numpy as np
import pytest
import tifffile
from forked import agrivision
from PIL import Image
from trees import AG_NET_TILES, ag_net, farm_2020

from agrivision_repro.cli.app import main
from agrivision_repro.data.check import check_data
from agrivision_repro.data.editions import open_tiles
from agrivision_repro.data.pack import pack_split
from agrivision_repro.data.split import split_by_field
from agrivision_repro.data.tiles import BadFile, places_in_both


@pytest.fixture
def farm(tmp_path):
    return farm_2020(tmp_path) / "Agriculture-Vision"


def change(folder, convert):
    "Save every picture under a folder as something else."
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            changed = convert(image)
        changed.save(path)


def rename_nir(root):
    for path in (root / "val/images/nir").iterdir():
        path.rename(path.with_stem(path.stem + "_nir"))


def one_bit_labels(root):
    for split in ("train", "val"):
        change(root / split / "labels", lambda image: image.convert("1"))


def empty_boundaries(root):
    for split in ("train", "val", "test"):
        for path in (root / split / "boundaries").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [(rename_nir, "missing"), (one_bit_labels, "wrong mode"), (empty_boundaries, "missing")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_check_survives_what_it_reports(farm, spoil, kind):
    "A split of which no tile can be read is still a report: every fault, exit code 1, strict JSON."
    spoil(farm)
    words = ["data", "check", farm, "--data", "agrivision-2020", "--workers", "1"]
    shown = agrivision(*words)
    assert (shown.returncode, "Traceback" in shown.stderr) == (1, False), shown.stderr
    assert f"{kind}: " in shown.stdout and "could NOT be trusted" in shown.stdout
    report = json.loads(agrivision(*words, "--json").stdout)
    assert {fault["kind"] for fault in report["faults"]} >= {kind} and not report["trustworthy"]
    stats = agrivision("data", "stats", *words[2:])
    assert stats.returncode == 1 and f"faults, not included here: see agrivision data check {farm}" in stats.stderr


def to_palette(image):
    pixels = image.point(lambda value: value // 255)
    pixels.putpalette([0, 0, 0, 255, 255, 255])
    return pixels


@pytest.mark.parametrize("convert", [lambda image: image.point(lambda value: value // 255), to_palette], ids=["0 and 1", "palette"])
@pytest.mark.parametrize("folder", ["labels", "masks"])
def test_other_codes_are_refused(farm, folder, convert):
    "Labels or masks coded 0 and 1 would read as empty: refused when read, named by the check."
    change(farm / "train" / folder, convert)
    tiles = open_tiles("agrivision-2020", farm, "train")
    with pytest.raises(BadFile, match=rf"{folder}/.* has the values (0, )?1, wanted 0 and 255 only"):
        [tiles[k] for k in range(len(tiles))]
    assert {fault.kind for fault in check_data(farm, "agrivision-2020", 1).faults} == {"not binary"}


def test_files_of_operating_systems_are_ignored(farm):
    "AppleDouble files, .DS_Store and Thumbs.db beside the tiles change nothing."
    names = open_tiles("agrivision-2020", farm, "train").names
    for path in [p for p in farm.rglob("*") if p.is_file() and p.stem == names[0]]:
        shutil.copy(path, path.with_name(f"._{path.name}"))
        for leftover in (".DS_Store", "Thumbs.db"):
            (path.parent / leftover).write_bytes(b"\0")
    assert open_tiles("agrivision-2020", farm, "train").names == names
    assert not [fault for fault in check_data(farm, "agrivision-2020", 1).faults if fault.kind != "no valid pixel"]


def convert_to(suffix, **options):
    "Return a function that saves an image under another suffix; without options, and within one format, the bytes stay."

    def convert(path):
        if options or suffix.lower() not in (".jpg", ".jpeg", path.suffix):
            with Image.open(path) as image:
                image.save(path.with_suffix(suffix), **options)
            path.unlink()
        else:
            path.rename(path.with_suffix(suffix))

    return convert


FORMATS = {
    ".JPG": convert_to(".JPG"), ".jpeg": convert_to(".jpeg"), ".PNG": convert_to(".PNG"), ".tif": convert_to(".tif"),
    ".TIFF, LZW": convert_to(".TIFF", compression="tiff_lzw"), ".tif, deflated": convert_to(".tif", compression="tiff_adobe_deflate"),
}  # fmt: skip


@pytest.mark.parametrize("convert", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("are_all", [True, False], ids=["all", "every other tile"])
def test_tiles_in_other_formats(farm, convert, are_all, tmp_path):
    "JPEG, PNG and TIFF in any case, also mixed in one folder: the same tiles, no fault, and a pack."
    before = open_tiles("agrivision-2020", farm, "train")
    tiles, names = list(before), before.names
    for path in [path for path in (farm / "train/images").rglob("*.jpg") if are_all or path.stem in names[::2]]:
        convert(path)
    for path in [path for path in (farm / "val").rglob("*.png")]:
        convert_to(".PNG")(path)
    after = open_tiles("agrivision-2020", farm, "train")
    assert after.names == names
    for one, two in zip(tiles, after, strict=True):
        np.testing.assert_array_equal(one.planes, two.planes)
    assert not [fault for fault in check_data(farm, "agrivision-2020", 1).faults if fault.kind != "no valid pixel"]
    assert len(pack_split(after, tmp_path / "packed", 1)) == len(tiles)


def rename_all(folder, suffix):
    for path in folder.iterdir():
        path.rename(path.with_suffix(suffix))


def test_formats_that_are_not_read(farm):
    "The message says what was found."
    rename_all(farm / "train/images/nir", ".jp2")
    tiles = open_tiles("agrivision-2020", farm, "train")
    name = tiles.names[0]
    for read in (lambda: tiles[0], lambda: tiles.file_sizes(name)):
        with pytest.raises(FileNotFoundError, match=rf"nir/{name}\.jpg is missing \(its folder has {name}\.jp2\)"):
            read()
    rename_all(farm / "train/images/rgb", ".jp2")
    (farm / "train/images/rgb/Thumbs.db").touch()
    with pytest.raises(ValueError, match=r"images/rgb has no JPEG, PNG or TIFF file \(it has 12 \.jp2, 1 \.db\): convert the tiles"):
        open_tiles("agrivision-2020", farm, "train")


def test_one_tile_in_two_formats(farm):
    path = next((farm / "val/images/rgb").iterdir())
    shutil.copy(path, path.with_suffix(".JPEG"))
    with pytest.raises(ValueError, match=rf"images/rgb has {path.stem}\.JPEG and {path.stem}\.jpg: keep one"):
        open_tiles("agrivision-2020", farm, "val")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_samples_of_more_than_a_byte_are_refused(farm, dtype):
    "A decoder that keeps the high bytes only would be silent."
    tiles = open_tiles("agrivision-2020", farm, "train")
    path = tiles.files(tiles.names[0])["rgb"]
    tifffile.imwrite(path.with_suffix(".tif"), np.full((64, 64, 3), 300, dtype), photometric="rgb")
    path.unlink()
    with pytest.raises(BadFile, match=rf"is \(64, 64, 3\) {np.dtype(dtype)}, wanted RGB bytes"):
        open_tiles("agrivision-2020", farm, "train")[0]


def pour_together(farm, folder):
    "Move the tiles of train and val into one folder."
    for split in ("train", "val"):
        for path in [path for path in (farm / split).rglob("*") if path.is_file()]:
            new = folder / path.relative_to(farm / split)
            new.parent.mkdir(parents=True, exist_ok=True)
            path.rename(new)
    return folder


@pytest.fixture
def data(monkeypatch, capsys):
    "Return a function that runs `agrivision data` in this process; it returns the exit code and what was printed."

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["agrivision", "data", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return stop.value.code or 0, " ".join((shown.out + shown.err).split())

    return run


def test_a_copy_in_one_folder(farm, tmp_path, data):
    "The error names the command; the command makes train and val of whole fields, of all files and of the same bytes."
    flat, root = pour_together(farm, tmp_path / "flat"), tmp_path / "split"
    (flat / "images/rgb/._x.jpg").touch()
    for words in (["check", flat], ["check", flat, "--data", "agrivision-2020"], ["stats", flat, "--data", "classes:waterway"]):
        code, shown = data(*words)
        assert code == 2 and f"agrivision data split {flat} OUT" in shown
    code, shown = data("split", flat, root, "--val", "0.4")
    assert code == 0 and "train: 12 tiles of 3 fields" in shown and "val: 8 tiles of 2 fields" in shown
    train, val = (open_tiles("agrivision-2020", root, split) for split in ("train", "val"))
    assert (len(set(train.fields)), len(set(val.fields)), places_in_both(train, val)) == (3, 2, set())
    whole = {path.relative_to(flat): path.read_bytes() for path in flat.rglob("*") if path.is_file() and path.name[0] != "."}
    assert {p.relative_to(root / s): p.read_bytes() for s in ("train", "val") for p in (root / s).rglob("*") if p.is_file()} == whole
    assert not [fault for fault in check_data(root, "agrivision-2020", 1).faults if fault.kind != "no valid pixel"]
    code, shown = data("split", flat, root)
    assert code == 2 and "choose a folder that does not" in shown


def test_the_seed_determines_the_split(farm, tmp_path, monkeypatch):
    flat = pour_together(farm, tmp_path / "flat")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [split_by_field(flat, f"~/split{k}", 0.4, seed) for k, seed in enumerate((0, 0, 1, 2))]
    assert found[0] == found[1] and len({tuple(names["val"]) for names in found}) > 1
    assert (tmp_path / "split0").is_dir()


def test_what_cannot_be_split(farm, tmp_path):
    flat = pour_together(farm, tmp_path / "flat")
    for share in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="share of the validation fields is .*: wanted more than 0 and less than 1"):
            split_by_field(flat, tmp_path / "new", share)
    for k, path in enumerate(sorted((flat / "images/rgb").iterdir())):
        path.rename(path.with_name(f"img_{k}.jpg"))
    with pytest.raises(ValueError, match="all 20 tiles are of one field, img: .* up to the first underscore"):
        split_by_field(flat, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="lacks images/rgb"):
        split_by_field(farm, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []


def test_a_damaged_tiff_is_one_line(tmp_path):
    "Libraries that read it say nothing of their own beside the error, and no folder of results is left."
    root = ag_net(tmp_path / "data")
    label = root / "target" / f"cdl_2015245_{AG_NET_TILES['train'][0]}.tif"
    label.write_bytes(label.read_bytes()[:200])
    words = ["reproduce", "table1_modality", "--scale", "smoke", "--data", "ag-net", "--data-root", root, "--out", tmp_path / "out"]
    said = agrivision(*words)
    lines = [line for line in said.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert said.returncode == 2 and len(lines) == 1, said.stderr
    assert label.name in lines[0] and "unpack it again" in lines[0]
    assert not (tmp_path / "out").exists()
