"""Tensors in a safetensors file with a checksum, written whole."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agrivision_repro.core import replace_file


def tensor_checksum(tensors: dict[str, Tensor]) -> str:
    "Compute a checksum of the bytes of tensors in the order of their names."
    total = 0
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        total = zlib.crc32(flat.view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def save_tensors(
    tensors: dict[str, Tensor],
    path: Path,
    **metadata: int,
) -> None:
    "Write tensors, replacing the file atomically."
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    described = json.dumps({"checksum": tensor_checksum(tensors), **metadata})
    replace_file(path, lambda fresh: save_file(tensors, fresh, {"record": described}))  # one entry: the order of several is not defined


def read_tensors(
    path: Path,
) -> tuple[dict[str, Tensor], dict]:  # tensors and metadata
    "Load a file written by `save_tensors`; raise ValueError for any other file or a damaged one."
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = read_metadata(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): remove it to restart its run") from error
    if metadata["checksum"] != tensor_checksum(tensors):
        raise ValueError(f"{path} is damaged, its checksum differs from the saved one: remove it to restart its run")
    return tensors, metadata


def read_metadata(path: Path) -> dict:
    "Load the metadata without the tensors."
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["record"])
