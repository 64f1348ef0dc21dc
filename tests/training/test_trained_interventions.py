"Each intervention in training does what its name says, to the last bit where bits can be compared, and a plain Run is left alone."

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_in_parts
from torch import nn

from agrivision_repro.analysis.divergence import divergence
from agrivision_repro.data.batches import CHANNELS, Batch, TileDataset, scoring_loader, select_channels
from agrivision_repro.data.tiles import Tile
from agrivision_repro.losses import HybridLoss
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.models.norms import SwitchNorm2d
from agrivision_repro.predict.windows import load_predictor
from agrivision_repro.runs.listing import list_runs
from agrivision_repro.runs.plan import kind_of, time_steps
from agrivision_repro.runs.run import build_intervention, plan_run
from agrivision_repro.runs.store import run_folders
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.tables import section7_trained
from agrivision_repro.training.engine import make_engine
from agrivision_repro.training.interventions import (
    INTERVENTIONS,
    count_values,
    divergence_penalty,
    make_intervention,
    match_histogram,
    mix_statistics,
    stream_divergence,
    switch_shares,
)
from agrivision_repro.training.loop import Trainer, fit, load_batches, load_state, save_state
from agrivision_repro.training.schedule import Recipe, learning_rate

RECIPE = Recipe(1, 3, 2, lr=0.05, batch_size=4, crop=32, width=1 / 16, pretrained=False, recalibrate=4)
CASES = [("invert(0.5)", "rgb", "bn"), ("modality_dropout", "rgbn", "bn"), ("kl(0.1)", "rgb", "bn"), ("kl(0.1)", "nir3", "ibn_a"),
         ("sham(0.1)", "rgb", "bn"), ("random_statistics(0.5)", "rgb", "bn"), ("switches(shuffled)", "rgb", "ibn_s")]  # fmt: skip


def make_tiles(n: int = 8, nir_seed: int = 1) -> list[Tile]:
    "Tiles of noise; NIR is drawn on its own."
    rng, nir = np.random.default_rng(0), np.random.default_rng(nir_seed)
    images = [np.concatenate([rng.normal(100, 30, (3, 32, 32)), nir.normal(150, 20, (1, 32, 32))]) for _ in range(n)]
    images = [x.clip(0, 255).astype(np.uint8) for x in images]
    return [Tile.of(f"tile {k}", x, (x[0] > 100).astype(np.uint8), np.ones((32, 32), bool)) for k, x in enumerate(images)]


def make_trainer(text: str, channels: str, norm: str = "bn", loss: nn.Module | None = None) -> Trainer:
    torch.manual_seed(0)
    model = DeepLabV3Plus(2, 26, norm, in_chans=len(CHANNELS[channels]), width=RECIPE.width, multigrid=False)
    change = make_intervention(text, channels, norm)
    return Trainer(model, loss or HybridLoss(1, 1), RECIPE, seed=0, engine=make_engine("cpu", "float32"), intervention=change)


class TinyNet(nn.Module):
    "A net in float64 with a ResNet's names; smooth after its stem, for numerical differentiation."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        step = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, bias=False), nn.BatchNorm2d(b), nn.Softplus())  # noqa: E731
        self.conv1, self.act1 = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential(step(4, 4)) for _ in range(4))
        for conv in (m for m in self.double().modules() if isinstance(m, nn.Conv2d)):
            nn.init.normal_(conv.weight, std=0.3)

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(self.act1(self.conv1(x))))))


@pytest.fixture
def streams():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, 1.5 * b + 0.3


def test_the_penalty_is_the_measured_divergence(streams):
    "Of estimator `pixel`, per layer and channel, on the same two streams; the net is left in its mode."
    model = TinyNet().eval()
    table = divergence(model, [streams[0]], [streams[1]], estimator="pixel")
    layers = ["act1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert table.layer.tolist() == layers
    seen = []
    hooks = [model.get_submodule(n).register_forward_hook(lambda m, i, y: seen.append(stream_divergence(y, 3))) for n in layers]
    model(torch.cat(streams))
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose([d.mean().item() for d in seen], table.divergence, rtol=1e-9)
    wanted = torch.stack([d.log1p().mean() for d in seen]).mean()
    torch.testing.assert_close(divergence_penalty(model.train(), streams, eps=0.0), wanted, rtol=1e-9, atol=0)
    assert all(m.training for m in model.modules()) and divergence_penalty(model, (streams[0],) * 2) == 0


def test_the_gradient_of_the_penalty(streams):
    "Against central differences in float64, for a weight of each layer."
    model = TinyNet()
    divergence_penalty(model, streams).backward()
    for name, parameter in model.named_parameters():
        at, found = (0,) * parameter.ndim, []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[at] += step
                found.append(divergence_penalty(model, streams).item())
                parameter[at] -= step
        assert parameter.grad[at].item() == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-5, abs=1e-8), name
    assert model.layer4[0][0].weight.grad.abs().max() > 1e-4


