"Windows blend into what whole arrays give, in little memory; maps keep their place; a submission's every fault has its name."

import io
import json
import shutil
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasters import PLACE, needs_rasterio, noise, run_command, write_geotiff, write_tiff
from torch import nn

from agrivision_repro.cli.app import main
from agrivision_repro.data.batches import select_channels
from agrivision_repro.data.tiles import read_image, unpack_labels
from agrivision_repro.plots import paint_classes
from agrivision_repro.predict import images, scenes, submission
from agrivision_repro.predict.bands import BYTES, Raster, as_raster
from agrivision_repro.predict.images import predict_scene
from agrivision_repro.predict.scenes import Scene, find_rasterio, find_scenes, open_scene
from agrivision_repro.predict.submission import CHALLENGE_CLASSES, check_submission, tile_sizes, write_submission
from agrivision_repro.predict.windows import blend_weights, load_predictor, predict_image, predict_strips
from agrivision_repro.training.evaluate import score_model


def mean_of_9(images):
    "A net that looks at 9×9 pixels, in two classes."
    mean = nn.functional.avg_pool2d(images[:, :2].float(), 9, 1, 4)
    return torch.stack([mean[:, 0], mean[:, 1]], 1)


def brute_force(predictor, image, window, overlap=0.5):
    "Every window placed in an array of its own, weighted by whole arrays, all of them added up at the end."
    height, width = image.shape[1:]
    bell = lambda n: np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2  # noqa: E731
    corners = lambda n: [*range(0, max(n - window, 0), max(round(window * (1 - overlap)), 1)), max(n - window, 0)]  # noqa: E731
    placed, weights = [], []
    for top in corners(height):
        for left in corners(width):
            cut = np.s_[top : top + window, left : left + window]
            logits = predictor(torch.from_numpy(image[:, *cut][None].copy()))[0].numpy().astype(float)
            canvas, weight = np.zeros((len(logits), height, width)), np.zeros((height, width))
            canvas[:, *cut] = logits
            weight[cut] = np.outer(bell(logits.shape[1]), bell(logits.shape[2]))
            placed.append(canvas)
            weights.append(weight)
    share = np.stack(weights) / np.sum(weights, 0)
    np.testing.assert_allclose(share.sum(0), 1)
    return (np.stack(placed) * share[:, None]).sum(0)


@given(length=st.integers(1, 300), window=st.integers(1, 64), overlap=st.floats(0, 0.9))
@settings(deadline=None)
def test_weights_add_up_to_one(length, window, overlap):
    starts, weights = blend_weights(length, window, overlap)
    total, side = np.zeros(length), min(window, length)
    for start, own in zip(starts, weights, strict=True):
        assert own.shape == (side,) and (own > 0).all()
        total[start : start + side] += own
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert starts == sorted(set(starts)) and starts[-1] + side == length


@pytest.mark.parametrize("size", [(32, 32), (31, 17), (5, 32)])
def test_a_single_window_is_the_model(size, predictor):
    "Bit by bit, whatever the sides."
    image = noise(4, *size)
    with torch.no_grad():
        own = predictor.engine.predict(predictor.model.net, select_channels(torch.from_numpy(image[None]), "rgbn"))[0].numpy()
    np.testing.assert_array_equal(predict_image(predictor, image, 32), own)
    np.testing.assert_array_equal(predict_image(predictor, image, 512), own)


def test_a_constant_stays_constant():
    def same(images):
        return torch.ones(len(images), 3, *images.shape[2:]) * torch.tensor([1.0, -2.5, 0.1]).view(3, 1, 1)

    logits = predict_image(same, noise(4, 101, 77), 32, 0.4)
    np.testing.assert_allclose(logits, np.broadcast_to(np.array([1, -2.5, 0.1])[:, None, None], (3, 101, 77)), rtol=1e-6)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (57, 61), (33, 20), (99, 32), (70, 101)])
@pytest.mark.parametrize("overlap", [0.5, 0, 0.3, 0.75])
def test_windows_equal_brute_force(size, overlap):
    image = noise(4, *size)
    found = predict_image(mean_of_9, image, 32, overlap)
    np.testing.assert_allclose(found, brute_force(mean_of_9, image, 32, overlap), atol=1e-3)


