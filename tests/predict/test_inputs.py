"Whatever a file's bands, values, nodata and place: the map is that of the plain image, or one line says why not."

import os

import numpy as np
import pytest
import tifffile
from PIL import Image
from rasters import PLACE, needs_rasterio, noise, run_command, write_geotiff, write_tiff

from agrivision_repro.data.tiles import BadFile, read_image
from agrivision_repro.predict import images
from agrivision_repro.predict.bands import BYTES, describe_color, plan_reading
from agrivision_repro.predict.images import predict_scene
from agrivision_repro.predict.scenes import Scene, find_rasterio, find_scenes, open_scene
from agrivision_repro.predict.submission import CHALLENGE_CLASSES
from agrivision_repro.predict.windows import predict_image, predict_strips
from agrivision_repro.runs.run import plan_run

IMAGE = noise(4, 57, 61).clip(1, 254)  # R, G, B, NIR
HALF = np.arange(61) < 30  # columns without data


@pytest.fixture(scope="session")
def rgb_result(workspace):
    return workspace.result(plan_run("smoke", "synthetic", depth=18, channels="rgb"))


@pytest.fixture
def predict(monkeypatch, capsys, tmp_path, result):
    "Run the command on inputs; return its exit code, the label maps by name, and what it printed."

    def run(*words, by=result, out=tmp_path / "maps", seen=None):
        options = ["--results", by.folder.path.parents[1], "--device", "cpu", "--precision", "float32", "--window", 32, "--no-pictures"]
        code = run_command(monkeypatch, "predict", by.folder.name, *words, "-o", out, *options)
        return code, {path.stem: read_image(path, "L") for path in (seen or out).glob("labels/*.png")}, capsys.readouterr()

    return run


def declare(path, colors=(), texts=()):
    "Declare color interpretations and descriptions of a GeoTIFF's bands."
    rasterio = find_rasterio()
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp[color] for color in colors] or file.colorinterp
        for k, text in enumerate(texts, 1):
            file.set_band_description(k, text)
    return path


def write_masked(path, image, valid, is_internal=True):
    rasterio = find_rasterio()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=is_internal):
        write_geotiff(path, image, photometric="rgb", **{"alpha": "unspecified"} if len(image) > 3 else {})
        with rasterio.open(path, "r+") as file:
            file.write_mask(valid)
    assert path.with_suffix(".tif.msk").exists() != is_internal


@needs_rasterio
def test_half_without_data(reader, predict, tmp_path):
    "By value, by internal mask or by alpha: left out of map and shares; the other half is that of an image with zeros there."
    folder, noisy = tmp_path / "in", np.where(HALF, 77, IMAGE).astype(np.uint8)
    folder.mkdir()
    write_geotiff(folder / "plain.tif", IMAGE * ~HALF)
    write_geotiff(folder / "zero.tif", IMAGE * ~HALF, nodata=0)
    write_geotiff(folder / "value.tif", np.where(HALF, 255, IMAGE).astype(np.uint8), nodata=255)
    write_masked(folder / "mask.tif", noisy, np.broadcast_to(~HALF, (57, 61)))
    alpha = np.broadcast_to(np.uint8(255) * ~HALF, (1, 57, 61))
    declare(write_geotiff(folder / "alpha.tif", np.concatenate([noisy, alpha])), ("red", "green", "blue", "undefined", "alpha"))
    code, maps, printed = predict(folder)
    assert code == 0 and (plain := maps.pop("plain")).max() < 7 and set(maps) == {"zero", "value", "mask", "alpha"}
    for labels in maps.values():
        assert (labels[:, HALF] == 255).all()
        np.testing.assert_array_equal(labels[:, ~HALF], plain[:, ~HALF])
    shares = np.bincount(plain[:, ~HALF].ravel(), minlength=7) / plain[:, ~HALF].size
    largest = f"49.2 % without data, {CHALLENGE_CLASSES[shares.argmax()]} {100 * shares.max():.1f} %"
    assert printed.out.count(largest) == 4, printed.out


@needs_rasterio
def test_the_map_is_tagged_and_cloud_optimized(predict, tmp_path, monkeypatch):
    path = write_geotiff(tmp_path / "large.tif", np.where(HALF, 0, IMAGE).astype(np.uint8).repeat(10, 1).repeat(10, 2), nodata=0)
    assert predict(path, "--window", "512")[0] == 0
    with find_rasterio().open(tmp_path / "maps/georeferenced/large.tif") as made:
        assert made.nodata == 255 and (made.read(1)[:, :300] == 255).all() and (made.read(1)[:, 300:] < 7).all()
        assert made.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and made.overviews(1) and tuple(made.transform)[:6] == PLACE


