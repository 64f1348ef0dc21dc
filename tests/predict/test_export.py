"A trained model leaves as one file that takes bytes of any size, and gives the logits of the model."

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agrivision_repro.predict.export import TOLERANCE, compare_logits, export_model, open_exported
from agrivision_repro.predict.trained import describe_model, load_trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("form", [2, 3])
def test_an_exported_model_gives_the_models_logits(result, form, forms):
    "Written by the command, then read as another program does, on a third size."
    images = torch.randint(256, (3, 4, 48, 72), dtype=torch.uint8)
    exported, about = open_exported(forms[form])
    assert compare_logits(load_trained(result), exported, images) < 2 * TOLERANCE
    assert (list(about.classes), about.channels) == (list(result.run.edition.classes), "rgbn")
    assert about.colors[1] == "#56b4e9" and about.options == describe_model(result).options


def test_a_wrong_export_is_found(result):
    model, images = load_trained(result), torch.randint(256, (1, 4, 48, 72), dtype=torch.uint8)
    assert compare_logits(model, model, images) == 0
    with pytest.raises(ValueError, match=r"logits of \(1, 4, 48, 72\) are off by 0.0001 of the largest"):
        compare_logits(model, lambda x: model(x) * 1.0001, images)


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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["1 3 64 64", describe_model(result).title], done.stderr
