"Each intervention does what it says, on any model and any two streams, and leaves the given model alone."

import copy

import pytest
import torch
from torch import nn

from agrivision_repro.analysis import interventions as iv
from agrivision_repro.models.norms import InstanceBatchNorm2d, SwitchNorm2d

DRAW = torch.Generator().manual_seed(0)


def stream(mean=0.0, std=1.0, n=6, channels=3, size=16):
    "Make two batches of inputs whose channels differ."
    x = mean + std * torch.randn(n, channels, size, size, generator=DRAW) * torch.arange(1, channels + 1)[:, None, None]
    return list(x.split(n // 2))


def values(batches):
    return torch.cat(batches).movedim(1, 0).flatten(1)


def make_net(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


NORMS = {"bn": lambda: nn.BatchNorm2d(4), "ibn_a": lambda: InstanceBatchNorm2d(4), "sn": lambda: SwitchNorm2d(4)}


@pytest.mark.parametrize("name", NORMS)
def test_adapted_statistics_are_averages_of_the_batches(name):
    "The closed form: means of batch means and of unbiased variances; IBN-a's batch norm sees only its half."
    net, batches = make_net(NORMS[name]()), stream(2.0, 3.0)
    adapted = iv.adapt_norms(net, batches)[1]
    with torch.no_grad():
        maps = [net[0](x) for x in batches]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    if name == "sn":  # the public code: variance of tiles, unbiased in each, plus that of their means
        var = [m.var((2, 3)).mean(0) + m.mean((2, 3)).var(0, correction=0) for m in maps]
    else:
        var = [m.movedim(1, 0).flatten(1).var(1) for m in maps]
    owner, part = (adapted.BN, slice(2, None)) if name == "ibn_a" else (getattr(adapted, "BN", adapted), slice(None))
    assert torch.allclose(owner.running_mean.flatten(), mean[part], atol=1e-5)
    assert torch.allclose(owner.running_var.flatten(), torch.stack(var).mean(0)[part], rtol=1e-4)


@pytest.mark.parametrize("change", [
    lambda net, x: iv.adapt_norms(net, x), lambda net, x: iv.freeze_switches(net, "bn"), lambda net, x: iv.shuffle_switches(net, 1),
])  # fmt: skip
def test_given_model_is_unchanged(change):
    net = nn.Sequential(SwitchNorm2d(3), SwitchNorm2d(3)).eval()
    nn.init.normal_(net[0].mean_weight)
    before = copy.deepcopy(net.state_dict())
    changed = change(net, stream())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in changed.state_dict().items())
    assert not net.training and not changed.training and all(p.requires_grad for p in net.parameters())


def test_moments_and_histogram_are_the_references():
    inputs, reference = stream(1.0, 2.0), stream(-1.0, 0.5)
    matched = values(iv.apply_to(inputs, iv.match_moments(inputs, reference)))
    assert torch.allclose(matched.mean(1), values(reference).mean(1), atol=1e-4)
    assert torch.allclose(matched.std(1), values(reference).std(1), rtol=1e-4)
    n = values(inputs).shape[1]
    matched = values(iv.apply_to(inputs, iv.match_histogram(inputs, reference, n)))
    assert torch.allclose(matched.sort(1).values, values(reference).sort(1).values, atol=1e-4)
    assert (matched.argsort(1) == values(inputs).argsort(1)).float().mean() > 0.999  # monotone


def test_invalid_pixels_do_not_count():
    x, valid = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    x[:, :, 0], x[:, :, 1], x[:, :, 2:] = 1.0, 3.0, 1e6
    valid[:, :2] = True
    to = iv.match_moments([(x, valid)], [torch.tensor([10.0, 14.0]).repeat(8).reshape(1, 1, 4, 4)])
    assert torch.allclose(to(x)[0, 0, :2, 0], torch.tensor([10.0, 14.0]), atol=1e-4)
    assert iv.apply_to([(x, valid)], to)[0][1] is valid


@pytest.mark.parametrize("size", [(16, 16), (12, 17)])
def test_amplitudes_get_the_references_moments_and_phases_stay(size):
    x, reference = (s * (5 + torch.randn(16, 2, *size, generator=DRAW)) for s in (1.0, 3.0))
    out = iv.match_amplitude([x], [reference], 0.2)(x)
    black = torch.minimum(x.amin((0, 2, 3)), reference.amin((0, 2, 3)))[:, None, None]
    before, after, wanted = (torch.fft.fft2(t - black) for t in (x, out, reference))
    rows, columns = ((torch.fft.fftfreq(n) * n).abs() for n in size)
    is_low = torch.maximum(rows[:, None].expand(size), columns.expand(size)) <= int(0.2 * min(size))
    low, to = (torch.std_mean(t.abs()[..., is_low], 0) for t in (before, wanted))
    by_hand = (to[1] + (before.abs()[..., is_low] - low[1]) * to[0] / low[0]).clamp(min=0)
    assert torch.allclose(after.abs()[..., is_low], by_hand, rtol=1e-3, atol=1e-2)
    assert torch.allclose(after[..., ~is_low], before[..., ~is_low], atol=1e-3)
    far = after.abs() > 0.1  # an amplitude of 0 has no phase
    assert torch.allclose((after / after.abs())[far], (before / before.abs())[far], atol=1e-2)


def test_inversion_is_its_own_inverse_and_keeps_moments():
    inputs = stream(3.0, 2.0)
    invert = iv.invert_contrast(inputs)
    once, twice = (values(iv.apply_to(inputs, *[invert] * n)) for n in (1, 2))
    assert torch.allclose(twice, values(inputs), atol=1e-4)
    assert torch.allclose(once.mean(1), values(inputs).mean(1), atol=1e-4) and torch.allclose(once.std(1), values(inputs).std(1))
    x = inputs[0]
    one = iv.invert_contrast(inputs, [2])(x)
    assert torch.equal(one[:, :2], x[:, :2]) and torch.allclose(one[:, 2], invert(x)[:, 2])


def test_gain_and_offset_are_seeded_and_bounded():
    x = torch.randn(1, 2, 4, 4)
    maps = [iv.random_gain_offset(2, 2.0, 0.5, seed=k) for k in range(50)]
    assert torch.equal(maps[3](x), iv.random_gain_offset(2, 2.0, 0.5, seed=3)(x)) and not torch.equal(maps[3](x), maps[4](x))
    for m in maps:
        line = [m(torch.full((1, 2, 1, 1), v)).flatten() for v in (0.0, 1.0)]
        gain = line[1] - line[0]
        assert (line[0].abs() <= 0.5).all() and (gain >= 0.5).all() and (gain <= 2).all()


def test_frozen_switches_stay_frozen_in_training():
    net = nn.Sequential(SwitchNorm2d(3), nn.ReLU(), SwitchNorm2d(3))
    for norm in (net[0], net[2]):
        nn.init.normal_(norm.mean_weight), nn.init.normal_(norm.var_weight)
    frozen = iv.freeze_switches(net, "bn")
    before = copy.deepcopy(frozen.state_dict())
    optimizer = torch.optim.SGD(frozen.parameters(), 0.1, weight_decay=0.1)
    frozen.train()(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key]) == key.endswith(("mean_weight", "var_weight")), key


def test_switches_to_batch_statistics_are_batch_norm():
    norm, x = SwitchNorm2d(3).eval(), torch.randn(2, 3, 5, 5)
    norm.BN.running_mean.normal_(), norm.BN.running_var.uniform_(0.5, 2)
    plain = nn.BatchNorm2d(3).eval()
    plain.running_mean.copy_(norm.BN.running_mean), plain.running_var.copy_(norm.BN.running_var)
    assert torch.allclose(iv.freeze_switches(nn.Sequential(norm), "bn")(x), plain(x), atol=1e-5)


def test_shuffled_switches_are_a_permutation_of_the_layers():
    net = nn.Sequential(*[SwitchNorm2d(3) for _ in range(6)])
    for k, norm in enumerate(net):
        nn.init.constant_(norm.mean_weight, k), nn.init.constant_(norm.var_weight, -k)
    pairs = [(int(norm.mean_weight[0]), int(norm.var_weight[0])) for norm in iv.shuffle_switches(net, 2)]
    assert sorted(pairs) == [(k, -k) for k in range(6)] and pairs != sorted(pairs)


REFUSALS = [
    (lambda: iv.adapt_norms(nn.Conv2d(1, 1, 1), []), "no norm with running statistics"),
    (lambda: iv.adapt_norms(nn.BatchNorm2d(1), []), "batches is empty"),
    (lambda: iv.match_moments([], stream()), "no valid pixel"),
    (lambda: iv.match_histogram(stream(channels=1), stream()), "inputs have 1 channels, reference 3"),
    (lambda: iv.match_histogram(stream(), stream(), 1), "n_quantiles is 1"),
    (lambda: iv.match_moments([torch.ones(1, 1, 2, 2)], [torch.rand(1, 1, 2, 2)]), "constant channel"),
    (lambda: iv.match_moments(stream(), stream())(torch.rand(1, 2, 4, 4)), "wanted (B, 3, H, W)"),
    (lambda: iv.match_amplitude(stream(), stream(), 0.6), "beta is 0.6"),
    (lambda: iv.match_amplitude([*stream(), *stream(size=8)], stream()), "inputs of 2 sizes"),
    (lambda: iv.match_amplitude(stream(), stream(size=8)), "wanted equal sizes"),
    (lambda: iv.match_amplitude(stream(), stream())(torch.rand(1, 3, 8, 8)), "in the size of the fit"),
    (lambda: iv.invert_contrast(stream(), []), "channels are []"),
    (lambda: iv.random_gain_offset(0), "0 channels"),
    (lambda: iv.freeze_switches(nn.Sequential(SwitchNorm2d(2)), "ln"), "wanted one of bn, uniform"),
    (lambda: iv.shuffle_switches(nn.ReLU()), "has no SwitchNorm2d"),
    (lambda: iv.shuffle_switches(nn.Sequential(SwitchNorm2d(2), SwitchNorm2d(2, statistics="in+bn"))), "different statistics"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_bad_arguments_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
