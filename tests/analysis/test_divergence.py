"The divergence is the authors' numbers, whatever the batches, processes, layout and model; and says what is wrong with its input."

import re

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch
import timm
import torch
import torchvision
from authors import GOLDEN
from processes import in_two_processes
from torch import nn

from agrivision_repro.analysis import divergence as module
from agrivision_repro.analysis import moments
from agrivision_repro.analysis.divergence import (
    TRUST,
    bootstrap,
    compare,
    divergence,
    divergence_by_class,
    domain_error,
    draw_divergence,
    find_places,
    null_and_p,
    permuted_divergence,
)
from agrivision_repro.analysis.moments import LayerReader, batch_mean, find_relu_layers, measure, sample_moments, symmetric_kl
from agrivision_repro.models.backbones import NORMS, create_backbone, last_activation
from agrivision_repro.models.deeplab import DeepLabV3Plus

ARRAYS = np.load(GOLDEN / "divergence.npz")
ESTIMATORS = ("sample", "pixel", batch_mean(4))


def small_network(seed: int = 0) -> nn.Sequential:
    "Random weights in float64; the last block's ReLU has channels that seldom fire."
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    return nn.Sequential(first, nn.Conv2d(6, 9, 3), nn.ReLU(inplace=True), nn.Conv2d(9, 4, 1)).double().eval()


LAYERS = ["0", "2"]


def streams(n_a: int = 13, n_b: int = 11, size: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(n, 3, size, size + 3, dtype=torch.float64, generator=generator) for n in (n_a, n_b))
    return a + torch.randn(n_a, 3, 1, 1, dtype=torch.float64, generator=generator), 1.3 * b + 0.4


def values_of(activation: torch.Tensor, estimator: str) -> torch.Tensor:  # `(values, C)`
    "The values whose variance an estimator takes, from an activation that is kept whole."
    if estimator == "pixel":
        return activation.movedim(1, -1).flatten(0, -2)
    n = 1 if estimator == "sample" else int(re.search(r"\d+", estimator)[0])
    return torch.stack([part.mean((0, 2, 3)) for part in activation.split(n)])


def brute_force(a: torch.Tensor, b: torch.Tensor, estimator: str) -> tuple[float, int]:
    "Divergence of two activations that are kept whole, and dead channels, in NumPy."
    (mean_a, var_a), (mean_b, var_b) = ((v.mean(0), v.var(0, ddof=1)) for v in (values_of(x, estimator).numpy() for x in (a, b)))
    alive = (var_a > 0) & (var_b > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        forth = np.log(np.sqrt(var_b / var_a)) + (var_a + (mean_a - mean_b) ** 2) / (2 * var_b) - 0.5
        back = np.log(np.sqrt(var_a / var_b)) + (var_b + (mean_a - mean_b) ** 2) / (2 * var_a) - 0.5
    return (forth + back)[alive].mean(), int((~alive).sum())


def activations(model: nn.Module, x: torch.Tensor, layers: list[str]) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, out: kept.__setitem__(name, out.clone())

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("size", [1, 3, 13])
@pytest.mark.parametrize(("estimator", "key"), [("sample", "sample"), ("pixel", "pixel"), ("batch_mean(4)", "4")])
def test_golden(estimator, key, size):
    "Features go through a model that does nothing, in batches of several sizes."
    model = nn.Sequential(nn.Identity()).eval()
    a, b = (measure(model, torch.from_numpy(ARRAYS[f"div-{s}"]).split(size), ["0"], (estimator,)).moments[estimator] for s in "ab")
    np.testing.assert_allclose(a.mean, ARRAYS[f"div-{key}-mean_a"], rtol=1e-9)
    np.testing.assert_allclose(a.var, ARRAYS[f"div-{key}-var_a"], rtol=1e-9)
    np.testing.assert_allclose(symmetric_kl(a.mean, a.var, b.mean, b.var), ARRAYS[f"div-{key}-d"], rtol=1e-9)
    assert a.var[3] == 0  # dead in A: the authors' script would divide by it


def test_golden_layer():
    "Eq. 3 over the four living channels."
    model = nn.Sequential(nn.Identity()).eval()
    a, b = (torch.from_numpy(ARRAYS[f"div-{s}"]).split(5) for s in "ab")
    table = divergence(model, a, b, ["0"], ESTIMATORS)
    for estimator, key in zip(ESTIMATORS, ("sample", "pixel", "4"), strict=True):
        row = table[table.estimator == estimator].iloc[0]
        assert (row.dead, row.channels) == (1, 5)
        np.testing.assert_allclose(row.divergence, np.delete(ARRAYS[f"div-{key}-d"], 3).mean(), rtol=1e-9)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 5), (4, 3), (13, 11)])
