"Faults of data sets that once passed silently, or killed the check that should have named them."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from trees import farm_2020

from agrivision_repro.data.check import check_data
from agrivision_repro.data.editions import open_tiles
from agrivision_repro.data.tiles import BadFile

AGRIVISION = Path(sys.executable).parent / "agrivision"


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
    words = [AGRIVISION, "data", "check", farm, "--data", "agrivision-2020", "--workers", "1"]
    shown = subprocess.run(words, capture_output=True, text=True)
    assert (shown.returncode, "Traceback" in shown.stderr) == (1, False), shown.stderr
    assert f"{kind}: " in shown.stdout and "could NOT be trusted" in shown.stdout
    report = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True).stdout)
    assert {fault["kind"] for fault in report["faults"]} >= {kind} and not report["trustworthy"]


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
