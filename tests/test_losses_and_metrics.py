"Properties of losses and metrics, and everything that must not upset them."

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from processes import in_two_processes
from sklearn.metrics import average_precision_score
from torch.export import Dim, export
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.wrappers import ClasswiseWrapper

from agrivision_repro.losses import HybridLoss, bce_loss, check_pixels, dice_loss, lovasz_loss, lovasz_weights
from agrivision_repro.metrics import AveragePrecision, ChallengeIoU, MultilabelIoU, rank_code

LOSSES = {
    "bce": bce_loss,
    "bce over valid": lambda *x: bce_loss(*x, over_valid=True),
    "dice": dice_loss,
    "dice per class": lambda *x: dice_loss(*x, per_class=True),
    "lovasz": lovasz_loss,
    "lovasz per image": lambda *x: lovasz_loss(*x, per_image=True),
}
METRICS = {
    "multilabel": MultilabelIoU,
    "challenge": ChallengeIoU,
    "challenge, once": lambda n, **options: ChallengeIoU(n, false_positives="once", **options),
    "gated": lambda n, **options: ChallengeIoU(n, reading="gated", **options),
    "average_precision": AveragePrecision,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_metric = pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
seeds = given(seed=st.integers(0, 2**31), share=st.floats(0, 1))


def draw(seed: int, share: float, shape=(2, 3, 5, 7)):
    "Logits, overlapping labels with background where there is none, valid pixels."
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, dtype=torch.float64, generator=generator)
    targets = torch.rand(shape, generator=generator) < share
    targets[:, 0] = ~targets[:, 1:].any(1)
    return logits, targets, torch.rand(shape[0], *shape[2:], generator=generator) < 0.8


@every_loss
@settings(max_examples=25, deadline=None)
@seeds
def test_order_of_pixels_does_not_matter(loss, seed, share):
    logits, targets, valid = draw(seed, share)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(seed))
    mixed = (x.flatten(-2)[..., order].view(x.shape) for x in (logits, targets, valid))
    torch.testing.assert_close(loss(*mixed), loss(logits, targets, valid), rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@seeds
def test_lovasz_at_whole_errors_is_one_minus_iou(seed, share):
    _, targets, valid = draw(seed, share)
    found = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed + 1)) < share
    scores = (2 * targets.double() - 1) * (found == targets)  # error 0 where right, 1 where wrong
    hits, union = ((mask & valid[:, None]).sum((0, 2, 3)) for mask in (found & targets, found | targets))
    iou = torch.where(union > 0, hits.double() / union, 1.0)
    torch.testing.assert_close(lovasz_loss(scores, targets, valid), (1 - iou).mean(), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@seeds
def test_lovasz_is_the_textbook_form(seed, share):
    logits, targets, valid = draw(seed, share)
    logits.requires_grad_()
    expected = 0
    for c in range(3):
        y, s = targets[:, c][valid].double(), logits[:, c][valid]
        errors, order = (1 - (2 * y - 1) * s).sort(descending=True)
        assume(len(errors.float().unique()) == len(errors))  # errors are ordered as float32; of equal ones any order is right
        jaccard = 1 - (y.sum() - y[order].cumsum(0)) / (y.sum() + (1 - y[order]).cumsum(0))
        expected = expected + errors.relu() @ torch.diff(jaccard, prepend=jaccard.new_zeros(1)) / 3
    ours = lovasz_loss(logits, targets, valid)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@seeds
def test_hybrid_at_zero_is_bce(seed, share):
    pixels = draw(seed, share)
    assert HybridLoss(0, 0)(*pixels) == bce_loss(*pixels)
    assert HybridLoss(0, 0, bce=0.5, bce_over_valid=True)(*pixels) == bce_loss(*pixels, over_valid=True)
    assert HybridLoss(0, 3, bce=0, lovasz_per_image=True)(*pixels) == lovasz_loss(*pixels, per_image=True)


CASES = {
    "absent class": lambda x, y, v: (x, y & (torch.arange(3) != 1)[:, None, None], v),
    "no valid pixel": lambda x, y, v: (x, y, torch.zeros_like(v)),
    "all valid": lambda x, y, v: (x, y, torch.ones_like(v)),
    "one tile without a valid pixel": lambda x, y, v: (x, y, v & torch.tensor([True, False])[:, None, None]),
    "half precision": lambda x, y, v: (x.half(), y, v),
    "bfloat16": lambda x, y, v: (x.bfloat16(), y, v),
    "huge logits": lambda x, y, v: (1e30 * x.float(), y, v),
    "invalid pixels masked by the authors' −32768": lambda x, y, v: (x.float().masked_fill(~v[:, None], -32768), y, v),
}


@every_loss
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_finite(case, loss):
    logits, targets, valid = case(*draw(0, 0.3))
    logits = logits.detach().requires_grad_()
    value = loss(logits, targets, valid)
    value.backward()
    assert value.isfinite() and value.dtype in (torch.float32, torch.float64)
    assert logits.grad.isfinite().all() and logits.grad.dtype == logits.dtype
    assert not (logits.grad * ~valid[:, None]).any()  # nothing pulls at an invalid pixel


@every_loss
def test_a_broken_model_is_not_hidden(loss):
    logits, targets, valid = draw(0, 0.3)
    logits[0, 1, valid[0]] = float("nan")
    assert loss(logits, targets, valid).isnan()


@pytest.mark.parametrize("per_image", [False, True])
def test_hybrid_loss_in_other_tools(per_image):
    "torch.func, torch.compile, torch.export, checkpointing and second derivatives give what eager mode gives."
    logits, targets, valid = draw(0, 0.3)
    logits.requires_grad_()
    loss = HybridLoss(lovasz_per_image=per_image)
    wanted = loss(logits, targets, valid)
    (gradient,) = torch.autograd.grad(wanted, logits, create_graph=True)
    same = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(grad(loss)(logits.detach(), targets, valid), gradient.detach(), **same)
    each = vmap(grad(lambda *pixels: loss(*(x[None] for x in pixels))))(logits.detach(), targets, valid)
    alone = [loss(*(x[k : k + 1] for x in (logits, targets, valid))) for k in range(2)]
    torch.testing.assert_close(each, torch.autograd.grad(sum(alone), logits)[0], **same)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, targets, valid)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits)[0], gradient.detach(), **same)
    kept = checkpoint(loss, logits, targets, valid, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(kept, logits)[0], gradient.detach(), **same)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, targets, valid), logits)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    program = export(loss, (logits, targets, valid), dynamic_shapes=(sizes, sizes, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}))
    for pixels in ((logits, targets, valid), draw(1, 0.3, (3, 3, 8, 7))):
        torch.testing.assert_close(program.module()(*pixels), loss(*pixels), **same)