def test_stream_equals_brute_force(sizes):
    "All activations kept, all samples in one batch, is the truth; the stream may be cut anyhow."
    model, (a, b) = small_network(), streams()
    table = divergence(model, a.split(sizes[0]), b.split(sizes[1]), LAYERS, ESTIMATORS).set_index(["estimator", "layer"])
    kept = [activations(model, x, LAYERS) for x in (a, b)]
    for estimator in ESTIMATORS:
        for layer in LAYERS:
            wanted, dead = brute_force(kept[0][layer], kept[1][layer], estimator)
            np.testing.assert_allclose(table.loc[(estimator, layer), "divergence"], wanted, rtol=1e-9)
            assert table.loc[(estimator, layer), "dead"] == dead


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 17, 19), (2, 300, 40, 41), (2, 4, 1, 1)])
def test_moments_are_exact_in_any_layout(shape, dtype, layout, monkeypatch):
    "Sums are float64 even for halves; an offset costs nothing; the activation is left as it was; pieces of every size."
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 50).to(dtype).to(memory_format=layout)
    before = x.clone()
    for chunk in (1, 1000, 2**18):
        monkeypatch.setattr(moments, "CPU_CHUNK", chunk if x.numel() < 10_000 or chunk > 1 else 7000)
        got = sample_moments(x)
        wide = x.double()
        torch.testing.assert_close(got.mean, wide.mean((2, 3)), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.m2, wide.var((2, 3), correction=0) * shape[2] * shape[3], rtol=1e-9, atol=1e-9)
    assert torch.equal(x, before)


def test_constant_channel_is_exactly_dead():
    "0.1 has no exact float: sums of it must not leave a trace of variance, whatever the number of pixels and samples."
    model = nn.Sequential(nn.Identity()).eval()
    x = torch.full((7, 2, 9, 11), 0.1)
    x[:, 1] = torch.randn(7, 9, 11)
    for estimator in ("sample", "pixel", batch_mean(2), batch_mean(3)):
        table = divergence(model, x.split(3), x.flip(0).split(2), ["0"], estimator)
        assert table.dead[0] == 1
        assert np.isfinite(table.divergence[0])


def test_dead_channels_matter():
    "Dead in A, in B, and in both; a whisper of variance decides unless eps calls it dead."
    model = nn.Sequential(nn.Identity()).eval()
    a, b = (torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    a[:, 0] = 0
    b[:, 1] = 0
    a[:, 3] *= 1e-4
    plain = divergence(model, [a], [b], ["0"]).iloc[0]
    strict = divergence(model, [a], [b], ["0"], eps=1e-6).iloc[0]
    assert (plain.dead, strict.dead) == (2, 3)
    assert plain.divergence > 1e5 > 100 > strict.divergence
    silent = divergence(model, [a * 0], [b], ["0"]).iloc[0]
    assert silent.dead == 4 and np.isnan(silent.divergence)


def test_masked_pixels_do_not_count():
    "What lies outside may hold anything; a sample without a valid pixel is no sample."
    model = nn.Sequential(nn.Identity()).eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 3, 6, 8, dtype=torch.float64, generator=generator)
    valid = torch.rand(5, 6, 8, generator=generator) < 0.6
    valid[3] = False
    spoilt = torch.where(valid[:, None], x, 1e6)
    found = measure(model, zip(spoilt.split(2), valid.split(2), strict=True), ["0"], ("sample", "pixel", batch_mean(2)), keep_samples=True)
    inside = [x[k][:, valid[k]] for k in (0, 1, 2, 4)]
    means = torch.stack([v.mean(1) for v in inside])
    pairs = torch.stack([torch.cat(inside[:2], 1).mean(1), inside[2].mean(1), inside[3].mean(1)])
    for estimator, values in (("sample", means), ("pixel", torch.cat(inside, 1).T), (batch_mean(2), pairs)):
        moments = found.moments[estimator]
        torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.var, values.var(0), rtol=1e-9, atol=1e-9)
    assert torch.cat(found.sample_means)[3].isnan().all() and torch.cat(found.sample_means)[[0, 1, 2, 4]].isfinite().all()
    full = [(x, torch.ones(5, 6, 8, dtype=torch.bool))]
    torch.testing.assert_close(measure(model, full, ["0"]).moments["sample"], measure(model, [x], ["0"]).moments["sample"])