def test_three_windows_of_the_real_model_equal_brute_force(predictor):
    image = noise(4, 32, 64)
    assert len(blend_weights(64, 32)[0]) == 3
    np.testing.assert_allclose(predict_image(predictor, image, 32), brute_force(predictor, image, 32), atol=1e-4)


def test_a_pixelwise_model_knows_no_windows():
    def pixelwise(images):
        return images[:, :3].float() - images[:, 3:]

    image = noise(4, 83, 131)
    np.testing.assert_allclose(predict_image(pixelwise, image, 24), image[:3].astype(float) - image[3], atol=1e-4)


def test_memory_grows_by_the_maps_alone(tmp_path):
    "Two bytes a pixel are kept, and Pillow may copy one map; pixels that are read, and logits, come and go."

    def peak(height: int) -> int:
        raster = Raster((height, 200), lambda top, end: np.full((4, end - top, 200), 7, np.uint8))
        (tmp_path / f"{height}").mkdir()
        tracemalloc.start()
        strips = predict_strips(mean_of_9, raster.rows, raster.size, 64)
        counts, _ = images._write_maps("map", raster, strips, tmp_path / f"{height}", 3)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert counts.sum() == height * 200 and read_image(tmp_path / f"{height}" / "labels" / "map.png", "L").shape == raster.size
        return most

    peak(64)  # whatever is made once
    low, high = peak(512), peak(8_192)
    assert high < low + 8_192 * 200 * 3.5, (low, high)  # logits alone would be 12 bytes a pixel


def test_a_mapped_tiff_stays_on_the_disk(tmp_path):
    "Opening a large TIFF and reading some rows of it costs those rows."
    image = noise(3_000, 400, 4)
    tifffile.imwrite(tmp_path / "large.tif", image, photometric="rgb")
    tracemalloc.start()
    with scenes.open_tiff(tmp_path / "large.tif") as stored:
        rows = as_raster(stored, BYTES).rows(2_000, 2_010)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(rows, image[2_000:2_010].transpose(2, 0, 1))
    assert most < image.nbytes / 4