def histories(text: str, channels: str, nir_seed: int, norm: str = "bn") -> torch.Tensor:
    trainer = make_trainer(text, channels, norm)
    trainer.model.train()
    for batches in load_batches(trainer, TileDataset(make_tiles(nir_seed=nir_seed), channels, 2)):
        trainer.step(batches)
    return torch.stack(trainer.history)


def test_the_sham_leaves_nir_out():
    "Its values depend on the input alone: other NIR planes give the same bits, while they change the penalty of `kl`."
    first, second = (histories("sham(0.1)", "rgb", seed) for seed in (1, 2))
    assert torch.equal(first, second) and (first[:, -1] > 0).all()
    first, second = (histories("kl(0.1)", "rgb", seed) for seed in (1, 2))
    assert not torch.equal(first[:, -1], second[:, -1]) and (first[:, -1] > 0).all()


def test_the_penalty_is_in_the_loss():
    trainer = make_trainer("kl(0.5)", "rgb")
    (batches, *_) = load_batches(trainer, TileDataset(make_tiles(), "rgb", 2))
    row = dict(zip(trainer.columns, trainer.step(batches).tolist(), strict=True))
    task = trainer.loss.combine({name: row[name] for name in trainer.loss.term_names})
    assert row["loss"] == pytest.approx(task + 0.5 * row["penalty"], rel=1e-6)


def test_a_penalized_run_sees_both_modalities_of_the_same_samples():
    images = torch.from_numpy(np.stack([tile.image for tile in make_tiles()]))
    for own, other in (("rgb", "nir3"), ("nir3", "rgb")):
        change = make_intervention("kl(0.1)", own)
        feed = change.change_feed(TileDataset(make_tiles(), own, 2))
        batch, streams = change.change_batch(Batch(select_channels(images, feed.channels), None, None, None), (0, 0, 0))
        for found, channels in ((batch.x, own), (streams[0], own), (streams[1], other)):
            assert torch.equal(found, select_channels(images, channels))