def test_mask_follows_the_stride():
    "A left half that is invalid leaves the right half of a layer at half the resolution."
    model = nn.Sequential(nn.AvgPool2d(2)).eval()
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    valid = torch.zeros(4, 8, 8, dtype=torch.bool)
    valid[..., 4:] = True
    got = measure(model, [(x, valid)], ["0"], ("pixel",)).moments["pixel"]
    wanted = model(x)[..., 2:].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(got.var, wanted.var(0), rtol=1e-12, atol=0)


def read_shares(rank: int, cuts: list) -> list[dict]:
    found = []
    for shares in cuts:
        batches_a, batches_b = ([x for x in stream[rank] if len(x)] for stream in shares)
        a, b = (measure(small_network(), batches, LAYERS, ESTIMATORS, True) for batches in (batches_a, batches_b))
        table = compare(a, b, n_resamples=20).to_dict("list")
        found.append({"moments": {e: tuple(m) for e, m in a.moments.items()}, "table": table})
    return found


def test_two_processes_are_one(tmp_path):
    "Shares of unequal size, whole groups of the batch_mean each; one process may have nothing."
    a, b = streams()
    cuts = [[[list(x[:cut].split(3)), list(x[cut:].split(3))] for x in (a, b)] for cut in (8, 0)]
    alone = [measure(small_network(), x.split(5), LAYERS, ESTIMATORS, True) for x in (a, b)]
    wanted = compare(*alone, n_resamples=20)
    for first, second in zip(*in_two_processes(read_shares, tmp_path, cuts), strict=True):
        pd.testing.assert_frame_equal(*(pd.DataFrame(part["table"]) for part in (first, second)), check_exact=True)
        for estimator, own in alone[0].moments.items():
            torch.testing.assert_close(first["moments"][estimator], tuple(own), rtol=1e-9, atol=1e-12)
        for column in ("divergence", "median_channel", *TRUST):
            np.testing.assert_allclose(first["table"][column], wanted[column], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [18, 50, 101])
def test_relu_layers_of_our_models(depth, norm):
    "Stem and block outputs are what the stem's and each block's last activation give."
    model = DeepLabV3Plus(3, depth, norm, in_chans=3, width=1 / 16).eval()
    layers = find_relu_layers(model)
    assert len(layers) == {18: 9, 50: 17, 101: 34}[depth]
    assert layers[0] == "backbone.act1" and layers[-1].startswith("backbone.layer4.")
    if depth == 101:
        return
    blocks = [model.get_submodule(name) for name in layers[1:]]
    last = layers[:1] + [f"{name}.{last_activation(block)}" for name, block in zip(layers[1:], blocks, strict=True)]
    kept = activations(model, torch.randn(1, 3, 64, 64), layers + last)
    for block, activation in zip(layers, last, strict=True):
        assert torch.equal(kept[block], kept[activation]) and kept[block].min() >= 0


def test_torchvision_equals_timm():
    "A block of torchvision calls one ReLU three times; the same weights in timm give the same table."
    torch.manual_seed(0)
    theirs, ours = torchvision.models.resnet50(width_per_group=4).eval(), timm.create_model("resnet50", base_width=4).eval()
    ours.load_state_dict(theirs.state_dict())
    a, b = (torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(k)) + k for k in (0, 1))
    tables = [divergence(model, a.split(3), b.split(2), estimator=("sample", "pixel")) for model in (theirs, ours)]
    assert [len(t) for t in tables] == [34, 34] and tables[0].layer[0] == "relu"
    np.testing.assert_allclose(tables[0].divergence, tables[1].divergence, rtol=1e-9)
    parts = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer4": "out"})
    assert find_relu_layers(parts) == find_relu_layers(theirs)
    with pytest.raises(ValueError, match="layer layer1.0.relu runs more than once per pass: use the module that contains it"):
        divergence(theirs, [a], [b], r".*relu")