@pytest.mark.parametrize("size", [(32, 32), (24, 32), (50, 41)])
def test_tta_is_the_average_of_eight_turns(size, result, predictor):
    turned, image = load_predictor(result, tta="d4", device="cpu", precision="float32"), torch.from_numpy(noise(1, 4, *size))
    by_hand = []
    for k in range(8):
        x = torch.rot90(image, k % 4, (-2, -1))
        logits = predictor(x.flip(-1) if k > 3 else x)
        by_hand.append(torch.rot90(logits.flip(-1) if k > 3 else logits, -(k % 4), (-2, -1)))
    np.testing.assert_allclose(turned(image).numpy(), torch.stack(by_hand).mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("tta", ["none", "d4"])
def test_predictions_score_what_scoring_scores(tta, result, workspace, predictor):
    "The multi-label IoU of the bits and of `training.evaluate.score_model` are the same counts."
    feed = workspace.feed(result.run, "val")
    expected = score_model(predictor.model.net, feed, predictor.engine, tta)["multilabel"]["per_class"]
    turned = load_predictor(result, tta=tta, device="cpu", precision="float32")
    hits, union = np.zeros(7), np.zeros(7)
    for tile in feed.tiles:
        found, truth = predict_image(turned, tile.image, 64) > 0, unpack_labels(tile.labels, 7)
        hits += (found & truth & tile.valid).sum((1, 2))
        union += ((found | truth) & tile.valid).sum((1, 2))
    for k in range(7):
        assert expected[k] is None if union[k] == 0 else abs(hits[k] / union[k] - expected[k]) < 2e-3


# -- maps


@pytest.mark.parametrize("size", [(57, 61), (64, 64), (30, 90), (1, 1)])
def test_maps(size, predictor, tmp_path):
    image = noise(4, *size)
    path = write_tiff(tmp_path / "field.tif", image)
    found = predict_scene(Scene("field", path), predictor, tmp_path / "maps", CHALLENGE_CLASSES, 32)
    logits = predict_image(predictor, image, 32)
    np.testing.assert_array_equal(read_image(tmp_path / "maps/labels/field.png", "L"), logits.argmax(0))
    np.testing.assert_array_equal(unpack_labels(read_image(tmp_path / "maps/bits/field.png", "L"), 7)[1:], logits[1:] > 0)
    assert found.size == size and found.pixels.tolist() == np.bincount(logits.argmax(0).ravel(), minlength=7).tolist()
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["bits", "labels", "pictures"]


def test_a_large_image_has_a_small_picture(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "PICTURED", 20)
    path = write_tiff(tmp_path / "field.tif", image := noise(4, 75, 50))
    shown = {}
    monkeypatch.setattr(images, "show_panels", lambda panels, *_, **__: shown.update(panels) or plain_figure())
    predict_scene(Scene("field", path), predictor, tmp_path, CHALLENGE_CLASSES, 32)
    np.testing.assert_array_equal(shown["NIR"], image[3, ::4, ::4])
    np.testing.assert_array_equal(shown["RGB"], image[:3, ::4, ::4].transpose(1, 2, 0))
    labels = read_image(tmp_path / "labels/field.png", "L")
    np.testing.assert_array_equal(shown["prediction"], paint_classes(labels[::4, ::4]))


def plain_figure():
    from matplotlib.figure import Figure

    return Figure()


@pytest.mark.parametrize("options", [{"planarconfig": "contig"}, {"compression": "zlib"}, {"tile": (16, 16)}, {"rowsperstrip": 7}])
def test_tiffs_of_every_make(options, reader, tmp_path):
    path = write_tiff(tmp_path / "a.tif", image := noise(4, 45, 37), **options)
    with open_scene(Scene("a", path)) as raster:
        assert raster.size == (45, 37) and not raster.place and raster.valid(11, 30).all()
        np.testing.assert_array_equal(raster.rows(11, 30), image[:, 11:30])


def test_bands_one_after_the_other(reader, tmp_path):
    image = noise(4, 45, 37)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", planarconfig="separate")
    with open_scene(Scene("a", tmp_path / "a.tif")) as raster:
        np.testing.assert_array_equal(raster.rows(3, 9), image[:, 3:9])


def test_a_failure_leaves_nothing(predictor, tmp_path):
    path, calls = write_tiff(tmp_path / "field.tif", noise(4, 90, 32)), []

    def fails(images):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return predictor(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        predict_scene(Scene("field", path), fails, tmp_path / "maps", CHALLENGE_CLASSES, 32)
    assert list((tmp_path / "maps").iterdir()) == []


def test_pairs_and_folders(test_set, tmp_path):
    names = sorted(p.stem for p in (test_set / "images/rgb").iterdir())
    for given_path in (test_set, test_set.parent):
        assert [scene.name for scene in find_scenes([given_path])] == names
    rgb, nir = (test_set / "images" / c / f"{names[0]}.jpg" for c in ("rgb", "nir"))
    assert find_scenes([rgb, nir]) == find_scenes([rgb]) == find_scenes([nir]) == [Scene(names[0], rgb, nir)]
    with open_scene(Scene(names[0], rgb, nir)) as raster:
        np.testing.assert_array_equal(raster.rows(0, 64)[3], read_image(nir, "L"))
        np.testing.assert_array_equal(raster.rows(5, 9)[:3], read_image(rgb, "RGB")[5:9].transpose(2, 0, 1))


# -- georeferencing


@needs_rasterio
@pytest.mark.parametrize("options", [{}, {"compress": "lzw"}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"interleave": "band"}])
def test_geotiff_keeps_its_place(options, predictor, tmp_path):
    rasterio = find_rasterio()
    path = write_geotiff(tmp_path / "field.tif", image := noise(4, 57, 61), **options)
    predict_scene(Scene("field", path), predictor, tmp_path / "maps", CHALLENGE_CLASSES, 32)
    with rasterio.open(tmp_path / "maps/georeferenced/field.tif") as made:
        assert made.crs.to_epsg() == 32633 and tuple(made.transform)[:6] == PLACE
        assert made.colormap(1)[1][:3] == tuple(paint_classes(np.array([[1]]))[0, 0])
        np.testing.assert_array_equal(made.read(1), predict_image(predictor, image, 32).argmax(0))
    np.testing.assert_array_equal(read_image(tmp_path / "maps/labels/field.png", "L"), predict_image(predictor, image, 32).argmax(0))


@needs_rasterio
@pytest.mark.parametrize(("image", "says"), [(noise(3, 8, 8), "has 3 bands (red, green, blue), none"), (noise(4, 8, 8) * 1.0, "float64")])
def test_geotiff_of_other_bands(image, says, tmp_path):
    path = write_geotiff(tmp_path / "field.tif", image)
    with pytest.raises(ValueError) as error, open_scene(Scene("field", path)):
        pass
    assert says in str(error.value)


@needs_rasterio
def test_cut_geotiff(predictor, tmp_path):
    path = write_geotiff(tmp_path / "field.tif", noise(4, 200, 200), compress="deflate")
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ValueError, match="cannot be read"):
        predict_scene(Scene("field", path), predictor, tmp_path / "maps", CHALLENGE_CLASSES, 32)
    assert list((tmp_path / "maps").iterdir()) == []


