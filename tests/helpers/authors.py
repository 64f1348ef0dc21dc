"The authors' backbones as data: key names, and weights and inputs made from seeds."

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KEYS = json.loads(gzip.decompress((GOLDEN / "backbone_keys.json.gz").read_bytes()))


def backbone_tag(depth: int, norm: str) -> str:
    "Name a backbone as the golden arrays do."
    return f"{depth}-{'none' if norm == 'bn' else norm[-1]}"


def fill(key: str, shape: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    "Make a tensor of a state dict from its own name."
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(int(np.prod(shape))).reshape(shape)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if sum(side > 1 for side in shape) > 1:
        value = z * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        value = np.exp(0.1 * z)
    elif key.endswith(("mean_weight", "var_weight")):
        value = z
    else:
        value = 0.1 * z + (key.split(".")[-1] == "weight")
    return torch.tensor(value, dtype=dtype)


def backbone_state(depth: int, norm: str) -> dict[str, torch.Tensor]:
    "Make a checkpoint under the public key names."
    return {key: fill(key, shape) for key, shape in KEYS[backbone_tag(depth, norm)].items()}


def backbone_input() -> torch.Tensor:
    "Make the input of the golden arrays, `(2, 4, 64, 64)`."
    return torch.tensor(np.random.default_rng(1000).standard_normal((2, 4, 64, 64)).astype(np.float32)).double()


def switch_norm_input(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    "Make input and output gradient of SwitchNorm alone, of a batch of three or of one."
    seed, shape = {"sn3": (10, (3, 6, 5, 7)), "sn1": (8, (1, 4, 8, 8))}[case]
    generator = np.random.default_rng(seed)
    x, gradient = (torch.tensor(generator.standard_normal(shape)) for _ in range(2))
    return (2 * x + 1).requires_grad_(), gradient


def loss_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Make logits `(3, 7, 24, 24)`; read labels (class 0 is background, class 3 absent) and valid pixels."
    shape, arrays = (3, 7, 24, 24), np.load(GOLDEN / "losses.npz")
    generator = np.random.default_rng(50)
    generator.random(shape)  # the labels were drawn from the same stream
    logits = torch.tensor(3 * generator.standard_normal(shape))
    labels, valid = (torch.tensor(np.unpackbits(arrays[name])).bool() for name in ("label", "valid"))
    return logits, labels.view(shape), valid.view(3, 24, 24)
