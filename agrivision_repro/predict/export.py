"""A trained model as one file for other runtimes: from the bytes of an image to logits, for torch.export or ONNX."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, export, load, save

from agrivision_repro.core import check_choice, how_to_install, move_file, replace_file
from agrivision_repro.data.tiles import BadFile
from agrivision_repro.predict.trained import About, TrainedModel, load_trained
from agrivision_repro.predict.windows import Predictor
from agrivision_repro.runs.store import Result
from agrivision_repro.training.engine import make_engine
from agrivision_repro.training.evaluate import TTA

TOLERANCE = 1e-5  # of the exported model's logits: a share of the largest one
_SHAPES = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
_KEY = "agrivision_repro.json"  # of the `About` in a file's metadata


def export_model(
    result: Result,
    path: Path,  # ends in .pt2 (torch.export) or .onnx
    checkpoint: str = "last",  # or "best"
) -> float:  # largest difference of the exported model's logits from the model's own, on images of two sizes; share of the largest
    "Write a Run's model as one file if it agrees with the model; raise ValueError if not, or if a package is missing."
    if path.suffix not in WRITERS:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}: wanted {' or '.join(WRITERS)}")
    model, generator = load_trained(result, checkpoint), torch.Generator().manual_seed(0)
    images = [torch.randint(256, size, dtype=torch.uint8, generator=generator) for size in ((2, 4, 64, 64), (1, 4, 80, 112))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=path.parent) as workshop:
        made = Path(workshop) / path.name
        replace_file(made, lambda fresh: WRITERS[path.suffix](model, images[0], fresh))
        exported = open_exported(made)[0]
        worst = max(compare_logits(model, exported, x) for x in images)
        move_file(made, path)
    return worst


@torch.no_grad()
def compare_logits(
    model: TrainedModel,
    exported: Callable[[Tensor], Tensor],
    images: Tensor,  # `(B, 4, H, W)` uint8
) -> float:  # largest difference of the two models' logits, a share of the largest logit
    "Compare an exported model with its source; raise ValueError if it is less accurate."
    own, found, exact = model(images), exported(images), copy.deepcopy(model).double()(images)
    scale, error = exact.abs().max(), (found - exact).abs().max()
    # The runtimes add in different orders. In a deep net that has learned little, rounding a single time the input alone changes the
    # logits by 1e-5 of the largest: so the yardstick is the model itself in float64, and PyTorch's own error from it, doubled.
    if not error <= max(TOLERANCE * scale, 2 * (own - exact).abs().max()):
        sizes, share = tuple(images.shape), float(error / scale)
        raise ValueError(f"the exported model's logits of {sizes} are off by {share:.1g} of the largest, more than rounding explains")
    return float((found - own).abs().max() / scale)


def open_exported(
    path: Path,  # of `export_model`
) -> tuple[Callable[[Tensor], Tensor], About]:  # bytes `(B, 4, H, W)` to float32 logits `(B, C, H, W)`, on the CPU; its description
    "Load an exported model; raise ValueError for any other file."
    if path.suffix == ".onnx":
        _need_onnx()
    try:
        run, text = (_open_onnx if path.suffix == ".onnx" else _open_program)(path)
        return run, About(**json.loads(text))
    except Exception as error:  # a stranger's file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} has no model with channels and classes ({reason}): write it with agrivision export") from error


def open_predictor(
    path: Path,  # a file of `export_model`, which computes in float32 on the CPU, or a folder of `share_run`
    checkpoint: str = "last",
    tta: str = "none",  # a key of `training.evaluate.TTA`
    channels: str = "",
    device: str = "auto",  # as in `training.engine.make_engine`
    precision: str = "auto",
) -> Predictor:
    "Open a model that left its Run: checkpoint and channels can no longer be chosen."
    check_choice("tta", tta, tuple(TTA))
    check_choice("checkpoint (chosen by agrivision share or export)", checkpoint, ("last",))
    if path.is_dir():
        engine = make_engine(device, precision)
        model = TrainedModel.from_pretrained(path).to(engine.device)
        about = model.about
    else:
        check_choice("precision of an exported model", precision, ("auto", "float32"))
        (model, about), engine = open_exported(path), make_engine("cpu", "float32")
    check_choice("channels", channels or about.channels, (about.channels,))
    return Predictor(model, about, engine, tta)


def _open_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map[_KEY]
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), text


def _open_program(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    "Load a torch.export program, parts of which are unpickled: a stranger's file can run code."
    texts = {_KEY: ""}
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it logs the traceback of what it raises
    program = load(path, extra_files=texts).module()

    def run(x: Tensor) -> Tensor:
        try:
            return program(x)
        except AssertionError as error:  # torch.export guards sizes; those below a feature map of two pixels fail
            size = f"{x.shape[3]}×{x.shape[2]} pixels ({error})"
            raise BadFile("wrong size", f"{path} cannot predict {size}: use an .onnx file or a folder of agrivision share") from error

    return run, texts[_KEY]


def _write_program(model: TrainedModel, x: Tensor, path: Path) -> None:
    with path.open("wb") as file:
        save(export(model, (x,), dynamic_shapes=(_SHAPES,)), file, extra_files={_KEY: json.dumps(asdict(model.about))})


def _write_onnx(model: TrainedModel, x: Tensor, path: Path) -> None:
    _need_onnx()
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(_SHAPES,), verbose=False)
    program.model.metadata_props[_KEY] = json.dumps(asdict(model.about))
    program.save(path, external_data=False)


WRITERS: dict[str, Callable] = {".pt2": _write_program, ".onnx": _write_onnx}


def _need_onnx() -> None:
    "Raise ValueError if a package for ONNX is not installed."
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f".onnx needs {', '.join(missing)}: {how_to_install('onnx')}, or choose .pt2")