def test_without_rasterio_the_place_is_dropped_with_a_word(predictor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "find_rasterio", lambda: None)
    tags = [(33550, "d", 3, (2.0, 2.0, 0.0), True), (33922, "d", 6, (0, 0, 0, 5e5, 4.6e6, 0), True), (34735, "H", 4, (1, 1, 0, 0), True)]
    path = write_tiff(tmp_path / "field.tif", noise(4, 40, 40), extratags=tags)
    predict_scene(Scene("field", path), predictor, tmp_path / "maps", CHALLENGE_CLASSES, 32)
    said = capsys.readouterr().err
    assert "georeferencing is dropped, rasterio is not installed (pip install '.[geo]' in the checkout" in said
    assert not (tmp_path / "maps/georeferenced").exists() and (tmp_path / "maps/labels/field.png").is_file()


# -- mistakes


@pytest.fixture
def mistake(monkeypatch, capsys, result, tmp_path):
    "Run the command in this process: it must fail with one line that says `contains`, and write nothing."

    def run(*words, contains, code):
        words = [result.folder.name, *words, "-o", tmp_path / "maps", "--device", "cpu"]
        words += ["--results", result.folder.path.parents[1]]
        monkeypatch.setattr(sys, "argv", ["agrivision", "predict", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = [line for line in capsys.readouterr().err.splitlines() if line]
        assert stop.value.code == code and len(printed) == 1 and printed[0].startswith("agrivision: "), printed
        assert contains in printed[0], printed
        assert not list(tmp_path.glob("maps/*"))

    return run


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (["nowhere.tif"], "nowhere.tif is missing: wanted a TIFF, JPEG or PNG, images/rgb/NAME.jpg with"),
        (["FOLDER/empty"], "contains no images: wanted a TIFF, JPEG or PNG"),
        (["FOLDER/notes.txt"], "notes.txt is not a supported image: wanted"),
        (["FOLDER/field.tif", "FOLDER/empty/field.tif"], "several inputs have the same name, field: predict them into different folders"),
        (["FOLDER/field.tif", "--tta", "d8"], "tta is 'd8': wanted one of none, d4"),
        (["FOLDER/field.tif", "--checkpoint", "first"], "checkpoint is 'first': wanted one of last, best"),
        (["FOLDER/field.tif", "--channels", "rgb"], "channels is 'rgb': wanted one of rgbn"),
        (["FOLDER/field.tif", "--overlap", "1"], "overlap 1.0: wanted at least 1 pixel, and an overlap from 0 to 0.9"),
        (["FOLDER/field.tif", "--submission", "FOLDER/a.zip", "--data-root", "TEST/.."], "the inputs lack 4 of 4 test tiles"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes(words, contains, mistake, tmp_path, test_set):
    "Of the command: nothing is predicted, and the exit code is 2."
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    write_tiff(tmp_path / "field.tif", noise(4, 8, 8))
    if any("empty/field" in word for word in words):
        write_tiff(tmp_path / "empty/field.tif", noise(4, 8, 8))
    mistake(*(w.replace("FOLDER", str(tmp_path)).replace("TEST", str(test_set)) for w in words), contains=contains, code=2)


LACKS_NIR = "has 3 bands (red, green, blue), none known to be near-infrared, which the model needs: name the red,"


@pytest.mark.parametrize(
    ("name", "contains"),
    [
        ("lonely.jpg", f"lonely.jpg {LACKS_NIR}"),
        ("damaged.tif", "damaged.tif cannot be read"),
        ("three.tif", f"three.tif {LACKS_NIR}"),
        ("grey.tif", "grey.tif has 1 band (undeclared), none known to be red or green or blue, which"),
        ("deep.tif", "deep.tif has uint16 values: pass with --scale the value that becomes 255"),
        ("images/rgb/a.jpg", "nir/a.jpg is missing"),
        ("images/rgb/b.jpg", "b.jpg is 8×8 pixels, but the tile's RGB image is 16×16"),
    ],
)
def test_bad_files(name, contains, mistake, tmp_path):
    "They are named, and the exit code is 1."
    for folder in ("images/rgb", "images/nir"):
        (tmp_path / folder).mkdir(parents=True)
    for file, size in {"lonely.jpg": 8, "images/rgb/a.jpg": 8, "images/rgb/b.jpg": 16}.items():
        Image.new("RGB", (size, size)).save(tmp_path / file)
    Image.new("L", (8, 8)).save(tmp_path / "images/nir/b.jpg")
    write_tiff(tmp_path / "three.tif", noise(3, 8, 8))
    write_tiff(tmp_path / "deep.tif", noise(4, 8, 8).astype(np.uint16))
    tifffile.imwrite(tmp_path / "grey.tif", noise(8, 9))
    (tmp_path / "damaged.tif").write_bytes(b"II*\0" + bytes(range(200)))
    mistake(tmp_path / name, contains=contains, code=1)


@pytest.mark.parametrize(("model", "says"), [("abc", "0 Runs in"), ("shared/abc", "does not exist"), ("abc.onnx", "does not exist")])
def test_no_such_model(model, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["agrivision", "predict", model, "a.tif", "-o", "b", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_other_classes_make_no_submission(tmp_path, result):
    from dataclasses import replace

    from agrivision_repro.cli.predict import plan_submission
    from agrivision_repro.predict.trained import describe_model

    with pytest.raises(ValueError, match="the model's classes are background, tree: a submission needs background, cloud_shadow"):
        plan_submission(replace(describe_model(result), classes=("background", "tree")), "", set())


# -- the whole command


def test_the_command_and_its_submission(monkeypatch, capsys, result, test_set, tmp_path, predictor):
    words = [
        "--results",
        result.folder.path.parents[1],
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--tta",
        "d4",
        "--checkpoint",
        "best",
    ]
    zipped = ["--submission", tmp_path / "zip/upload.zip", "--data-root", test_set.parent, "--window", "64"]
    assert run_command(monkeypatch, "predict", result.folder.name[:6], test_set, "-o", tmp_path / "maps", *words, *zipped) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and printed[-1].endswith("4 maps, all rules of the challenge met")
    assert "iterations on synthetic farmland" in printed[0]
    turned = load_predictor(result, "best", "d4", device="cpu", precision="float32")
    with zipfile.ZipFile(tmp_path / "zip/upload.zip") as archive:
        assert archive.namelist() == sorted(f"{p.stem}.png" for p in (test_set / "images/rgb").iterdir())
        for name in archive.namelist():
            with open_scene(*find_scenes([test_set / "images/rgb" / name.replace("png", "jpg")])) as raster:
                expected = predict_image(turned, raster.rows(0, 64), 64).argmax(0)
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(archive.read(name)))), expected)
    assert sorted(p.name for p in (tmp_path / "zip").iterdir()) == ["upload.zip"]
    check = ["submission", "check", tmp_path / "zip/upload.zip"]
    assert run_command(monkeypatch, *check, "--data-root", test_set.parent, "--data", "synthetic") == 0
    assert "all rules of the challenge met" in capsys.readouterr().out
    assert run_command(monkeypatch, *check) == 1  # without the data a tile has 512×512 pixels
    said = capsys.readouterr().out
    assert said.count("wrong size: ") == 4 and "is 64×64 pixels, wanted 512×512" in said and "4 faults, listed above" in said
    assert run_command(monkeypatch, "submission", "check", tmp_path / "none.zip") == 2


# -- the validator

SIZES = {f"A_{k}": (20, 30) for k in range(3)}  # height, width


def good(value: int = 3, size=(20, 30)) -> bytes:
    return encode(Image.fromarray(np.full(size, value, np.uint8)))


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def lay_out(path: Path, entries: dict[str, bytes]) -> Path:
    "Write a folder, or a zip where the name says so."
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return path
    for name, content in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def deep_png() -> bytes:
    return encode(Image.fromarray(np.full((20, 30), 3, np.uint16)))


WHOLE = {f"{name}.png": good() for name in SIZES}
FAULTY = {  # fault → entries that replace or join the good ones (None: left out), kind, words of the message
    "missing": ({"A_1.png": None}, "missing", "predict it"),
    "extra tile": ({"B_0.png": good()}, "extra", "no image of the test set"),
    "extra file": ({".DS_Store": b"x"}, "extra", "is not named NAME.png"),
    "upper case": ({"A_9.PNG": good()}, "extra", "is not named NAME.png"),
    "transposed": ({"A_1.png": good(size=(30, 20))}, "wrong size", "is 20×30 pixels, wanted 30×20"),
    "one pixel short": ({"A_1.png": good(size=(20, 29))}, "wrong size", "is 29×20 pixels"),
    "RGB": ({"A_1.png": encode(Image.new("RGB", (30, 20)))}, "wrong mode", "is RGB of 8 bits"),
    "alpha": ({"A_1.png": encode(Image.new("LA", (30, 20)))}, "wrong mode", "gray and alpha"),
    "palette": ({"A_1.png": encode(Image.new("P", (30, 20)))}, "wrong mode", "palette"),
    "one bit": ({"A_1.png": encode(Image.new("1", (30, 20)))}, "wrong mode", "gray of 1 bits"),
    "16 bits": ({"A_1.png": deep_png()}, "wrong mode", "gray of 16 bits"),
    "value 7": ({"A_1.png": good(7)}, "wrong value", "contains 7: wanted 0 (background) to 6 (weed_cluster) only"),
    "value 255": ({"A_1.png": good(255)}, "wrong value", "contains 255"),
    "JPEG": ({"A_1.png": encode(Image.new("L", (30, 20)), "JPEG")}, "not a PNG", "save it as PNG"),
    "empty file": ({"A_1.png": b""}, "not a PNG", "begins with b''"),
    "truncated": ({"A_1.png": good()[:50]}, "damaged", "cannot be decoded"),
    "nested": ({"labels/B.png": good()}, "nested", "is in a folder"),
    "too many bytes": ({"A_1.png": good() + bytes(5 << 20)}, "wrong size", "more than 4,194,304 bytes"),
}


@pytest.mark.parametrize("form", ["upload", "upload.zip"])
@pytest.mark.parametrize("fault", FAULTY)
def test_every_fault_is_named(fault, form, tmp_path):
    changed, kind, words = FAULTY[fault]
    entries = {name: content for name, content in (WHOLE | changed).items() if content is not None}
    path = lay_out(tmp_path / form, entries)
    found = check_submission(path, SIZES)
    culprit = next(iter(changed))
    assert {v.kind for v in found} == {kind}
    assert any(v.where == culprit and words in v.message for v in found), found
    assert check_submission(lay_out(tmp_path / f"good-{form}", WHOLE), SIZES) == []


def test_all_faults_at_once(tmp_path):
    names = {f"T_{k}": (20, 30) for k in range(len(FAULTY))}
    entries = {f"{name}.png": good() for name in names}
    expected = []
    for k, (changed, kind, _) in enumerate(FAULTY.values()):
        (where, content), own = next(iter(changed.items())), f"T_{k}.png"
        entries.pop(own) if kind in ("missing", "extra", "nested") else entries.update({own: content})
        entries |= {where: content} if kind in ("extra", "nested") else {}
        expected += ["missing"] * (kind in ("missing", "extra", "nested")) + [kind] * (kind != "missing")
    assert sorted(v.kind for v in check_submission(lay_out(tmp_path / "all.zip", entries), names)) == sorted(expected)


def test_faults_of_zips(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        for name in (*WHOLE, "A_0.png"):
            archive.writestr(name, good())
    assert [(v.kind, v.where) for v in check_submission(tmp_path / "twice.zip", SIZES)] == [("duplicate", "A_0.png")]
    path = lay_out(tmp_path / "flipped.zip", WHOLE)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255  # of the first PNG: the zip's own check sum finds it
    path.write_bytes(content)
    assert [(v.kind, v.where) for v in check_submission(path, SIZES)] == [("damaged", "A_0.png")]
    (tmp_path / "tarball.zip").write_bytes(b"\x1f\x8b" + bytes(100))
    assert [v.kind for v in check_submission(tmp_path / "tarball.zip", SIZES)] == ["not a zip"]
    lay_out(tmp_path / "empty.zip", {})
    assert [v.kind for v in check_submission(tmp_path / "empty.zip")] == ["missing"]
    assert [v.kind for v in check_submission(tmp_path / "empty.zip", SIZES)] == ["missing"] * 3
    path = lay_out(tmp_path / "locked.zip", WHOLE)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1  # says that the first is encrypted
    path.write_bytes(content)
    assert [v.kind for v in check_submission(path, SIZES)] == ["damaged"]


def test_names_without_sizes_are_the_challenges_tiles(tmp_path):
    path = lay_out(tmp_path / "upload.zip", {"a.png": good(size=(512, 512)), "b.png": good(size=(512, 256))})
    for names in (None, ["a", "b"]):
        assert [(v.kind, v.where) for v in check_submission(path, names)] == [("wrong size", "b.png")]
    assert {v.kind for v in check_submission(path, ["a", "c"])} == {"extra", "missing"}


def test_a_bomb_is_not_decoded(tmp_path):
    "A header that claims 60,000 × 60,000 pixels is refused by what it says."
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    png = submission._SIGNATURE + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (fault,) = check_submission(lay_out(tmp_path / "bomb.zip", {"a.png": png}))
    assert fault.kind == "wrong size" and "60000×60000" in fault.message


def test_a_faulty_zip_is_never_written(tmp_path):
    labels = lay_out(tmp_path / "labels", {name: good(9) for name in WHOLE} | {"A_0.png": good()})
    with pytest.raises(
        ValueError, match=r"upload.zip was not written, 2 rules of the challenge are broken: wrong value: 'A_1.png' contains 9"
    ):
        write_submission(labels, tmp_path / "to/upload.zip", SIZES)
    assert list((tmp_path / "to").iterdir()) == []
    with pytest.raises(ValueError, match="missing: 'C.png'"):
        write_submission(labels, tmp_path / "to/upload.zip", {"C": (20, 30)})
    write_submission(labels, tmp_path / "to/upload.zip", {"A_0": (20, 30)})
    first = (tmp_path / "to/upload.zip").read_bytes()
    write_submission(labels, tmp_path / "to/upload.zip", {"A_0": (20, 30)})
    assert (tmp_path / "to/upload.zip").read_bytes() == first  # the same maps, the same bytes


def test_sizes_come_from_the_test_set(test_set):
    assert set(tile_sizes("synthetic", test_set.parent).values()) == {(64, 64)}
    with pytest.raises(ValueError, match="data is 'naip-trees': wanted agrivision-2020"):
        tile_sizes("naip-trees", test_set.parent)


def test_an_entry_without_a_name_is_named(tmp_path):
    path = lay_out(tmp_path / "upload.zip", {"A_0.png": good(size=(20, 30))})
    path.write_bytes(path.read_bytes().replace(b"A_0.png", bytes(7)))
    (fault,) = check_submission(path)
    assert str(fault) == "extra: '(an entry without a name)' is not named NAME.png: remove or rename it"


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(start=st.sampled_from(["png", "zip", "nothing"]), cuts=st.lists(st.tuples(st.integers(0, 2_000), st.binary(max_size=6)), max_size=5))
@FUZZ
def test_fuzz(start, cuts, tmp_path):
    "Whatever bytes stand in a zip, or in a PNG of it: violations, never a traceback."
    whole = {"png": good(), "zip": lay_out(tmp_path / "whole.zip", WHOLE).read_bytes(), "nothing": b""}[start]
    content = bytearray(whole)
    for place, patch in cuts:
        place %= len(content) + 1
        content[place : place + len(patch)] = patch or b""
    path = tmp_path / "fuzzed.zip"
    path.write_bytes(content)
    if start == "png":
        lay_out(path, WHOLE | {"A_1.png": bytes(content)})
    shutil.rmtree(tmp_path / "fuzzed", ignore_errors=True)
    folder = lay_out(tmp_path / "fuzzed", WHOLE | {"A_1.png": bytes(content)})
    for found in (check_submission(path, SIZES), check_submission(path), check_submission(folder, SIZES)):
        assert all(v.kind and v.where and "\n" not in str(v) for v in found)
        json.dumps([tuple(v) for v in found])


@given(names=st.lists(st.text(min_size=1, max_size=12), max_size=4, unique=True))
@FUZZ
def test_fuzz_names(names, tmp_path):
    "Names of any letters."
    path = tmp_path / "named.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            try:
                archive.writestr(name, good())
            except (ValueError, IndexError):  # no name that a zip can hold
                return
    found = check_submission(path, SIZES)
    assert {v.where for v in found if v.kind == "missing"} == set(WHOLE)
    assert all("\n" not in str(v) for v in found)