@pytest.mark.parametrize("channels", ["rgb", "nir3", "rgbn"])
def test_inversion_is_exact(channels):
    "About the means over all training tiles; with probability one half about half of the samples, the same ones each time."
    feed = TileDataset(make_tiles(), channels, 2)
    x = select_channels(torch.from_numpy(np.stack([tile.image for tile in feed.tiles])), channels)
    batch, (always, half) = Batch(x, None, None, None), (make_intervention(f"invert({p})", channels) for p in (1, 0.5))
    for change in (always, half):
        assert change.change_feed(feed) is feed
    inverted, _ = always.change_batch(batch, (0, 0, 0))
    means = x.double().mean((0, 2, 3))
    torch.testing.assert_close((inverted.x + x).double(), 2 * means[:, None, None].expand(x.shape), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(always.change_batch(inverted, (0, 0, 0))[0].x, x)
    halves = [half.change_batch(batch, (0, t, 0))[0].x for t in (*range(50), 0)]
    flipped = [[not torch.equal(a, b) for a, b in zip(found, x, strict=True)] for found in halves]
    assert 150 < sum(map(sum, flipped[:50])) < 250 and flipped[0] == flipped[50] != flipped[1]


def test_modality_dropout_shows_rgb_nir_or_both():
    x = torch.ones(600, 4, 2, 2)
    shown = make_intervention("modality_dropout").change_batch(Batch(x, None, None, None), (0, 0, 0))[0].x
    assert all(torch.equal(sample, sample[:, :1, :1].expand_as(sample)) for sample in shown)
    found, counts = shown[..., 0, 0].unique(dim=0, return_counts=True)
    assert found.tolist() == [[0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]] and counts.min() > 160


def test_matched_nir_has_the_histogram_of_red(tmp_path):
    counts = count_values(make_tiles())
    levels = match_histogram(counts[3], counts[0])
    assert (np.diff(levels.astype(int)) >= 0).all()
    assert np.array_equal(match_histogram(counts[0], counts[0])[counts[0] > 0], counts[0].nonzero()[0])  # its own: unchanged
    found = np.bincount(levels, counts[3], 256)
    assert np.abs(np.cumsum(found) - np.cumsum(counts[0])).max() <= counts[[0, 3]].max()  # to the pixels of one value
    workspace = Workspace(tmp_path, device="cpu", precision="float32")
    run = plan_run("smoke", "synthetic", intervention="match_nir")
    feeds = [workspace.feed(run, split) for split in ("train", "val")]
    assert np.array_equal(feeds[0].nir_levels, feeds[1].nir_levels)
    assert workspace.feed(replace(run, intervention=""), "val").nir_levels is None
    image = feeds[1].tiles[0].image
    matched = torch.from_numpy(np.concatenate([image[:3], feeds[1].nir_levels[image[3:]]]))[None]
    batch = next(scoring_loader(feeds[1].tiles, prepare=feeds[1].prepare("cpu")))
    assert torch.equal(batch.x[:1], select_channels(matched, "rgbn"))
    with pytest.raises(ValueError, match="trained on NIR matched to red"):
        load_predictor(workspace.result(run))


def test_mixed_statistics():
    "Normalized shape is kept; means and deviations lie at the stated weight between the sample's own and its partner's."
    torch.manual_seed(0)
    y = torch.randn(3, 4, 16, 16) * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None] + torch.arange(3.0)[:, None, None, None]
    partners, weights = torch.tensor([1, 2, 0]), torch.tensor([0.0, 1.0, 0.25])
    mixed = mix_statistics(y, weights, partners)
    for own, found in ((y.mean((2, 3)), mixed.mean((2, 3))), (y.std((2, 3)), mixed.std((2, 3)))):
        torch.testing.assert_close(found, torch.lerp(own, own[partners], weights[:, None]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[0], y[0])
    trainer = make_trainer("random_statistics(1)", "rgb")
    x, plain = torch.randn(4, 3, 32, 32), make_trainer("", "rgb").model
    trainer.intervention.change_batch(Batch(x, None, None, None), (0, 0, 0))
    assert torch.equal(trainer.model.eval()(x), plain.eval()(x))
    assert not torch.equal(trainer.model.train().backbone(x), plain.train().backbone(x))


@pytest.mark.parametrize("order", ["bn", "uniform", "ordered", "shuffled"])
def test_frozen_switches_stay_frozen(order):
    trainer = make_trainer(f"switches({order})", "rgb", "ibn_s")
    wanted = switch_shares(order, sum(isinstance(m, SwitchNorm2d) for m in trainer.model.modules()), seed=0)
    torch.testing.assert_close(wanted.sum(1), torch.ones(len(wanted)))
    before = trainer.model.backbone.layer1[0].bn1.BN.weight.clone()
    fit(trainer, TileDataset(make_tiles(), "rgb", 2), Path("unused"), save_every=10**9)
    for norm, shares in zip((m for m in trainer.model.modules() if isinstance(m, SwitchNorm2d)), wanted, strict=True):
        torch.testing.assert_close(norm.mean_weight.softmax(0), shares)
        assert torch.equal(norm.mean_weight, norm.var_weight) and torch.equal(norm.mean_weight.softmax(0) == 0, shares == 0)
    assert not torch.equal(trainer.model.backbone.layer1[0].bn1.BN.weight, before)
    if order == "shuffled":
        assert torch.equal(wanted.sort(0).values, switch_shares("ordered", len(wanted), 0).sort(0).values)
        assert not torch.equal(wanted, switch_shares("shuffled", len(wanted), 1))


@pytest.mark.parametrize(("text", "channels", "norm"), CASES)
def test_a_resumed_run_ends_with_the_same_bits(text, channels, norm, tmp_path):
    "Six steps and the re-estimation of running statistics, against three, a saved state and three; losses are finite."
    feed, trainers = TileDataset(make_tiles(), channels, 2), [make_trainer(text, channels, norm) for _ in range(3)]
    fit(trainers[0], feed, tmp_path / "state", save_every=10**9)
    trainers[1].model.train()
    for _, batches in zip(range(3), load_batches(trainers[1], feed), strict=False):
        trainers[1].step(batches)
    save_state(trainers[1], tmp_path / "state")
    load_state(trainers[2], tmp_path / "state")
    fit(trainers[2], feed, tmp_path / "state", save_every=10**9)
    first, second = ({**t.bare_model.state_dict(), "history": torch.stack(t.history)} for t in trainers[::2])
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert first["history"].isfinite().all()
    assert not torch.equal(first["history"][:, :5], histories("", channels, 1, norm))


def test_no_intervention_is_the_plain_step():
    "Bit by bit what a loop written out here computes."
    trainer, twin = make_trainer("", "rgb"), make_trainer("", "rgb").model
    sgd = torch.optim.SGD(twin.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay, fused=True)
    for model in (trainer.model, twin):
        model.train()
    for t, (batch,) in enumerate(load_batches(trainer, TileDataset(make_tiles(), "rgb", 2))):
        trainer.step([batch])
        torch.manual_seed(t)
        sgd.param_groups[0]["lr"] = learning_rate(RECIPE, t)
        HybridLoss(1, 1)(twin(batch.x.contiguous(memory_format=torch.channels_last)), batch.targets, batch.valid).backward()
        sgd.step()
        sgd.zero_grad()
    state = twin.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in trainer.model.state_dict().items())