def test_resnet_inside_models_of_other_libraries():
    models = {
        "act1": timm.create_model("resnet50", features_only=True),
        "encoder.relu": segmentation_models_pytorch.Unet("resnet50", encoder_weights=None),
        "encoder.model.act1": segmentation_models_pytorch.Unet("tu-resnet50", encoder_weights=None),
        "backbone.relu": torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None),
    }
    for stem, model in models.items():
        x = torch.randn(2, 3, 32, 32)
        table = divergence(model.eval(), [x], [x])
        assert (len(table), table.layer[0]) == (17, stem)
        assert table.divergence.dropna().abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "layers"),
    [("mobilenetv3_small_050", r"blocks\.\d+\.\d+"), ("convnext_atto", lambda name, m: type(m).__name__ == "ConvNeXtBlock")],
)
def test_models_of_other_kinds(name, layers):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    a, b = (torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    table = divergence(model, a.split(2), [b], layers)
    assert table.depth.tolist() == list(range(len(table))) and len(table) > 8
    assert (table.divergence > 0).all()
    kept = [activations(model, x, table.layer.tolist()) for x in (a, b)]
    wanted = [brute_force(*(k[layer].double() for k in kept), "sample")[0] for layer in table.layer]
    np.testing.assert_allclose(table.divergence, wanted, rtol=1e-3)  # a batch of 2 and one of 3 run other float32 kernels


def test_tokens_have_their_channels_last():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=2).eval()
    a, b = (torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    table = divergence(model, [a], [b], r"blocks\.\d", channel_dim=-1)
    kept = [activations(model, x, ["blocks.1"])["blocks.1"].double() for x in (a, b)]
    assert table.channels.tolist() == [24, 24]
    np.testing.assert_allclose(table.divergence[1], brute_force(*(k.movedim(-1, 1)[..., None] for k in kept), "sample")[0], rtol=1e-9)


def test_network_runs_no_further_than_asked():
    "From the second batch on; hooks go when reading ends, also by an error."
    model, (a, b) = small_network(), streams(6, 6)
    runs = []
    model[3].register_forward_hook(lambda *_: runs.append(1))
    divergence(model, a.split(2), b.split(2), ["2"])
    assert len(runs) == 2  # the first batch of each stream
    with pytest.raises(ValueError, match="finite"):
        divergence(model, [a / 0], [b], ["2"])
    with pytest.raises(RuntimeError), LayerReader(model, ["0"]) as reader:
        reader(a[:, :2])
    assert not any(model.get_submodule(name)._forward_hooks for name in ("0", "2"))


class Odd(nn.Module):
    "A layer that gives two tensors, and one that never runs."

    def __init__(self):
        super().__init__()
        self.pair, self.idle, self.flat = nn.LSTM(4, 4), nn.ReLU(), nn.Flatten(0)

    def forward(self, x):
        self.flat(x)
        return self.pair(x.flatten(1)[..., :4])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": ["0.3"]}, r"no layer of the model matches 0\.3: wanted module names such as 0\."),
        ({"layers": "nothing.*"}, r"matches nothing\.\*"),
        ({"layers": []}, "matches an empty list"),
        ({"layers": None}, "Sequential contains no ResNet .* name layers, its modules are 0, 1, 2, 3"),
        ({"batches_b": [torch.randn(4, 4, 20, 20).double()]}, "inputs have 3 channels, then 4: both streams must have as many"),
        ({"batches_a": [torch.randn(1, 3, 20, 20).double()]}, "batches_a has 1 samples: a variance needs 2 or more"),
        ({"batches_b": iter([])}, "batches_b has 0 samples.*an iterator can be read only once"),
        ({"estimator": batch_mean(8)}, r"batches_a has 6 samples and so 1 values for batch_mean\(8\): wanted 2 or more"),
        ({"estimator": "batch"}, r"estimator is 'batch': wanted sample, pixel or batch_mean\(n\)"),
        ({"estimator": "pixel", "n_resamples": 5}, "n_resamples requires sample among them"),
        ({"batches_b": [torch.randn(4, 3, 20, 20).double()], "n_resamples": 5, "paired": True}, "6 and 4 samples are not pairs"),
        ({"batches_a": [torch.full((2, 3, 20, 20), torch.inf).double()]}, "layer 0 returns values that are not finite"),
        (
            {"batches_a": [(torch.randn(2, 3, 20, 20).double(), torch.tensor([1, 0]))]},
            r"a batch has torch.int64 \(2,\): wanted x, or \(x, valid\)",
        ),
    ],
)
def test_bad_input(arguments, says):
    a, b = streams(6, 6)
    given = {"batches_a": [a], "batches_b": [b], "layers": LAYERS} | arguments
    with pytest.raises(ValueError, match=says):
        divergence(small_network(), **given)


def test_bad_layers():
    x = torch.randn(3, 1, 2, 2)
    for layer, says in (
        ("pair", r"layer pair returns a tuple: wanted one floating tensor \(3, C, …\)"),
        ("idle", "layer idle does not run in the model's forward pass"),
        ("flat", r"layer flat returns torch.float32 \(12,\)"),
    ):
        with pytest.raises(ValueError, match=re.escape(says) if "(" not in says else says):
            divergence(Odd().eval(), [x], [x], [layer])
    tokens = nn.Sequential(nn.Flatten(2)).eval()
    with pytest.raises(ValueError, match=r"layer 0 has positions of shape \(4,\): valid pixels require"):
        divergence(tokens, [(x, torch.ones(3, 2, 2, dtype=torch.bool))], [x], ["0"])