def test_nan_is_no_data(reader, tmp_path):
    stored = (IMAGE / 255).astype(np.float32)
    stored[2, 5, 7] = np.nan
    with open_scene(Scene("a", write_tiff(tmp_path / "a.tif", stored)), BYTES._replace(scale=1)) as raster:
        assert not raster.rows(5, 6)[:, 0, 7].any() and (~raster.valid(0, 57)).sum() == 1


@needs_rasterio
def test_declared_bands(reader, predict, tmp_path):
    "Colors in any order, declared by interpretation or description, give the same map."
    folder, (r, g, b, n) = tmp_path / "in", IMAGE
    folder.mkdir()
    write_geotiff(folder / "plain.tif", IMAGE)
    declare(write_geotiff(folder / "bgrn.tif", np.stack([b, g, r, n])), ("blue", "green", "red", "undefined"))
    declare(write_geotiff(folder / "bgrnir.tif", np.stack([b, g, r, n])), ("blue", "green", "red", "nir"))
    declare(write_geotiff(folder / "first.tif", np.stack([n, r, g, b])), ("undefined", "red", "green", "blue"))
    declare(write_geotiff(folder / "texts.tif", np.stack([b, g, r, n])), (), ("Blue", "Green", "Red", "Near-Infrared"))
    declare(write_geotiff(folder / "nir_first.tif", np.stack([n, r, g, b]), photometric="minisblack"), (), ("NIR",))
    declare(write_geotiff(folder / "five.tif", np.stack([n, g, b, r, r])), ("nir", "green", "blue", "rededge", "red"))
    code, maps, printed = predict(folder)
    assert code == 0 and len(maps) == 7, printed.err
    for name, labels in maps.items():
        np.testing.assert_array_equal(labels, maps["plain"], name)
    assert printed.out.count("(bands 3,2,1,4)") == 3 and "(bands 5,2,3,1)" in printed.out
    declare(write_geotiff(tmp_path / "edge.tif", IMAGE), ("blue", "green", "red", "rededge"))
    code, _, printed = predict(tmp_path / "edge.tif")
    assert code == 1 and "(blue, green, red, rededge), none known to be near-infrared" in printed.err


def test_given_bands(reader, predict, tmp_path):
    r, g, b, n = IMAGE
    write_tiff(tmp_path / "plain.tif", IMAGE)
    plain = predict(tmp_path / "plain.tif")[1]["plain"]
    for order, bands in {"3,2,1,4": (b, g, r, n), "2, 3, 4, 1": (n, r, g, b), "6,2,1,3": (b, g, n, r, r, r)}.items():
        tifffile.imwrite(path := tmp_path / f"{order[0]}.tif", np.stack(bands), photometric="minisblack", planarconfig="separate")
        code, maps, printed = predict(path, "--bands", order)
        assert code == 0, printed.err
        np.testing.assert_array_equal(maps[path.stem], plain if order[0] != "6" else maps[path.stem])
    code, _, printed = predict(path, "--bands", "1,2,3,7")
    assert code == 1 and "not all of 1,2,3,7: name others with --bands" in printed.err
    code, _, printed = predict(path)
    assert code == 1 and "6 bands (undeclared, undeclared, " in printed.err and "--bands" in printed.err


@pytest.mark.parametrize("words", ["1,2", "1,2,2,3", "0,1,2,3", "r,g,b,n", "1,2,3,4,5", "1,,2,3", "1,2,3"])
def test_bands_that_are_none(words):
    with pytest.raises(ValueError, match="bands is .*(such as 3,2,1,4|as the fourth)$"):
        plan_reading("rgbn", words)
    with pytest.raises(ValueError, match="scale is"):
        plan_reading("rgbn", "", float("nan"))


def test_plans():
    assert plan_reading("rgbn") == BYTES and plan_reading("rgb", "3,2,1", 1e4) == ((0, 1, 2), (3, 2, 1), 1e4)
    pairs = {("gray", ""): "", ("red", "NIR"): "nir", ("Blue", None): "blue", ("", "Near_Infrared"): "nir", ("alpha", "B8"): "alpha"}
    assert {pair: describe_color(*pair) for pair in pairs} == pairs and describe_color("rededge", "band 4") == "rededge"


