"Our modules compute what the authors' published modules compute."

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from agrivision_repro.backbones import NORMS, create_backbone, load_matching, widen_stem
from agrivision_repro.losses import HybridLoss, bce_loss, dice_loss, lovasz_loss
from agrivision_repro.metrics import ChallengeIoU, MultilabelIoU
from agrivision_repro.norms import SwitchNorm2d

SMALL = np.load(Path(__file__).parent / "golden" / "switchnorm.npz")
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"  # 0.8 MB, beside a developer's checkout only
needs_all = pytest.mark.skipif(not FOLDER.is_dir(), reason="the authors' full arrays are not beside this checkout")


def fill(key: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    "Make a tensor of a state dict from its own name."
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(int(np.prod(shape))).reshape(shape)
    if key.endswith("num_batches_tracked"):
        value = np.zeros(shape)
    elif sum(side > 1 for side in shape) > 1:
        value = z * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        value = np.exp(0.1 * z)
    elif key.endswith(("mean_weight", "var_weight")):
        value = z
    else:
        value = 0.1 * z + (key.split(".")[-1] == "weight")
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", ["sn3", "sn1"])
def test_switch_norm(case, mode):
    x = torch.tensor(SMALL[f"{case}-train-x"], dtype=torch.float64, requires_grad=True)
    norm = SwitchNorm2d(x.shape[1]).double().train(mode == "train")
    norm.load_state_dict({k: fill(k, list(v.shape), v.dtype) for k, v in norm.state_dict().items()})
    y = norm(x)
    y.backward(torch.tensor(SMALL[f"{case}-train-gout"], dtype=torch.float64))
    got = {"y": y, "gx": x.grad} | {f"g-{k}": p.grad for k, p in norm.named_parameters()}
    if mode == "eval":  # the arrays hold no buffers of a training step here; test_backbone compares those
        got |= {f"b-{k}": b for k, b in norm.named_buffers()}
    for name, value in got.items():
        wanted = SMALL[f"{case}-{mode}-{name}"]
        np.testing.assert_allclose(value.detach().numpy().ravel(), wanted.ravel(), rtol=1e-10, atol=1e-10, err_msg=name)


@needs_all
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [50, 101])
def test_backbone(depth, norm):
    "Every ReLU layer and the output, in training and evaluation, in float64, with the same weights under the public key names."
    arrays, tag = np.load(FOLDER / "authors.npz"), f"{depth}-{'none' if norm == 'bn' else norm[-1]}"
    keys = json.loads((FOLDER / "backbone_keys.json").read_text())[tag]
    model = create_backbone(depth, norm)
    report = load_matching(model, {k: fill(k, shape, torch.float32) for k, shape in keys.items()})
    assert not report.skipped and not report.fresh
    model = widen_stem(model).double()
    for mode in ("eval", "train"):
        seen, prefix = [], f"r{tag}-{mode}-"
        blocks = [b for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for b in stage]
        last = [model.act1, *(block.act3 for block in blocks)]
        hooks = [m.register_forward_hook(lambda m, i, out, seen=seen: seen.append((out.mean(), out.std()))) for m in last]
        with torch.no_grad():
            out = model.train(mode == "train")(torch.tensor(arrays["input"]).double())
        for hook in hooks:
            hook.remove()
        for name, got in zip(("relu_mean", "relu_std"), zip(*seen, strict=True), strict=True):
            np.testing.assert_allclose(torch.stack(got), arrays[prefix + name], rtol=1e-9)
        np.testing.assert_allclose(out[:, ::64], arrays[prefix + "out"], rtol=1e-9, atol=1e-9)
    state = model.state_dict()
    for key in (k for k in arrays.files if k.startswith(f"r{tag}-train-layer")):
        np.testing.assert_allclose(state[key.split("-train-")[1]].flatten(), arrays[key].ravel(), rtol=1e-9, atol=1e-12)


@needs_all
def test_losses_and_metrics():
    arrays = np.load(FOLDER / "authors.npz")
    logits = torch.tensor(arrays["loss-logit"]).double().requires_grad_()
    targets, valid = torch.tensor(arrays["loss-label"]) > 0, torch.tensor(arrays["loss-valid"]) > 0
    targets = targets & valid[:, None]
    for name, loss, tolerance in (("bce", bce_loss, 1e-10), ("dice", dice_loss, 1e-10), ("lovasz", lovasz_loss, 1e-6)):
        value = loss(logits, targets, valid)
        (gradient,) = torch.autograd.grad(value, logits)
        np.testing.assert_allclose(value.item(), arrays[f"loss-{name}"], rtol=tolerance, err_msg=name)
        np.testing.assert_allclose(gradient, arrays[f"loss-{name}-grad"], atol=tolerance, err_msg=name)
    hybrid = HybridLoss(1, 1)(logits, targets, valid)["loss"].item()
    np.testing.assert_allclose(hybrid, arrays["loss-hybrid11"], rtol=1e-6)
    multilabel, challenge = MultilabelIoU(7), ChallengeIoU(7)
    for metric in (multilabel, challenge):
        metric.update(logits.detach(), targets, valid)
    np.testing.assert_allclose(multilabel.per_class(), arrays["metric-multilabel-iou"], rtol=1e-12)
    np.testing.assert_array_equal(challenge.confusion, arrays["metric-challenge-confusion"])
    np.testing.assert_allclose(challenge.per_class(), arrays["metric-challenge-iou"], rtol=1e-12)
