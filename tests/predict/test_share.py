"A trained model in other hands: a folder, a card, an exported file for bytes of any size, and the same maps from each of them."

import json
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run
from huggingface_hub import ModelCard, constants
from rasters import noise, run_command, write_tiff
from safetensors.torch import load_file, save_file

from agrivision_repro.data.tiles import read_image
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.predict.export import TOLERANCE, WRITERS, compare_logits, export_model, open_exported
from agrivision_repro.predict.share import share_run
from agrivision_repro.predict.trained import TrainedModel, describe_model, load_trained
from agrivision_repro.predict.windows import predict_image

ROOT = Path(__file__).resolve().parents[2]
IMAGES = torch.from_numpy(noise(2, 4, 40, 56))


def refuse(*_):
    raise AssertionError("the network was used")


@pytest.mark.parametrize("norm", ["bn", "ibn_a", "ibn_s"])
def test_a_folder_gives_the_same_logits_without_network(norm, result, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", refuse)
    torch.manual_seed(0)
    about = describe_model(result)
    about = replace(about, channels="nir3", options=about.options | {"depth": 18, "norm": norm, "in_chans": 3})
    model = TrainedModel(about, DeepLabV3Plus(**about.options))
    model(IMAGES)  # in training mode: statistics other than those of a new net
    model.eval().save_pretrained(tmp_path)
    again = TrainedModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES)) and not again.training
    assert again.about == about


def test_the_card(shared, result):
    "Its fields, what the Hub reads, and its example, which is run as it is."
    card, run = ModelCard.load(shared / "README.md"), result.run
    (score,) = card.data.eval_results
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-segmentation")
    assert (score.dataset_type, score.metric_value) == ("synthetic", result.score("rgbn"))
    for words in (run.edition.credit, "warmup 1, constant 3", "| seeds | 0:", result.record["commit"][:10], "not the paper's numbers"):
        assert words in card.text
    rows = re.findall(r"^\| rgbn \| .*", card.text, re.M)
    assert len(rows) == len(result.scores["rgbn"]) and all(row.count("|") == 5 + len(run.edition.classes) for row in rows)
    assert f"| rgbn | multi-label | {100 * result.score('rgbn'):.1f} % |" in rows[0]
    assert {p.name for p in shared.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    exec(example, names := {"source": shared})
    assert names["labels"].shape == (1, 512, 512) and names["model"].about.classes == run.edition.classes


def test_a_folder_in_use_is_not_overwritten(shared, result):
    with pytest.raises(ValueError, match="is not an empty folder: name a new one"):
        share_run(result, shared)


def test_a_failed_upload_leaves_the_folder(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = ["share", result.folder.name, tmp_path / "model", "--push", "someone/model", "--results", result.folder.path.parents[1]]
    assert run_command(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is complete, but not on the Hub" in line and "hf upload someone/model" in line
    TrainedModel.from_pretrained(tmp_path / "model")


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("net.decoder.head.2.bias")
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGES = {  # words of the message → what is done to the folder
    "without config.json": lambda f: (f / "config.json").unlink(),
    "without model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "Expecting property name": lambda f: (f / "config.json").write_text("{"),
    "missing 8 required": lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
    "multiple values for keyword argument 'pretrained'": lambda f: change_config(f, options={"n_classes": 7, "pretrained": True}),
    "'cmyk'": lambda f: change_config(f, channels="cmyk"),
    "header": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]),
    "size mismatch": lambda f: change_config(f, options=json.loads((f / "config.json").read_text())["options"] | {"width": 0.125}),
    "net.decoder.head.2.bias": drop_tensor,
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(words, result, tmp_path, monkeypatch, capsys):
    share_run(result, tmp_path / "model")
    DAMAGES[words](tmp_path / "model")
    image = write_tiff(tmp_path / "field.tif", noise(4, 32, 32))
    assert run_command(monkeypatch, "predict", tmp_path / "model", image, "-o", tmp_path / "maps") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not a complete model" in line and words in line and "wanted a folder written by agrivision share" in line


# -- the command predicts with each form


def test_all_forms_give_the_same_maps(forms, result, predictor, tmp_path, monkeypatch):
    "Pixel for pixel; only where two classes are nearer than twice the exported files' tolerance may rounding choose the other."
    image, maps = noise(4, 57, 61), []
    path = write_tiff(tmp_path / "field.tif", image)
    options = ["--results", result.folder.path.parents[1], "--device", "cpu", "--precision", "float32"]
    for form in forms:
        assert run_command(monkeypatch, "predict", form, path, "-o", tmp_path / str(len(maps)), *options) == 0
        maps.append(read_image(tmp_path / str(len(maps)) / "labels/field.png", "L"))
    logits = predict_image(predictor, image, 32)
    second, first = np.sort(logits, 0)[-2:]
    is_clear = first - second > 2 * TOLERANCE * abs(logits).max()
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(maps[0], logits.argmax(0))
    np.testing.assert_array_equal(maps[1], maps[0])
    for exported in maps[2:]:
        np.testing.assert_array_equal(exported[is_clear], maps[0][is_clear])


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["foreign", "damaged"])
def test_other_files_are_refused_in_one_line(kind, ending, result, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"net.{ending}"
    if kind == "damaged":
        path.write_bytes(b"no model")
    elif kind == "foreign" and ending == "pt2":
        torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(1, 4, 8, 8),)), path)
    elif kind == "foreign":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
        torch.onnx.export(torch.nn.ReLU(), (torch.zeros(1, 4, 8, 8),), path, dynamo=True, verbose=False)
    image = write_tiff(tmp_path / "field.tif", noise(4, 32, 32))
    capsys.readouterr()
    assert run_command(monkeypatch, "predict", path, image, "-o", tmp_path / "maps") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no model with channels and classes" in line and "write it with agrivision export" in line