def test_an_opaque_fourth_band_is_no_nir(reader, predict, rgb_result, tmp_path):
    "A model on four channels refuses it; one on RGB does not look at it. A declared alpha that varies is NIR."
    opaque = np.concatenate([IMAGE[:3], np.full((1, 57, 61), 255, np.uint8)])
    write_tiff(tmp_path / "opaque.tif", opaque)
    Image.fromarray(opaque.transpose(1, 2, 0)).save(tmp_path / "png.png")
    for name in ("opaque.tif", "png.png"):
        code, maps, printed = predict(tmp_path / name)
        assert code == 1 and not maps and "(red, green, blue, alpha), none known to be near-infrared" in printed.err
        assert printed.err.count("\n") == 1
    code, maps, _ = predict(tmp_path / "opaque.tif", tmp_path / "png.png", by=rgb_result)
    assert code == 0
    write_tiff(tmp_path / "varied.tif", IMAGE)
    code, maps, printed = predict(tmp_path / "varied.tif", by=rgb_result)
    assert "band 4, declared as alpha, varies: read as NIR" in printed.out
    for labels in maps.values():
        np.testing.assert_array_equal(labels, maps["varied"])


def test_what_the_model_never_looks_at(predict, rgb_result, tmp_path):
    "RGB of three bands, and pairs without one image, for a model that does not need it; one line otherwise."
    folder = tmp_path / "in"
    for place in ("images/rgb", "images/nir"):
        (folder / place).mkdir(parents=True)
    tifffile.imwrite(folder / "images/rgb/pair.tif", IMAGE[:3].transpose(1, 2, 0), photometric="rgb")
    write_tiff(tmp_path / "plain.tif", IMAGE)
    write_tiff(tmp_path / "rgb.tif", IMAGE[:3])
    code, maps, printed = predict(folder, tmp_path / "plain.tif", tmp_path / "rgb.tif", by=rgb_result)
    assert code == 0, printed.err
    for labels in maps.values():
        np.testing.assert_array_equal(labels, maps["plain"])
    code, _, printed = predict(folder, out=tmp_path / "four")
    assert code == 1 and printed.err.count("\n") == 1 and "nir/pair.tif is missing" in printed.err
    (folder / "images/rgb/pair.tif").unlink()
    for path in (tmp_path / "grey.tif", folder / "images/nir/pair.tif"):
        tifffile.imwrite(path, IMAGE[3])
    inputs = [tmp_path / "plain.tif", tmp_path / "grey.tif", folder / "images/nir/pair.tif"]
    code, maps, printed = predict(*inputs, "--channels", "nir3", by=rgb_result, out=tmp_path / "nir")
    assert code == 0, printed.err
    for labels in maps.values():
        np.testing.assert_array_equal(labels, maps["plain"])


def test_other_ranges(reader, predict, tmp_path):
    "Values of 0 to 10,000 and of 0 to 1 are scaled, and refused without --scale; nodata is what is stored."
    write_tiff(tmp_path / "plain.tif", IMAGE)
    plain = predict(tmp_path / "plain.tif")[1]["plain"]
    stored = {10_000: np.rint(IMAGE / 255 * 10_000).astype(np.uint16), 1: (IMAGE / 255).astype(np.float32), 65_535: IMAGE * np.uint16(257)}
    for scale, image in stored.items():
        path = write_tiff(tmp_path / f"to_{scale}.tif", image)
        code, maps, printed = predict(path)
        assert code == 1 and path.stem not in maps and f"{image.dtype} values: pass with --scale" in printed.err
        code, maps, printed = predict(path, "--scale", scale)
        assert code == 0, printed.err
        np.testing.assert_array_equal(maps[path.stem], plain)
    with pytest.raises(BadFile, match="convert it to bytes"), open_scene(Scene("a", write_tiff(tmp_path / "a.tif", IMAGE * 1j))):
        pass


@needs_rasterio
def test_scaled_nodata(reader, tmp_path):
    stored = np.where(HALF, -9_999, IMAGE.astype(int) * 39).astype(np.int16)
    with open_scene(Scene("a", write_geotiff(tmp_path / "a.tif", stored, nodata=-9_999)), BYTES._replace(scale=255 * 39)) as raster:
        np.testing.assert_array_equal(raster.rows(0, 57), IMAGE * ~HALF)
        np.testing.assert_array_equal(raster.valid(3, 9), np.broadcast_to(~HALF, (6, 61)))