def test_more_pixels_than_float32_counts():
    "Beyond 2^24, counts in float32 stand still; the weights still add up to the whole IoU and none is lost."
    n = 2**24 + 2**20
    labels = torch.ones(n, dtype=torch.uint8)
    labels[::2] = 0
    weights = lovasz_weights(labels, n // 2)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (weights[1::2] > 0).all()
    torch.testing.assert_close(weights[-1].item() * n, 1.0, rtol=1e-6, atol=0)  # the last label: 1/(P + k), all pixels counted


def precision_by_hand(logits, labels) -> float:
    "Average precision of one class, threshold by threshold."
    steps = [(labels[logits >= t].sum() / labels.sum(), labels[logits >= t].mean()) for t in sorted(set(logits), reverse=True)]
    return sum((recall - before) * precision for (recall, precision), (before, _) in zip(steps, [(0, 0), *steps], strict=False))


def brute_force(make, logits, targets, valid) -> np.ndarray:
    "Count pixel by pixel, by the words of the definition."
    n_classes, metric = logits.shape[1], make(3)
    if isinstance(metric, AveragePrecision):
        rounded = logits.bfloat16().double()
        return np.array([precision_by_hand(rounded[:, c][valid].numpy(), targets[:, c][valid].numpy()) for c in range(n_classes)])
    hits, predicted, present = (np.zeros(n_classes, int) for _ in range(3))
    for b, i, j in valid.nonzero().tolist():
        labels = set(targets[b, :, i, j].nonzero()[:, 0].tolist())
        said = set((logits[b, :, i, j] > 0).nonzero()[:, 0].tolist())
        if isinstance(metric, ChallengeIoU):
            others = [c for c in said if c] if metric.reading == "gated" else range(n_classes)
            chosen = max(others, key=lambda c: logits[b, c, i, j].item(), default=0)
            said = labels if chosen in labels else {chosen}
        times = len(labels) if getattr(metric, "false_positives", "") == "per label" and not said & labels else 1
        for c in range(n_classes):
            hits[c] += c in said and c in labels
            predicted[c] += (c in said) * times
            present[c] += c in labels
    return hits / (predicted + present - hits)


@every_metric
@settings(max_examples=10, deadline=None)
@seeds
def test_metric_by_batches_at_once_and_by_hand(make, seed, share):
    pixels = draw(seed, share)
    whole, parts = make(3), make(3)
    whole.update(*pixels)
    for k in range(2):
        parts.update(*(x[k : k + 1] for x in pixels))
    with np.errstate(invalid="ignore"):
        truth = brute_force(make, *pixels)
    np.testing.assert_allclose(whole.per_class(), truth, rtol=1e-14)
    np.testing.assert_array_equal(parts.per_class(), whole.per_class())
    np.testing.assert_allclose(whole.compute(), np.nanmean(truth) if not np.isnan(truth).all() else np.nan)


@every_metric
def test_absent_classes(make):
    targets = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    targets[:, 0] = True
    logits = torch.where(targets, 1.0, -1.0)
    for absent, mean in ((None, 1), (0.0, 1 / 3), (1.0, 1)):
        metric = make(3, absent=absent)
        metric.update(logits, targets, torch.ones(1, 2, 2, dtype=torch.bool))
        np.testing.assert_array_equal(metric.per_class(), [1, np.nan, np.nan])
        np.testing.assert_allclose(metric.compute(), mean)


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_average_precision_of_torchmetrics_with_ties_and_masked_pixels():
    logits, targets, valid = draw(0, 0.3)
    logits = logits.round().float()
    targets[:, 2] = False
    assert logits.unique().numel() < 20
    metric = AveragePrecision(3)
    metric.update(logits, targets, valid)
    flat = (x.movedim(1, -1)[valid] for x in (logits.sigmoid(), targets.long()))
    exact = multilabel_average_precision(*flat, 3, average="none", thresholds=None).double()
    torch.testing.assert_close(metric.per_class()[:2], exact[:2], rtol=1e-6, atol=0)
    assert metric.per_class()[2].isnan()  # torchmetrics calls it 0


@settings(max_examples=25, deadline=None)
@seeds
def test_average_precision_sees_order_only(seed, share):
    logits, targets, valid = draw(seed, share)
    ranks = logits.bfloat16().unique(return_inverse=True)[1]  # at most 210
    scores = []
    for values in (logits, ranks - 200.0, 2.0 ** (ranks / 4 - 30)):
        metric = AveragePrecision(3)
        metric.update(values, targets, valid)
        scores.append(metric.per_class())
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-12, atol=0, equal_nan=True)