def test_training_mode_is_refused():
    a, b = streams(3, 3)
    model = small_network()
    model[0][1].train()
    with pytest.raises(ValueError, match=r"0\.1 is in training mode.*call model\.eval\(\) first"):
        divergence(model, [a], [b], LAYERS)


def divergence_of(a: torch.Tensor, b: torch.Tensor) -> float:
    "Divergence of a layer from the means of samples, all channels alive."
    a, b = a.double(), b.double()
    return symmetric_kl(a.mean(0), a.var(0), b.mean(0), b.var(0)).mean().item()


def test_interval():
    "The interval of pairs is narrower; the same seed gives the same numbers."
    generator = torch.Generator().manual_seed(0)
    a, noise = (torch.randn(40, 32, generator=generator) for _ in range(2))
    b = a + 1.0 + 0.1 * noise
    loose, tight = (bootstrap(a, b, divergence_of(a, b), find_places(40, 40, p), 200) for p in (False, True))
    assert loose == bootstrap(a, b, divergence_of(a, b), find_places(40, 40), 200)
    assert tight[1] - tight[0] < loose[1] - loose[0]
    assert tight[0] < 1.0 < tight[1]  # two unit Gaussians one apart: (1 + 1)/2 + (1 + 1)/2 - 1


def test_interval_draws_whole_places():
    "Ten copies of four places are as uncertain as the four places, and not as forty samples."
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 4, 50, generator=generator)
    copies = [x.repeat_interleave(10, 0) for x in (a, b)]
    names = np.repeat(["w", "x", "y", "z"], 10)
    value = divergence_of(*copies)
    by_place, by_sample = (bootstrap(*copies, value, find_places(40, 40, True, places), 400) for places in (names, None))
    assert by_place[1] / by_place[0] > 2 * by_sample[1] / by_sample[0]
    unpaired = bootstrap(*copies, value, find_places(40, 40, places=[*names, *names]), 400)
    assert unpaired == by_place  # both streams show the same places, which are drawn together
    shuffled = torch.randperm(40, generator=generator)
    again = bootstrap(*(x[shuffled] for x in copies), value, find_places(40, 40, True, names[shuffled]), 400)
    np.testing.assert_allclose(again, by_place, rtol=1e-9)