def cut(path):
    path.write_bytes(path.read_bytes()[:-3_000])


def test_one_bad_file(reader, predict, tmp_path, monkeypatch):
    "The others are predicted, the bad one is named with its cause, and finished maps are kept."
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        write_tiff(folder / f"{name}.tif", noise(4, 40, 40, seed=ord(name)), compression="zlib")
    cut(folder / "b.tif")
    code, maps, printed = predict(folder, "--submission", tmp_path / "upload.zip")
    assert code == 1 and set(maps) == {"a", "c"} and not (tmp_path / "upload.zip").exists()
    first, last, zipped = printed.err.splitlines()
    assert first.startswith("agrivision: ") and "b.tif cannot be read (" in first and "previous exception" not in first
    assert last.startswith("agrivision: 1 of 3 images not predicted, named above") and "upload.zip was not written" in zipped
    write_tiff(folder / "b.tif", noise(4, 40, 40), compression="zlib")
    opened = []
    monkeypatch.setattr(images, "predict_strips", lambda *given: opened.append(1) or predict_strips(*given))
    code, maps, printed = predict(folder)
    assert code == 0 and set(maps) == {"a", "b", "c"} and len(opened) == 1
    assert printed.out.count("(kept from an earlier call)") == 2
    for changed in (["--tta", "d4"], ["--overlap", "0.25"]):
        assert "kept" not in predict(folder / "a.tif", *changed)[2].out
    cut(folder / "a.tif")
    assert predict(folder / "a.tif")[0] == 1  # another file than the one predicted


def strip_maps(out, name="a"):
    return sorted(str(path.relative_to(out).with_suffix("")) for path in out.glob("*/*") if path.stem == name)


def test_images_above_pillows_limit(predict, rgb_result, tmp_path, monkeypatch):
    "JPEG and PNG of any size are decoded, a large map is found again, and the limit holds for other files."
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(IMAGE[:3].transpose(1, 2, 0)).save(tmp_path / name)
    given = {"by": rgb_result, "seen": tmp_path / "none"}  # Image.open would refuse the maps, too
    code, _, first = predict(tmp_path / "a.png", tmp_path / "b.jpg", **given)
    assert code == 0 and "kept" not in first.out and not first.err, first.err
    code, _, second = predict(tmp_path / "a.png", tmp_path / "b.jpg", **given)
    assert code == 0 and second.out.replace(" (kept from an earlier call)", "") == first.out and second.out.count("kept") == 2
    assert Image.MAX_IMAGE_PIXELS == 1_000


@needs_rasterio
def test_no_product_of_an_earlier_call_stays(predictor, tmp_path):
    "A folder has the maps of one model and one file, also after a call that makes fewer."
    write_geotiff(tmp_path / "a.tif", IMAGE)
    Image.fromarray(IMAGE[:3].transpose(1, 2, 0)).save(tmp_path / "a.png")

    def run(path, settings, has_picture):
        scene, out = Scene("a", tmp_path / path), tmp_path / "maps"
        predict_scene(scene, predictor, out, CHALLENGE_CLASSES, 64, settings=settings, has_picture=has_picture, reading=plan_reading("rgb"))
        return [path.split("/")[0] for path in strip_maps(out)]

    assert run("a.tif", "A", True) == ["bits", "georeferenced", "labels", "pictures"]
    assert run("a.tif", "A", False) == ["bits", "georeferenced", "labels", "pictures"]  # kept
    assert run("a.tif", "B", False) == ["bits", "georeferenced", "labels"]
    assert run("a.png", "B", True) == ["bits", "labels", "pictures"]


def test_a_damaged_map_is_predicted_again(predict, tmp_path):
    write_tiff(tmp_path / "a.tif", IMAGE)
    whole = predict(tmp_path / "a.tif")[1]["a"]
    for cut in (slice(0), slice(-200)):
        (tmp_path / "maps/labels/a.png").write_bytes((tmp_path / "maps/labels/a.png").read_bytes()[cut])
        code, maps, printed = predict(tmp_path / "a.tif")
        assert code == 0 and "kept" not in printed.out and not printed.err
        np.testing.assert_array_equal(maps["a"], whole)