def test_codes_keep_the_order_of_all_bfloat16():
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = bits[~bits.isnan()].float().sort().values
    codes = rank_code(values)
    assert (codes.diff().gt(0) == values.diff().ne(0)).all() and (codes.diff() >= 0).all()
    assert 0 <= codes.min() and codes.max() < 2**16
    assert rank_code(torch.tensor([-0.0])) == rank_code(torch.tensor([0.0]))


def test_average_precision_of_a_constant_is_the_share_of_pixels():
    _, targets, valid = draw(0, 0.3)
    metric = AveragePrecision(3)
    metric.update(torch.full(targets.shape, -1.0), targets, valid)
    torch.testing.assert_close(metric.per_class(), targets.movedim(1, -1)[valid].double().mean(0))


def score_part(rank: int, parts: list) -> dict[str, tuple]:
    metrics = {name: make(3) for name, make in METRICS.items()}
    for part in parts[rank]:
        for metric in metrics.values():
            metric.update(*part)
    return {name: (metric.per_class(), metric.compute(), metric.per_class()) for name, metric in metrics.items()}


def test_metrics_of_two_processes(tmp_path):
    "Unequal shares; each process gives the score of all."
    batches = [draw(seed, 0.3) for seed in range(3)]
    wanted = score_part(0, [batches])
    for found in in_two_processes(score_part, tmp_path, [batches[:1], batches[1:]]):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