MISFITS = {"checkpoint": "best", "channels": "rgb", "precision": "bf16", "tta": "d8"}


@pytest.mark.parametrize("option", MISFITS)
def test_options_that_a_file_cannot_follow_are_refused(option, forms, tmp_path, monkeypatch, capsys):
    image = write_tiff(tmp_path / "field.tif", noise(4, 32, 32))
    assert run_command(monkeypatch, "predict", forms[2], image, "-o", tmp_path / "maps", f"--{option}", MISFITS[option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line and f"is {MISFITS[option]!r}: wanted one of" in line


def test_a_program_says_which_sizes_it_cannot_take(forms, tmp_path, monkeypatch, capsys):
    image = write_tiff(tmp_path / "thin.tif", noise(4, 3, 32))
    assert run_command(monkeypatch, "predict", forms[2], image, "-o", tmp_path / "maps") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot predict 32×3 pixels" in line and "agrivision share" in line


def test_nir_of_a_shared_model_is_what_the_run_sees(result):
    "A model on other channels than the Run's reads other planes."
    model = load_trained(result, channels="rgbr")
    with torch.no_grad():
        changed = IMAGES.clone()
        changed[:, 3] = 0
        assert torch.equal(model(IMAGES), model(changed))
        assert not torch.equal(load_trained(result)(IMAGES), load_trained(result)(changed))


# -- exported files


@pytest.mark.parametrize("form", [2, 3])
def test_an_exported_model_gives_the_models_logits(result, form, forms):
    "Written by the command, then read as another program does, on a third size."
    images = torch.randint(256, (3, 4, 48, 72), dtype=torch.uint8)
    exported, about = open_exported(forms[form])
    assert compare_logits(load_trained(result), exported, images) < 2 * TOLERANCE
    assert about == describe_model(result) and (about.classes, about.channels) == (result.run.edition.classes, "rgbn")
    assert about.colors[1] == "#56b4e9"


def test_a_wrong_export_is_found(result):
    model, images = load_trained(result), torch.randint(256, (1, 4, 48, 72), dtype=torch.uint8)
    assert compare_logits(model, model, images) == 0
    with pytest.raises(ValueError, match=r"logits of \(1, 4, 48, 72\) are off by 0.0001 of the largest"):
        compare_logits(model, lambda x: model(x) * 1.0001, images)


def test_a_failed_comparison_leaves_the_old_file(result, tmp_path, monkeypatch):
    (tmp_path / "net.pt2").write_text("of an earlier call")
    monkeypatch.setitem(WRITERS, ".pt2", lambda model, x, path: path.write_text("wrong"))
    monkeypatch.setattr("agrivision_repro.predict.export.open_exported", lambda path: (lambda x: load_trained(result)(x) * 2, None))
    with pytest.raises(ValueError, match="the exported model's logits .* are off"):
        export_model(result, tmp_path / "net.pt2")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"net.pt2": "of an earlier call"}


def test_what_cannot_be_exported_is_said(result, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"ends in \.pth: wanted \.pt2 or \.onnx"):
        export_model(result, tmp_path / "net.pth")
    monkeypatch.setattr("agrivision_repro.predict.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.onnx needs onnx, onnxscript, onnxruntime: .*or choose \.pt2"):
        export_model(result, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_torch_hub_loads_the_nets(result, tmp_path):
    "In a process of its own, from the checkout: a new net, and a trained model."
    load_trained(result).save_pretrained(tmp_path)
    code = "import torch; net = torch.hub.load('.', 'deeplabv3plus', 3, 18, 'ibn_s', source='local', width=1 / 16, trust_repo=True).eval()"
    code += "; print(*net(torch.zeros(1, 4, 64, 64)).shape)"
    code += f"; print(torch.hub.load('.', 'trained', {str(tmp_path)!r}, source='local', trust_repo=True).about.title)"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.splitlines() == ["1 3 64 64", describe_model(result).title], done.stderr