def draw_streams(seed: int, n_places: int, n_tiles: int = 1, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    "Two views of the tiles of some places, which share content by place and by tile; 12 correlated channels, some skewed."
    generator = torch.Generator().manual_seed(seed)
    place, tile = (torch.randn(n, 12, generator=generator) for n in (n_places, n_places * n_tiles))
    views = torch.randn(2, n_places, 1, 12, generator=generator).repeat(1, 1, n_tiles, 1).flatten(1, 2)  # noise that tiles of a place share
    views = views + (place.repeat_interleave(n_tiles, 0) + tile) + 0.5 * torch.randn(2, n_places * n_tiles, 12, generator=generator)
    mixed = views @ torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    mixed[..., :4] = mixed[..., :4].exp().clamp(max=50)
    return mixed[0], mixed[1] + shift


def p_values(n_trials: int, n_places: int, n_tiles: int, paired: bool, has_places: bool = True, shift: float = 0.0) -> np.ndarray:
    found = []
    for seed in range(n_trials):
        a, b = draw_streams(seed, n_places, n_tiles, shift)
        if not paired:
            b = draw_streams(seed + 100_000, n_places, n_tiles, shift)[1]
        names = np.repeat(np.arange(n_places), n_tiles)
        names = names if paired else [*names, *(n_places + names)]
        places = find_places(len(a), len(b), paired, names if has_places else None)
        found.append(null_and_p(permuted_divergence(a, b, places, 99, seed))[1])
    return np.array(found)


def distance_from_uniform(p: np.ndarray) -> float:
    "Kolmogorov and Smirnov's, times the root of n: above 1.63 in 1 % of the samples of a uniform distribution."
    p = np.sort(p)
    ranks = np.arange(len(p) + 1) / len(p)
    return max((ranks[1:] - p).max(), (p - ranks[:-1]).max()) * len(p) ** 0.5


@pytest.mark.parametrize(("n_places", "n_tiles", "paired"), [(24, 1, True), (20, 3, True), (24, 1, False), (16, 3, False)])
def test_p_values_are_uniform_without_a_difference(n_places, n_tiles, paired):
    p = p_values(300, n_places, n_tiles, paired)
    assert distance_from_uniform(p) < 1.63
    assert abs((p <= 0.05).sum() - 15) < 2.58 * (300 * 0.05 * 0.95) ** 0.5  # 99 % of a binomial distribution


def test_tiles_that_pose_as_places_are_overconfident():
    "What a place's tiles share is then taken for a difference: the test above would fail."
    p = p_values(300, 20, 3, True, has_places=False)
    assert (p <= 0.05).sum() > 40 and distance_from_uniform(p) > 2


@pytest.mark.parametrize("paired", [True, False])
def test_a_shift_is_found(paired):
    assert (p_values(60, 24, 1, paired, shift=6.0) <= 0.05).mean() > 0.9


def test_null_is_the_expectation_at_the_same_number_of_samples():
    "2/(n - 3) + 2 (n - 1)/(n (n - 3)) for independent Gaussian samples; halves would give twice as much."
    n, generator = 30, torch.Generator().manual_seed(3)
    expected = 2 / (n - 3) + 2 * (n - 1) / (n * (n - 3))
    for paired in (True, False):
        sets = torch.randn(100, 2, n, 40, generator=generator)
        observed = np.mean([divergence_of(*x) for x in sets])
        nulls = [null_and_p(permuted_divergence(*x, find_places(n, n, paired), 50))[0] for x in sets]
        np.testing.assert_allclose([observed, np.mean(nulls)], expected, rtol=0.05)


def test_null_of_few_pairs_is_that_of_every_swap():
    "All 2⁷ ways to swap seven pairs, one by one; drawn at random, their median and p-value are the same."
    a, b = draw_streams(5, 7, shift=1.0)
    swaps = [torch.tensor([k >> bit & 1 for bit in range(7)], dtype=torch.bool)[:, None] for k in range(2**7)]
    every = np.array([divergence_of(a.where(~swap, b), b.where(~swap, a)) for swap in swaps])
    drawn = permuted_divergence(a, b, find_places(7, 7, True), 4000)
    np.testing.assert_allclose(drawn[0], every[0], rtol=1e-9)
    assert np.isclose(np.sort(every)[:, None], drawn.numpy(), rtol=1e-9).any(0).all()  # nothing else is drawn
    null, p = null_and_p(drawn)
    shares = [(every < null * (1 - 1e-9)).mean(), (every <= null * (1 + 1e-9)).mean()]
    assert shares[0] < 0.53 and shares[1] > 0.47
    np.testing.assert_allclose(p, (every >= every[0] * (1 - 1e-9)).mean(), atol=0.03)


def test_order_of_tiles_does_not_matter():
    "Tiles shuffled with their places give the same null and p-value; so do places of other names in the same order."
    a, b = draw_streams(6, 8, 4, shift=0.5)
    names = np.repeat(list("abcdefgh"), 4)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    first = permuted_divergence(a, b, find_places(32, 32, True, names), 50)
    shuffled = permuted_divergence(a[order], b[order], find_places(32, 32, True, names[order]), 50)
    torch.testing.assert_close(shuffled, first, rtol=1e-9, atol=0)
    renamed = permuted_divergence(a, b, find_places(32, 32, True, [f"x{name}" for name in names]), 50)
    torch.testing.assert_close(renamed, first, rtol=0, atol=0)


def test_unknown_samples_count_nothing_in_the_null():
    "A row without a valid pixel, in both streams, is as if the pair were not there."
    a, b = draw_streams(7, 9, shift=0.5)
    names = np.array(list("abcdefghz"))
    a[8], b[8] = torch.nan, torch.nan
    known = permuted_divergence(a[:8], b[:8], find_places(8, 8, True, names[:8]), 2000)
    found = permuted_divergence(a, b, find_places(9, 9, True, names), 2000)
    np.testing.assert_allclose(found[0], known[0], rtol=1e-9)
    np.testing.assert_allclose(null_and_p(found), null_and_p(known), rtol=0.05, atol=0.02)


def test_permutation_with_dead_channels():
    "Constant in both streams: dead in every permutation. Constant in one: mixed streams bring it to life, as they should."
    a, b = draw_streams(8, 10)
    a[:, 5], b[:, 5], a[:, 6] = 0.1, 0.1, 0.1
    living = [c for c in range(12) if c != 5]
    found, wanted = (permuted_divergence(x, y, find_places(10, 10, True), 50) for x, y in ((a, b), (a[:, living], b[:, living])))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    np.testing.assert_allclose(found[0], divergence_of(*(x[:, [c for c in living if c != 6]] for x in (a, b))), rtol=1e-9)
    assert np.isnan(null_and_p(permuted_divergence(a[:, 5:6], b[:, 5:6], find_places(10, 10, True), 5))).all()


def test_domain_error_of_equal_distributions_is_a_half():
    "200 sets of 20 pairs, and of 20 samples that are no pairs: half of them wrong, within what tosses of a coin allow."
    for paired in (True, False):
        sets = torch.randn(200, 2, 20, 30, generator=torch.Generator().manual_seed(9))
        errors = np.array([domain_error(*x, find_places(20, 20, paired), seed=k) for k, x in enumerate(sets)])
        assert abs(errors.mean() - 0.5) < 3 * errors.std() / 200**0.5
        assert abs(errors.mean() - 0.5) < 0.03 and errors.std() < 0.15


@pytest.mark.parametrize("n_channels", [3, 300])  # fewer and more than samples: both forms
def test_domain_error_knows_far_from_near(n_channels):
    generator = torch.Generator().manual_seed(10)
    a, b = torch.randn(2, 60, n_channels, generator=generator)
    far, near = (domain_error(a, b + shift / n_channels**0.5, find_places(60, 60, True)) for shift in (20, 2))
    assert far == 0 < near < 0.4  # 2 apart: an ideal classifier errs in Φ(-1) = 16 %
    scale, offset = torch.rand(2, n_channels, generator=generator) * 100 + 0.01
    assert domain_error(a * scale + offset, (b + 2 / n_channels**0.5) * scale + offset, find_places(60, 60, True)) == near


def test_both_forms_of_the_classifier_agree():
    x, z = (torch.randn(n, 9, generator=torch.Generator().manual_seed(n)).double() for n in (12, 5))
    y = torch.tensor([1.0, -1.0] * 6).double()
    dual, primal = module.linear_scores(x.repeat(1, 2), y, z.repeat(1, 2)), module.linear_scores(x, y, z)
    ridge = module.SHRINKAGE / (1 - module.SHRINKAGE) * 12  # twice the same channels: half of the penalty
    u, v = ((t - x.mean(0)) / x.std(0) for t in (x, z))
    for got, penalty in ((dual, ridge / 2), (primal, ridge)):
        w = torch.linalg.inv(u.T @ u + penalty * torch.eye(9).double()) @ u.T @ y
        middle = ((u @ w)[y > 0].mean() + (u @ w)[y < 0].mean()) / 2
        torch.testing.assert_close(got, v @ w - middle, rtol=1e-9, atol=1e-12)


def test_places_are_held_out_whole():
    "Each place has a pattern of its own that its tiles share: known places would give the stream away, others do not."
    generator = torch.Generator().manual_seed(11)
    a, b = (torch.randn(2, 10, 200, generator=generator)).repeat_interleave(8, 1) + 0.1 * torch.randn(2, 80, 200, generator=generator)
    names = np.repeat(np.arange(10), 8)
    assert domain_error(a, b, find_places(80, 80, True)) < 0.05
    assert domain_error(a, b, find_places(80, 80, True, names)) > 0.25


def test_one_place_says_nothing():
    a, b = draw_streams(13, 6)
    one = find_places(6, 6, True, ["one"] * 6)
    assert np.isnan([*null_and_p(permuted_divergence(a, b, one)), *bootstrap(a, b, 1.0, one), domain_error(a, b, one)]).all()


def test_equal_streams_cannot_be_told_apart():
    a = torch.randn(30, 50, generator=torch.Generator().manual_seed(12))
    a[3] = torch.nan
    assert domain_error(a, a, find_places(30, 30, True)) == 0.5
    constant = a.clone()
    constant[:, 1:] = 0.1
    assert abs(domain_error(constant, constant + 1, find_places(30, 30, True))) == 0


def test_median_channel():
    "Median over the living channels, of every estimator."
    model = nn.Sequential(nn.Identity()).eval()
    a, b = (torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1))
    a[:, 2] = 0
    table = divergence(model, [a], [b], ["0"], ESTIMATORS).set_index("estimator")
    for estimator in ESTIMATORS:
        x, y = (values_of(t[:, [0, 1, 3, 4]], estimator) for t in (a, b))
        channels = symmetric_kl(x.mean(0), x.var(0), y.mean(0), y.var(0))
        np.testing.assert_allclose(table.median_channel[estimator], np.median(channels), rtol=1e-9)


