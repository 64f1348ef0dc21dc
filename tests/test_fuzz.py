"Whatever stands in a file or on the command line: a plain error that names it, no traceback, nothing half-written."

import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from trees import FARM

from agrivision_repro.cli.app import main
from agrivision_repro.data import pack
from agrivision_repro.data.check import check_tile
from agrivision_repro.data.editions import open_tiles
from agrivision_repro.data.pack import PackedTiles, pack_split
from agrivision_repro.data.synthetic_files import write_synthetic
from agrivision_repro.data.tiles import BadFile, Tile, read_image
from agrivision_repro.runs.listing import list_runs
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.store import RunFolder, find_run

PLAIN = (ValueError, OSError)  # what `cli.app.main` turns into one line


def quickly(n_examples: int) -> settings:
    "The same examples every time, and no limit on how long one takes: a busy machine is no defect."
    health = list(HealthCheck)
    return settings(derandomize=True, deadline=None, database=None, max_examples=n_examples, suppress_health_check=health)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def encoded(mode: str, kind: str) -> bytes:
    "A small image file."
    pixels = np.arange(8 * 8 * 4, dtype=np.uint8).reshape(8, 8, 4)
    file = io.BytesIO()
    if kind == "tif":
        tifffile.imwrite(file, pixels, photometric="rgb", extrasamples=["unspecified"], compression="zlib" if mode == "RGBA" else None)
    else:
        Image.fromarray(pixels if mode == "RGBA" else pixels[..., 0] if mode == "L" else pixels[..., :3]).convert(mode).save(file, kind)
    return file.getvalue()


FILES = [
    encoded(*how) for how in (("L", "png"), ("RGB", "jpeg"), ("L", "jpeg"), ("1", "png"), ("RGBA", "tif"), ("plain", "tif"), ("P", "gif"))
]


@st.composite
def spoilt(draw, files: list[bytes]) -> bytes:
    "Take a whole file; cut it, or write other bytes into it."
    content = bytearray(draw(st.sampled_from(files)))
    for at, byte in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[at] = byte
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def farm(folder):
    return write_synthetic(folder / "farm", FARM)


@quickly(600)
@given(
    content=st.binary(max_size=64) | spoilt(FILES),
    bands=st.sampled_from(["L", "RGB", "RGBN"]),
    size=st.sampled_from([None, (8, 8), (7, 8)]),
)
@example(content=b"", bands="L", size=None)
@example(content=b"II*\0", bands="RGBN", size=None)
def test_image_files(content, bands, size, folder):
    "A file is read as what was asked for, or refused by its name and in two words."
    path = folder / "tile.bin"
    path.write_bytes(content)
    try:
        pixels = read_image(path, bands, size)
    except BadFile as error:
        assert error.kind in ("unreadable", "truncated", "wrong mode", "wrong size") and str(path) in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == (size or pixels.shape[:2])


@quickly(60)
@given(content=st.binary(max_size=64) | spoilt(FILES), role=st.sampled_from(["rgb", "nir", "waterway", "masks"]))
def test_a_spoilt_tile_is_a_fault(content, role, farm, folder):
    "The check names the file; reading the tile raises the same."
    root = folder / "spoilt"
    if not root.exists():
        shutil.copytree(farm, root)
    tiles = open_tiles("synthetic", root, "val")
    path = tiles.files(tiles.names[0])[role]
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        faults = [fault for fault in check_tile(tiles, tiles.names[0])["faults"] if fault.kind != "no valid pixel"]
        assert not faults or any(str(path) in fault.message or fault.kind == "wrong size" for fault in faults)
        try:
            assert isinstance(tiles[0], Tile)
        except BadFile:
            assert faults
    finally:
        path.write_bytes(whole)


NUMBERS = st.floats() | st.integers() | st.text(max_size=4)


@quickly(200)
@given(content=st.binary(max_size=40) | st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3).map(lambda rows: table_of(rows)))
@example(content=b"x,y\ninf,1\n")
@example(content=b"x,y\n1,nan\n")
@example(content=b"x,y\n1e300,-1e300\n")
def test_tables_of_points(content, folder):
    root = folder / "trees"
    for name in ("images", "csv"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "train.txt").write_text("chip\n")
    tifffile.imwrite(root / "images/chip.tif", np.zeros((8, 8, 4), np.uint8), photometric="rgb", extrasamples=["unspecified"])
    (root / "csv/chip.csv").write_bytes(content)
    try:
        tile = open_tiles("naip-trees", root, "train")[0]
    except BadFile as error:
        assert "chip.csv" in str(error)
    else:
        assert tile.labels.shape == (8, 8)


def table_of(rows: list[tuple]) -> bytes:
    "Write points as a table."
    return "\n".join(["x,y", *(f"{x},{y}" for x, y in rows)]).encode(errors="replace")