KNOWN = (
    r"^intervention is 'solarize': wanted one of invert\(0.5\), modality_dropout, match_nir, kl\(0.1\), sham\(0.1\), "
    r"random_statistics\(0.5\), switches\(bn\|uniform\|ordered\|shuffled\)$"
)
MISSPELLED = ["invert", "invert()", "invert(2)", "invert(0)", "invert(.5)", "invert(0.50)", "invert(0.5", "kl(nan)", "kl(inf)", "kl(-1)",
              "match_nir(1)", "switches", "switches(in)", "(0.5)"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "channels", "norm", "says"),
    [
        ("solarize", "rgb", "bn", KNOWN),
        *[(text, "rgb", "ibn_s", re.escape(f"intervention is {text!r}: wanted one of")) for text in MISSPELLED],
        ("kl(0.1)", "rgbn", "bn", r"intervention kl\(0.1\) does not apply to channels 'rgbn': wanted one of rgb, nir3"),
        ("match_nir", "rgb", "bn", "intervention match_nir does not apply to channels 'rgb': wanted one of rgbn"),
        ("switches(bn)", "rgb", "ibn_a", r"intervention switches\(bn\) does not apply to norm 'ibn_a': wanted one of ibn_s"),
    ],
)
def test_what_is_unknown_or_does_not_apply(text, channels, norm, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        make_intervention(text, channels, norm)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=says):
        Workspace(tmp_path, device="cpu").result(plan_run("smoke", "synthetic", channels=channels, norm=norm, intervention=text))
    assert not (tmp_path / "runs").exists()


SCRIPT = """
import sys
from torch import distributed
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace

kinds = [("bn", "kl(0.1)"), ("ibn_s", "switches(shuffled)")]
runs = [plan_run("smoke", "synthetic", channels="rgb", depth=18, norm=norm, intervention=text) for norm, text in kinds]
Workspace(sys.argv[1], device="cpu", precision="float32").results(runs)
distributed.destroy_process_group()
"""


def test_the_runs_of_section_7():
    "Every intervention is in it with a plain counterpart; all apply; equal Runs are listed once."
    runs = section7_trained("smoke", "synthetic", (0, 1))
    assert len(runs) == len(set(runs)) == 2 * len({replace(run, seed=0) for run in runs})
    assert {run.intervention.partition("(")[0] for run in runs} == {"", *INTERVENTIONS}
    for run in runs:
        build_intervention(run)
        assert replace(run, intervention="") in runs


@pytest.mark.slow
def test_runs_over_two_processes(tmp_path):
    "Runs with a penalty and with frozen switches end over two processes, are scored, load, and have the intervention in their title."
    (tmp_path / "script.py").write_text(SCRIPT)
    run_in_parts(2, tmp_path / "script.py", tmp_path / "out")
    table = list_runs(tmp_path / "out")
    assert table.state.tolist() == ["finished"] * 2
    assert set(table.title) == {"ResNet18, kl(0.1) on RGB, seed 0", "IBN-Net18-s, switches(shuffled) on RGB, seed 0"}
    for folder in run_folders(tmp_path / "out"):
        folder.result().model()


def test_a_plan_times_the_penalty_once_for_all_doses():
    runs = [plan_run("smoke", "synthetic", channels="nir3", depth=18, intervention=f"kl({dose})") for dose in (0.1, 0.3)]
    kind = kind_of(runs[0])
    assert kind == kind_of(runs[1]) != kind_of(replace(runs[0], intervention=""))
    assert time_steps(kind, 32, make_engine("cpu", "float32"), 0.1).train > 0