def test_places_of_a_model():
    "Places reach the interval, the null and the folds; the rows of other estimators have none of them."
    model, (a, b) = small_network(), streams(12, 12)
    names = list("aabbccddeeff")
    options = {"estimator": ("sample", "pixel"), "n_resamples": 20, "paired": True}
    plain, grouped = (divergence(model, a.split(5), b.split(4), LAYERS, places=places, **options) for places in (None, names))
    assert (plain.columns[-5:] == TRUST).all() and grouped[grouped.estimator == "pixel"][TRUST].isna().all(axis=None)
    means = [torch.cat(measure(model, x.split(5), LAYERS, keep_samples=True).sample_means).split([6, 9], 1)[1] for x in (a, b)]
    found = find_places(12, 12, True, names)
    row = grouped.iloc[1]
    np.testing.assert_allclose(row[["low", "high"]].tolist(), bootstrap(*means, row.divergence, found, 20), rtol=1e-5)
    np.testing.assert_allclose(row[["null", "p"]].tolist(), null_and_p(permuted_divergence(*means, found, 20)), rtol=1e-5)
    assert row.domain_error == domain_error(*means, found)
    assert (plain[["low", "null"]].iloc[:2] != grouped[["low", "null"]].iloc[:2]).all(axis=None)
    with pytest.raises(ValueError, match="places has 3 names for 12 pairs: wanted 12, one per pair"):
        divergence(model, [a], [b], LAYERS, places=["a", "b", "c"], **options)


