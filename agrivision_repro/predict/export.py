"""A trained model as one file for other runtimes: from the bytes of an image to logits, for torch.export or ONNX."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, export, load, save

from agrivision_repro.core import how_to_install, replace_file
from agrivision_repro.data.batches import CHANNELS, Statistics
from agrivision_repro.runs.store import Result

TOLERANCE = 1e-4  # of the exported model's logits: relative and absolute
_SHAPES = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


class ByteModel(nn.Module):
    "A model that selects and normalizes its channels itself."

    def __init__(
        self,
        model: nn.Module,  # `(B, 3 or 4, H, W)` to logits
        channels: str,  # its input: a key of `batches.CHANNELS`
        statistics: Statistics,
    ):
        super().__init__()
        chosen = list(CHANNELS[channels])
        self.model, self.chosen = model, chosen
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, 255 * torch.tensor(values)[chosen, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:  # R, G, B, NIR, `(B, 4, H, W)` uint8, to logits `(B, C, H, W)` float32
        return self.model((images[:, self.chosen].float() - self.mean) / self.std)


def export_model(
    result: Result,
    path: Path,  # ends in .pt2 (torch.export) or .onnx
    checkpoint: str = "last",  # or "best"
) -> float:  # largest difference of the exported model's logits from the model's own, on images of two sizes
    "Write a Run's model as one file, and compare it with the model; raises ValueError if a package is missing or they differ."
    writers: dict[str, Callable] = {".pt2": _write_program, ".onnx": _write_onnx}
    if path.suffix not in writers:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}: wanted {' or '.join(writers)}")
    model = ByteModel(result.model(checkpoint), result.run.channels, result.statistics).eval()
    generator, worst = torch.Generator().manual_seed(0), 0.0
    sizes = ((2, 4, 64, 64), (1, 4, 80, 112))
    images = [torch.randint(256, size, dtype=torch.uint8, generator=generator) for size in sizes]
    replace_file(path, lambda fresh: writers[path.suffix](model, images[0], fresh))
    run = open_exported(path)
    with torch.no_grad():
        for x in images:
            own, exported = model(x), run(x)
            worst = max(worst, float((own - exported).abs().max()))
            if not torch.allclose(own, exported, TOLERANCE, TOLERANCE):
                raise ValueError(f"{path}: logits of {tuple(x.shape)} differ by up to {worst:.2g} from the model's own")
    return worst


def open_exported(
    path: Path,  # of `export_model`
) -> Callable[[Tensor], Tensor]:  # bytes `(B, 4, H, W)` to logits `(B, C, H, W)`
    "Load an exported model."
    if path.suffix == ".pt2":
        return load(path).module()
    _need_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _write_program(model: nn.Module, x: Tensor, path: Path) -> None:
    with path.open("wb") as file:
        save(export(model, (x,), dynamic_shapes=(_SHAPES,)), file)


def _write_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    _need_onnx()
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=(_SHAPES,), verbose=False, external_data=False)


def _need_onnx() -> None:
    "Raise ValueError if a package for ONNX is not installed."
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f".onnx needs {', '.join(missing)}: {how_to_install('onnx')}, or choose .pt2")
