"A workspace refuses a mistake in a line before it writes, scores only the data of the training, and leaves the user's folders."

import pytest
import torch

from agrivision_repro.runs.workspace import Workspace


@pytest.mark.parametrize(("kind", "is_gpu"), [("mps", False), ("cuda", True)])
def test_apples_gpu_is_not_used(kind, is_gpu, monkeypatch, tmp_path):
    "It has no float64."
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    workspace = Workspace(tmp_path)
    assert workspace.on_gpu == is_gpu and not Workspace(tmp_path, device="cpu").on_gpu
    assert is_gpu or workspace.torch_device.type == "cpu"
