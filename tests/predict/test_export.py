"A trained model leaves as one file that takes bytes of any size, and gives the logits of the model."

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agrivision_repro.cli.app import main
from agrivision_repro.data.batches import select_channels
from agrivision_repro.predict.export import export_model, open_exported

ROOT = Path(__file__).resolve().parents[2]


def logits_of(result, images):
    with torch.no_grad():
        return result.model()(select_channels(images, result.run.channels, result.statistics))


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_an_exported_model_gives_the_models_logits(result, ending, tmp_path, monkeypatch, capsys):
    "Through the command; then read in the way of another program, on a third size."
    if ending == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    path = tmp_path / f"net.{ending}"
    words = ["agrivision", "export", result.folder.name, path, "--results", result.folder.path.parents[1]]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and result.run.title in capsys.readouterr().out
    images = torch.randint(256, (3, 4, 48, 72), dtype=torch.uint8)
    torch.testing.assert_close(open_exported(path)(images), logits_of(result, images), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_said(result, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"ends in \.pth: wanted \.pt2 or \.onnx"):
        export_model(result, tmp_path / "net.pth")
    monkeypatch.setattr("agrivision_repro.predict.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.onnx needs onnx, onnxscript, onnxruntime: .*or choose \.pt2"):
        export_model(result, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_torch_hub_loads_the_nets():
    "In a process of its own, from the checkout."
    code = "import torch; net = torch.hub.load('.', 'deeplabv3plus', 3, 18, 'ibn_s', source='local', width=1 / 16, trust_repo=True).eval()"
    code += "; print(*net(torch.zeros(1, 4, 64, 64)).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "3", "64", "64"], done.stderr