WORLD = "2\n0\n0\n-2\n500001\n4599999\n"  # `PLACE`, at the center of the first pixel


@needs_rasterio
@pytest.mark.parametrize(("image", "beside"), [("a.jpg", "a.jgw"), ("a.png", "a.wld"), ("a.tif", "a.tfw"), ("a.tif", "a.tif.msk")])
def test_a_file_added_beside_an_image_counts(image, beside, predict, rgb_result, tmp_path):
    Image.fromarray(IMAGE[:3].transpose(1, 2, 0)).save(tmp_path / image)
    assert predict(tmp_path / image, by=rgb_result)[0] == 0 and not (tmp_path / "maps/georeferenced").exists()
    if beside.endswith("msk"):
        (tmp_path / "other").mkdir()
        write_masked(tmp_path / "other" / image, IMAGE[:3], np.broadcast_to(~HALF, (57, 61)), is_internal=False)
        (tmp_path / "other" / beside).rename(tmp_path / beside)
    else:
        (tmp_path / beside).write_text(WORLD)
    code, maps, printed = predict(tmp_path / image, by=rgb_result)
    assert code == 0 and "kept" not in printed.out
    assert (tmp_path / "maps/georeferenced/a.tif").exists() == (not beside.endswith("msk")), printed
    assert (maps["a"][:, HALF] == 255).all() == beside.endswith("msk")
    assert "kept" in predict(tmp_path / image, by=rgb_result)[2].out


def test_two_calls_at_once(predictor, tmp_path, monkeypatch):
    "Another call that predicts the same image into the same folder finishes while this one moves a map."
    scene, sync = Scene("a", write_tiff(tmp_path / "a.tif", IMAGE)), os.fsync

    def run():
        return predict_scene(scene, predictor, tmp_path / "maps", CHALLENGE_CLASSES, 64, has_picture=False)

    def interrupted(number):
        monkeypatch.setattr("agrivision_repro.core.os.fsync", sync)
        assert run().size == (57, 61)

    monkeypatch.setattr("agrivision_repro.core.os.fsync", interrupted)
    run()
    assert strip_maps(tmp_path / "maps") == ["bits/a", "labels/a"]


def test_a_home_in_an_option(predict, tmp_path, monkeypatch):
    "Shells leave the ~ of --out=~/maps as it is."
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_tiff(tmp_path / "a.tif", IMAGE)
    code, _, printed = predict("~/a.tif", out="~/maps", seen=tmp_path / "maps")
    assert code == 0 and (tmp_path / "maps/labels/a.png").is_file() and not (tmp_path / "~").exists(), printed.err
    words = ("~/a.tif", "--submission=~/up.zip", "--data-root=~/none")
    assert f"{tmp_path}/none is not a folder" in predict(*words)[2].err
    code, _, printed = predict("~nobody-of-this-name/a.tif")
    assert code == 2 and "a.tif is missing" in printed.err


def test_folders_of_any_images(predict, rgb_result, tmp_path, monkeypatch):
    "TIFF, JPEG and PNG with endings in any case; files of operating systems are ignored."
    folder, rgb = tmp_path / "in", Image.fromarray(IMAGE[:3].transpose(1, 2, 0))
    folder.mkdir()
    for name in ("a.tif", "b.TIFF", "c.JPG", "d.jpeg", "e.PNG"):
        rgb.save(folder / name)
    for name in ("._a.tif", ".DS_Store", "Thumbs.db", "notes.txt", "a.tfw"):
        (folder / name).write_bytes(b"x")
    assert [scene.name for scene in find_scenes([folder])] == list("abcde")
    assert [scene.name for scene in find_scenes([folder / "a.tif", folder / "._a.tif", folder / "Thumbs.db"])] == ["a"]
    with pytest.raises(ValueError, match="no image among Thumbs.db"):
        find_scenes([folder / "Thumbs.db"])
    code, maps, printed = predict(folder, by=rgb_result)
    assert code == 0 and set(maps) == set("abcde"), printed.err
    for name in "be":
        np.testing.assert_array_equal(maps[name], maps["a"])
    tiles = tmp_path / "tiles"
    for place in ("rgb", "nir"):
        (tiles / place).mkdir(parents=True)
    rgb.save(tiles / "rgb/a.JPG")
    Image.fromarray(IMAGE[3]).save(tiles / "nir/a.png")
    (tiles / "rgb/._a.JPG").write_bytes(b"x")
    expected = [Scene("a", tiles / "rgb/a.JPG", tiles / "nir/a.png")]
    assert find_scenes([tiles / "rgb"]) == find_scenes([tiles / "nir/a.png"]) == find_scenes([tiles]) == expected
    monkeypatch.chdir(tiles / "rgb")
    assert find_scenes(["."]) == find_scenes(["a.JPG"]) == find_scenes(["../nir/a.png"]) == find_scenes(["./../nir"]) == expected