BAD = {
    "shapes that differ": (lambda x, y, v: (x, y[:1], v), "both must be"),
    "no batch": (lambda x, y, v: (x[0], y[0], v), "both must be"),
    "another size of valid": (lambda x, y, v: (x, y, v[:, 1:]), "wanted .B, H, W. bool"),
    "valid not boolean": (lambda x, y, v: (x, y, v.float()), "wanted .B, H, W. bool"),
    "labels of 255": (lambda x, y, v: (x, 255 * y.int(), v), "values from 0 to 255: wanted 0 or 1"),
    "soft labels": (lambda x, y, v: (x, 0.5 * y, v), "values from 0.0 to 0.5: wanted 0 or 1"),
}


@pytest.mark.parametrize(("spoil", "says"), BAD.values(), ids=BAD)
def test_bad_pixels(spoil, says):
    spoilt = spoil(*draw(0, 0.3))
    for function in (check_pixels, *LOSSES.values(), HybridLoss(), *(make(3).update for make in METRICS.values())):
        with pytest.raises(ValueError, match=says):
            function(*spoilt)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"dice": -1}, "each must be at least 0"),
        ({"lovasz": float("nan")}, "each must be at least 0"),
        ({"dice": 0, "lovasz": 0, "bce": 0}, "nothing is left to minimize"),
    ],
)
def test_bad_weights(weights, says):
    with pytest.raises(ValueError, match=says):
        HybridLoss(**weights)


def test_bad_reading():
    with pytest.raises(ValueError, match="reading is 'softmax': wanted one of argmax, gated"):
        ChallengeIoU(3, reading="softmax")


def test_bad_overlap_rule():
    with pytest.raises(ValueError, match="false_positives is 'twice': wanted one of per label, once"):
        ChallengeIoU(3, false_positives="twice")


def test_collection_keeps_settings_apart():
    "A MetricCollection merges metrics whose states are equal after the first update, here one without valid pixels."
    metrics = {"0": MultilabelIoU(3), "1": MultilabelIoU(3, threshold=1.0)}
    metrics |= {reading: ChallengeIoU(3, reading=reading) for reading in ("argmax", "gated")}
    collection, alone = MetricCollection(metrics), {name: metric.clone() for name, metric in metrics.items()}
    torch.manual_seed(0)
    for share in (0.0, 0.9):
        logits, targets = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8) < 0.4
        valid = torch.rand(2, 8, 8) < share
        for metric in (collection, *alone.values()):
            metric.update(logits, targets, valid)
    assert collection.compute() == {name: metric.compute() for name, metric in alone.items()}
    assert len(set(map(float, collection.compute().values()))) == 4


def test_average_precision_equals_scikit_learns():
    "On masked pixels with overlapping labels and ties, class by class."
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 16, 16).mul(4).round().div(4)  # ties, exact in bfloat16
    targets, valid = torch.rand(3, 4, 16, 16) < torch.tensor([0.5, 0.2, 0.05, 0.0])[:, None, None], torch.rand(3, 16, 16) < 0.7
    metric = AveragePrecision(4)
    metric.update(logits, targets, valid)
    wanted = [average_precision_score(targets[:, k][valid].numpy(), logits[:, k][valid].numpy()) for k in range(3)]
    torch.testing.assert_close(metric.per_class()[:3], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)
    assert metric.per_class()[3].isnan()
    assert abs(float(metric.compute()) - sum(wanted) / 3) < 1e-12


@every_metric
def test_classwise_and_plot(make):
    "torchmetrics' wrapper for one value per class, and its picture."
    pixels = draw(0, 0.3)
    metric = make(3, average=None)
    named = ClasswiseWrapper(metric.clone(), labels=["background", "water", "weeds"], prefix="iou_")
    for one in (metric, named):
        one.update(*pixels)
    torch.testing.assert_close(list(named.compute().values()), list(metric.per_class()), rtol=0, atol=0)
    assert list(named.compute()) == ["iou_background", "iou_water", "iou_weeds"]
    mean = make(3)
    values = [mean(*pixels), mean(*draw(1, 0.3))]
    torch.testing.assert_close(values[0], metric.compute().nanmean())
    for figure, axes in (mean.plot(), mean.plot(values), metric.plot(), named.plot()):
        assert axes.has_data()
        plt.close(figure)
    with pytest.raises(ValueError, match="average is 'micro': wanted one of macro, none, None"):
        make(3, average="micro")