@quickly(100)
@given(content=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
@example(content=b"[]")
@example(content=b"null")
@example(content=b'{"fingerprint": ""}')
def test_the_index_of_a_pack(content, folder):
    home = folder / "pack"
    home.mkdir(exist_ok=True)
    (home / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match="agrivision data pack"):
        PackedTiles(home)


@quickly(100)
@given(
    change=st.dictionaries(
        st.sampled_from(["split", "classes", "shape", "dtype", "tiles", "labeled"]), json_values | st.just(...), min_size=1
    )
)
@example(change={"tiles": ...})
@example(change={"dtype": "no type"})
def test_an_index_of_another_make(change, farm, folder):
    "Its fingerprint is right, but what it describes is not what this version writes."
    home = folder / "made"
    whole = pack_split(open_tiles("synthetic", farm, "val"), home, n_workers=1).folder / "index.json"
    kept = whole.read_text()
    index = {k: v for k, v in json.loads(kept).items() if k != "fingerprint"} | change
    index = json.loads(json.dumps({k: v for k, v in index.items() if v is not ...}))
    try:
        whole.write_text(json.dumps(index | {"fingerprint": pack.identify(index)}))
        try:
            assert len(PackedTiles(whole.parent)) >= 0
        except ValueError as error:
            assert "agrivision data pack" in str(error)
    finally:
        whole.write_text(kept)


@quickly(40)
@given(
    name=st.sampled_from(["plan.json", "journal.jsonl"]), content=st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode())
)
@example(name="journal.jsonl", content=b"{}")
@example(name="plan.json", content=b"{")
def test_the_rests_of_a_killed_pack(name, content, farm, folder):
    "Whatever a killed process left: the pack becomes whole."
    tiles, home = open_tiles("synthetic", farm, "test"), folder / "rests"
    shutil.rmtree(home, ignore_errors=True)
    pack.start_pack(tiles, home / ".test.part")
    (home / ".test.part" / name).write_bytes(content)
    packed = pack_split(tiles, home, n_workers=1)
    np.testing.assert_array_equal(packed[0].image, tiles[0].image)
    assert sorted(path.name for path in packed.folder.iterdir()) == ["images.npy", "index.json", "labels.npy"]


RECORD = {
    "run": json.loads(json.dumps(asdict(plan_run("smoke", "synthetic")))),
    "title": "",
    "state": "training",
    "device": "",
    "commit": "",
    "is_dirty": False,
}


@st.composite
def records(draw) -> bytes:
    "Anything, or a record with one thing missing or of another kind."
    record = json.loads(json.dumps(RECORD))
    at = record["run"] if draw(st.booleans()) else record
    key = draw(st.sampled_from(sorted(at)))
    at[key] = draw(json_values)
    if draw(st.booleans()):
        del at[key]
    return json.dumps(record).encode()


@quickly(100)
@given(
    run=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()) | records(),
    scores=st.none() | st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()),
)
@example(run=b"{}", scores=None)
@example(run=b"[]", scores=b"{}")
@example(run=json.dumps(RECORD).encode(), scores=b"{}")
def test_records_of_runs(run, scores, folder):
    home = folder / "out/runs/abc"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / "run.json").write_bytes(run)
    if scores is not None:
        (home / "scores.json").write_bytes(scores)
    assert find_run(folder / "out", "a") == RunFolder(home)
    for read in (lambda: list_runs(folder / "out"), RunFolder(home).result):
        try:
            read()
        except PLAIN as error:
            assert str(home) in str(error)
    assert {path.name for path in home.iterdir()} <= {"run.json", "scores.json", ".lock"}


def command(*words: str) -> tuple[int, str]:
    "Run the command in this process: exit code and what it printed on stderr."
    errors, argv = io.StringIO(), sys.argv
    sys.argv = ["agrivision", *words]
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
    return stop.value.code or 0, errors.getvalue()


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
values = (
    words | json_values.map(repr) | st.sampled_from(["{[]:1}", "1" + "0" * 400, "(" * 300, "1e999", "-1", "[0", "nan", "0x", "1if 1else 2"])
)


def must_be_plain(out: Path, *words: str) -> None:
    "It works, or fails in one line; either way it writes nothing."
    code, printed = command(*words)
    assert code in (0, 2), printed
    assert code == 0 or (printed.count("\n") == 1 and printed.startswith("agrivision: ")), printed
    assert not out.exists() or not os.listdir(out)


@quickly(40)
@given(name=st.sampled_from(["lambda2", "seeds", "scale", "data", ""]) | words, value=values)
@example(name="lambda2", value="{[]:1}")
@example(name="lambda2", value="1" + "0" * 400)
def test_parameters_of_the_command(name, value, folder):
    out = folder / "nothing"
    must_be_plain(out, "plan", "table1_modality", "--scale", "smoke", "--device", "cpu", "--out", str(out), "-p", f"{name}={value}")


@quickly(40)
@given(seeds=words | st.lists(st.integers(), max_size=3).map(lambda seeds: ",".join(map(str, seeds))))
@example(seeds="99999999999999999999999")
@example(seeds="1" * 5000)
def test_seeds_of_the_command(seeds, folder):
    out = folder / "nothing"
    must_be_plain(out, "plan", "table1_modality", "--scale", "smoke", "--device", "cpu", "--out", str(out), f"--seeds={seeds}")


@quickly(40)
@given(table=words, option=words, value=words)
def test_words_of_the_command(table, option, value, folder):
    out = folder / "nothing"
    must_be_plain(out, "plan", f"x{table}", f"--x{option}", value, "--out", str(out))
