"Our modules compute what the authors' published modules compute."

import numpy as np
import pytest
import torch
from authors import GOLDEN, backbone_input, backbone_state, backbone_tag, fill, loss_input, switch_norm_input

from agrivision_repro.losses import HybridLoss, bce_loss, dice_loss, lovasz_loss
from agrivision_repro.metrics import ChallengeIoU, MultilabelIoU
from agrivision_repro.models.backbones import create_backbone, last_activation, load_matching, widen_stem
from agrivision_repro.models.norms import SwitchNorm2d
from agrivision_repro.study.paper import PAPER_NORMS

SWITCH_NORM = np.load(GOLDEN / "switchnorm.npz")
BACKBONES = np.load(GOLDEN / "backbones.npz")
LOSSES = np.load(GOLDEN / "losses.npz")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", ["sn3", "sn1"])
def test_switch_norm(case, mode):
    x, gradient = switch_norm_input(case)
    norm = SwitchNorm2d(x.shape[1]).double().train(mode == "train")
    norm.load_state_dict({k: fill(k, list(v.shape), v.dtype) for k, v in norm.state_dict().items()})
    y = norm(x)
    y.backward(gradient)
    got = {"y": y, "gx": x.grad} | {f"g-{k.removeprefix('BN.')}": p.grad for k, p in norm.named_parameters()}
    if mode == "eval":  # running statistics after a training step are compared in test_backbone
        got |= {f"b-{k}": b for k, b in norm.state_dict().items() if k.startswith("running")}
    for name, value in got.items():
        wanted = SWITCH_NORM[f"{case}-{mode}-{name}"]
        np.testing.assert_allclose(value.detach().numpy().ravel(), wanted.ravel(), rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("norm", PAPER_NORMS)
@pytest.mark.parametrize("depth", [50, 101])
def test_backbone(depth, norm):
    "Every ReLU layer and the output, in training and evaluation, in float64, with the same weights under the public key names."
    model = create_backbone(depth, norm)
    report = load_matching(model, backbone_state(depth, norm))
    assert not report.skipped and not report.fresh
    model, tag = widen_stem(model).double(), f"r{backbone_tag(depth, norm)}"
    for mode in ("eval", "train"):
        seen, prefix = [], f"{tag}-{mode}-"
        blocks = [b for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for b in stage]
        last = [model.act1, *(getattr(block, last_activation(block)) for block in blocks)]
        hooks = [m.register_forward_hook(lambda m, i, out, seen=seen: seen.append((out.mean(), out.std()))) for m in last]
        with torch.no_grad():
            out = model.train(mode == "train")(backbone_input())
        for hook in hooks:
            hook.remove()
        for name, got in zip(("relu_mean", "relu_std"), zip(*seen, strict=True), strict=True):
            np.testing.assert_allclose(torch.stack(got), BACKBONES[prefix + name], rtol=1e-9)
        np.testing.assert_allclose(out[:, ::256], BACKBONES[prefix + "out"], rtol=1e-9, atol=1e-9)
    state = model.state_dict()
    for key in (k for k in BACKBONES.files if k.startswith(f"{tag}-train-layer")):
        np.testing.assert_allclose(state[key.split("-train-")[1]].flatten(), BACKBONES[key].ravel(), rtol=1e-9, atol=1e-12)


def test_losses_and_metrics():
    logits, targets, valid = loss_input()
    logits.requires_grad_()
    for name, loss, tolerance in (("bce", bce_loss, 1e-10), ("dice", dice_loss, 1e-10), ("lovasz", lovasz_loss, 1e-6)):
        value = loss(logits, targets, valid)
        (gradient,) = torch.autograd.grad(value, logits)
        np.testing.assert_allclose(value.item(), LOSSES[f"loss-{name}"], rtol=tolerance, err_msg=name)
        np.testing.assert_allclose(gradient.ravel()[::16], LOSSES[f"loss-{name}-grad"], atol=tolerance, err_msg=name)
    hybrid = HybridLoss(1, 1)(logits, targets, valid).item()
    np.testing.assert_allclose(hybrid, LOSSES["loss-hybrid11"], rtol=1e-6)  # their Lovász is float32
    multilabel, challenge = MultilabelIoU(7), ChallengeIoU(7)
    for metric in (multilabel, challenge):
        metric.update(logits.detach(), targets, valid)
    np.testing.assert_allclose(multilabel.per_class(), LOSSES["metric-multilabel-iou"], rtol=1e-12)
    np.testing.assert_array_equal(challenge.confusion, LOSSES["metric-challenge-confusion"])
    np.testing.assert_allclose(challenge.per_class(), LOSSES["metric-challenge-iou"], rtol=1e-12)