def with_classes(x: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, ...]]:
    "Batches of x, targets and valid: two classes that overlap, one of few pixels in every third sample, one that does not occur."
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(len(x), 4, *x.shape[2:], generator=generator) < torch.tensor([0.5, 0.3, 0.01, 0.0])[:, None, None]
    targets[torch.arange(len(x)) % 3 > 0, 2] = False
    valid = torch.rand(len(x), *x.shape[2:], generator=generator) < 0.8
    return list(zip(x.split(4), targets.split(4), valid.split(4), strict=True))


def test_classes_in_one_pass_are_classes_one_by_one():
    model, (a, b) = small_network(), streams(12, 12)
    batches = [with_classes(x, seed) for seed, x in enumerate((a, b))]
    runs = []
    model[0].register_forward_hook(lambda *_: runs.append(1))
    options = {"n_resamples": 10, "paired": True, "places": list("aabbccddeeff")}
    table = divergence_by_class(model, *batches, ("much", "some", "little", "none"), LAYERS, **options)
    assert len(runs) == 6 and table.columns[0] == "class"  # three batches of each stream
    for k, name in enumerate(("much", "some")):
        alone = ([(x, targets[:, k] & valid) for x, targets, valid in stream] for stream in batches)
        wanted = divergence(model, *alone, LAYERS, **options)
        own = table[table["class"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(own[wanted.columns], wanted)
        assert (own.samples == 12).all()
    little, none = (table[table["class"] == name] for name in ("little", "none"))
    assert (little.samples <= 4).all() and (little.samples > 0).all()
    assert (none.samples == 0).all() and none[["divergence", "median_channel", *TRUST]].isna().all(axis=None)
    assert (none.dead == none.channels).all()


def test_targets_must_fit_the_classes():
    x, targets, valid = with_classes(streams(2, 2)[0], 0)[0]
    for wrong in (targets[:, :3], targets.float(), targets[..., 1:]):
        with pytest.raises(ValueError, match=r"wanted bool \(B, 4, H, W\), one mask per class"):
            divergence_by_class(small_network(), [(x, wrong, valid)], [(x, wrong, valid)], list("abcd"), LAYERS)


def test_resample_that_loses_a_channel():
    "A channel that fires in one sample of ten is dead in a third of the resamples (0.9¹⁰), not infinite."
    a, b = (torch.randn(10, 4, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    a[1:, 0] = 0
    low, high = bootstrap(a, b, divergence_of(a, b), find_places(10, 10))
    assert 0 < low < high < 1e3


def test_picture_wants_one_estimator():
    model, (a, b) = small_network(), streams(4, 4)
    table = divergence(model, [a], [b], LAYERS, ("sample", "pixel"))
    with pytest.raises(ValueError, match="both has sample, pixel: select the rows of one estimator"):
        draw_divergence({"": {"both": table}})
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_divergence({})
    figure = draw_divergence({"": {"sample": table[table.estimator == "sample"]}})
    assert figure.axes[0].get_ylabel() == "symmetric KL divergence"


def test_backbone_of_the_paper_has_34_layers_and_17():
    assert [len(find_relu_layers(create_backbone(depth, width=1 / 16))) for depth in (101, 50)] == [34, 17]