@needs_rasterio
def test_ground_control_points_are_kept(predictor, tmp_path):
    rasterio = find_rasterio()
    corners = [(row, col, 5e5 + 2 * col + row, 4.6e6 - 2 * row) for row in (0, 57) for col in (0, 61)]
    points = [rasterio.control.GroundControlPoint(*corner) for corner in corners]
    form = {"driver": "GTiff", "count": 4, "height": 57, "width": 61, "dtype": "uint8"}
    with rasterio.open(tmp_path / "gcp.tif", "w", **form, gcps=points, crs="EPSG:32633") as file:
        file.write(IMAGE)
    predict_scene(Scene("gcp", tmp_path / "gcp.tif"), predictor, tmp_path, CHALLENGE_CLASSES, 32, has_picture=False)
    with rasterio.open(tmp_path / "georeferenced/gcp.tif") as made:
        kept, crs = made.gcps
        assert crs.to_epsg() == 32633 and [(p.row, p.col, p.x, p.y) for p in kept] == corners
        np.testing.assert_array_equal(made.read(1), predict_image(predictor, IMAGE, 32).argmax(0))


@needs_rasterio
def test_ground_control_points_without_a_reference_system(tmp_path):
    rasterio = find_rasterio()
    points = [rasterio.control.GroundControlPoint(row, col, 5 + col, 7 - row) for row in (0, 57) for col in (0, 61)]
    form = {"driver": "GTiff", "count": 4, "height": 57, "width": 61, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", **form, gcps=points, crs=rasterio.crs.CRS()) as file:
        file.write(IMAGE)
    with open_scene(Scene("a", tmp_path / "a.tif")) as raster:
        images._write_georeferenced(tmp_path / "b.tif", IMAGE[0], raster.place, 7)
    with rasterio.open(tmp_path / "b.tif") as made:
        assert [(p.row, p.col, p.x, p.y) for p in made.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points] and not made.crs


@needs_rasterio
@pytest.mark.parametrize("beside", ["photo.JGW", "photo.jgw", "photo.JPGw", "photo.WLD", "photo.JGw"])
def test_world_files_in_any_case(beside, tmp_path, capsys, monkeypatch):
    Image.fromarray(IMAGE[:3].transpose(1, 2, 0)).save(tmp_path / "photo.JPG")
    (tmp_path / beside).write_text(WORLD)
    with open_scene(Scene("photo", tmp_path / "photo.JPG"), plan_reading("rgb")) as raster:
        assert tuple(raster.place["transform"])[:6] == PLACE
    monkeypatch.setattr("agrivision_repro.predict.scenes.find_rasterio", lambda: None)
    with open_scene(Scene("photo", tmp_path / "photo.JPG"), plan_reading("rgb")):
        assert "georeferencing is dropped" in capsys.readouterr().err


def lay_pair(folder, write, **options):
    "A pair of files that `write(path, image, **options)` writes."
    for kind, image in {"rgb": IMAGE[:3], "nir": IMAGE[3:]}.items():
        (folder / kind).mkdir(parents=True)
        write(folder / kind / "a.tif", image, **options)
    return Scene("a", folder / "rgb/a.tif", folder / "nir/a.tif")


@needs_rasterio
@pytest.mark.parametrize("options", [{}, {"crs": None}, {"compress": "lzw"}, {"compress": "lzw", "interleave": "band"}], ids=str)
def test_a_pair_of_geotiffs(options, reader, tmp_path, capsys):
    "It keeps its place, without rasterio a note says that it does not; one that has no place needs no note."
    with open_scene(lay_pair(tmp_path / "placed", write_geotiff, **options)) as raster:
        np.testing.assert_array_equal(raster.rows(3, 50), IMAGE[:, 3:50])
        said = capsys.readouterr().err
        assert tuple(raster.place["transform"])[:6] == PLACE if raster.place else said.count("georeferencing is dropped") == 2
    plain = lay_pair(tmp_path / "plain", lambda path, image: Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(path))
    plain.path.with_name("a.tif.aux.xml").write_text("<PAMDataset><Metadata/></PAMDataset>")  # no place
    with open_scene(plain) as raster:
        np.testing.assert_array_equal(raster.rows(0, 57), IMAGE)
        assert not raster.place and not capsys.readouterr().err


@needs_rasterio
def test_a_pair_of_other_values(reader, tmp_path):
    "Sixteen bits, and nodata of one of its files or of both, where these agree."
    stored = np.where(HALF, 0, IMAGE * np.uint16(257))
    stored[0, :, 40:], stored[3, :, 50:] = 0, 0

    def write(path, image):
        write_geotiff(path, stored[:3] if len(image) == 3 else stored[3:], nodata=0)

    scene = lay_pair(tmp_path, write)
    with pytest.raises(BadFile, match="a.tif has uint16 values: pass with --scale"), open_scene(scene):
        pass
    with open_scene(scene, BYTES._replace(scale=65_535)) as raster:
        np.testing.assert_array_equal(raster.rows(0, 57), stored // 257)
        np.testing.assert_array_equal(raster.valid(0, 57), np.broadcast_to(~HALF, (57, 61)))
    tifffile.imwrite(scene.nir, stored[3])
    with open_scene(scene, BYTES._replace(scale=65_535)) as raster:
        np.testing.assert_array_equal(raster.valid(0, 57), np.broadcast_to(~HALF, (57, 61)))


@needs_rasterio
def test_rational_polynomials_and_world_files_are_kept(tmp_path, monkeypatch, capsys):
    from rasterio.rpc import RPC

    rasterio = find_rasterio()
    names = "height_off height_scale lat_off lat_scale line_off line_scale long_off long_scale samp_off samp_scale"
    polynomials = dict.fromkeys("line_den_coeff line_num_coeff samp_den_coeff samp_num_coeff".split(), [2.0] * 20)
    rpcs = RPC(**dict.fromkeys(names.split(), 3), **polynomials)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=4, height=57, width=61, dtype="uint8", rpcs=rpcs) as file:
        file.write(IMAGE)
    with open_scene(Scene("a", tmp_path / "a.tif")) as raster:
        images._write_georeferenced(tmp_path / "b.tif", IMAGE[0], raster.place, 7)
    with rasterio.open(tmp_path / "b.tif") as made:
        assert made.rpcs.samp_den_coeff == [2.0] * 20 and made.rpcs.lat_off == 3
    Image.fromarray(IMAGE[:3].transpose(1, 2, 0)).save(tmp_path / "c.jpg")
    (tmp_path / "c.jgw").write_text("2\n0\n0\n-2\n500001\n4599999\n")
    rgb = plan_reading("rgb")
    with open_scene(Scene("c", tmp_path / "c.jpg"), rgb) as raster:
        assert tuple(raster.place["transform"])[:6] == PLACE and raster.place["crs"] is None
    monkeypatch.setattr("agrivision_repro.predict.scenes.find_rasterio", lambda: None)
    for name in "ac":
        (file,) = [path for path in tmp_path.glob(f"{name}.*") if path.suffix in (".tif", ".jpg")]
        with open_scene(Scene(name, file), rgb) as raster:
            assert not raster.place and "georeferencing is dropped" in capsys.readouterr().err


def test_progress_and_pictures(predictor, tmp_path, monkeypatch):
    "Shares add up to one; the picture shows what the file has, black where it has no data."
    shown, shares = {}, []
    monkeypatch.setattr(images, "show_panels", lambda panels, *_, **__: shown.update(panels) or plain_figure())
    path = tmp_path / "a.png"
    Image.fromarray(np.concatenate([noise(3, 90, 32), np.full((1, 90, 32), 255, np.uint8)]).transpose(1, 2, 0)).save(path)
    predict_scene(Scene("a", path), predictor, tmp_path, CHALLENGE_CLASSES, 32, reading=plan_reading("rgb"), advance=shares.append)
    assert list(shown) == ["RGB", "prediction"] and len(shares) > 3 and abs(sum(shares) - 1) < 1e-9


def plain_figure():
    from matplotlib.figure import Figure

    return Figure()
