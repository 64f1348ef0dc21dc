"""Interventions in training (section 7): one supposed cause of the gap between RGB and NIR is changed, everything else stays.

A Run names one in its field `intervention`. Random choices are drawn from seed, iteration, micro-batch and sample, so that a resumed run
ends with the same bits; dropout and the order of tiles are those of the plain Run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from agrivision_repro.analysis.moments import EnoughError, find_relu_layers, symmetric_kl
from agrivision_repro.data.batches import CHANNELS, Batch, TileDataset, thin_out
from agrivision_repro.data.tiles import Tile
from agrivision_repro.models.norms import STATISTICS, SwitchNorm2d

Streams = tuple[Tensor, Tensor]  # two inputs of the model, `(B, C, H, W)` each, whose divergence is penalized
Key = tuple[int, int, int]  # seed, iteration, micro-batch


def _generator(key: Key) -> np.random.Generator:
    "Return the generator of a training step; the first number keeps it apart from those of the tiles' order, crops and rotations."
    return np.random.default_rng((7_000_007, *key))


class Intervention:
    "Change nothing: the intervention of a plain Run, and the base of all others."

    example = ""  # how a Run spells it
    words: tuple[str, ...] = ()  # strengths, if they are words
    limit = 0.0  # largest strength, if it is a number above 0; 0: it has no strength
    inputs = tuple(CHANNELS)  # keys of `CHANNELS` that it applies to
    norms: tuple[str, ...] = ()  # keys of `backbones.NORMS` that it applies to; empty: all
    columns: tuple[str, ...] = ()  # columns that it adds to the history

    def __init__(self, channels: str = "rgbn", strength: float | str = ""):
        self.channels, self.strength = channels, strength

    @property
    def batch_channels(self) -> str:  # a key of `CHANNELS`
        "Return the channels of the batches that `change_batch` takes."
        return self.channels

    def change_model(self, model: nn.Module, seed: int) -> None:
        "Change a new model in place."

    def change_inputs(self, feed: TileDataset, training_tiles: Callable[[], Sequence[Tile]]) -> TileDataset:
        "Return the tiles as they are used in training and in scoring."
        return feed

    def change_feed(self, feed: TileDataset) -> TileDataset:
        "Return the training tiles as they are used in training steps only."
        return feed

    def change_batch(self, batch: Batch, key: Key) -> tuple[Batch, Streams | None]:
        "Return the batch of a training step, and the two streams whose divergence is added to its loss."
        return batch, None


class Inversion(Intervention):
    """Invert the contrast of samples at random, about the mean of each channel over the training tiles.

    The strength is the probability. AutoAugment's `Invert` (Cubuk et al. 2019), about means instead of mid-gray.
    """

    example, limit = "invert(0.5)", 1.0

    def __init__(self, *args):
        super().__init__(*args)
        self.centers = torch.zeros(len(CHANNELS[self.channels]), 1, 1)  # of normalized channels

    def change_feed(self, feed: TileDataset) -> TileDataset:
        counts, chosen = count_values(feed.tiles), list(CHANNELS[feed.channels])
        means = torch.from_numpy(counts @ np.arange(256) / counts.sum(1).clip(min=1) / 255)
        mean, std = (torch.tensor(s, dtype=means.dtype) for s in feed.statistics)
        self.centers = ((means - mean) / std)[chosen, None, None].float()
        return feed

    def change_batch(self, batch: Batch, key: Key) -> tuple[Batch, Streams | None]:
        flipped = torch.from_numpy(_generator(key).random(len(batch.x)) < self.strength).to(batch.x.device)
        inverted = 2 * self.centers.to(batch.x) - batch.x
        return batch._replace(x=inverted.where(flipped[:, None, None, None], batch.x)), None


class ModalityDropout(Intervention):
    "Show RGB, NIR or both of each sample, with equal probability; 0, the mean, replaces the other (ModDrop, Neverova et al. 2016)."

    example, inputs = "modality_dropout", ("rgbn",)
    kept = ((1, 1, 1, 1), (1, 1, 1, 0), (0, 0, 0, 1))  # channels shown

    def change_batch(self, batch: Batch, key: Key) -> tuple[Batch, Streams | None]:
        picks = _generator(key).integers(len(self.kept), size=len(batch.x))
        shown = torch.tensor(self.kept)[picks].bool().to(batch.x.device)
        return batch._replace(x=batch.x.where(shown[:, :, None, None], 0.0)), None


class MatchedNIR(Intervention):
    "Match the histogram of NIR to that of red by a monotone map of its values, fitted on the training tiles and used in scoring too."

    example, inputs = "match_nir", ("rgbn",)

    def change_inputs(self, feed: TileDataset, training_tiles: Callable[[], Sequence[Tile]]) -> TileDataset:
        counts = count_values(training_tiles())
        return replace(feed, nir_levels=match_histogram(counts[3], counts[0]))


class DivergencePenalty(Intervention):
    "Add to the loss the divergence of RGB and NIR of the same samples, see `divergence_penalty`; the strength is its weight."

    example, limit, inputs, columns = "kl(0.1)", float("inf"), ("rgb", "nir3"), ("penalty",)
    batch_channels = "rgbn"  # three of them are the model's input

    def change_feed(self, feed: TileDataset) -> TileDataset:
        return replace(feed, channels=self.batch_channels)

    def change_batch(self, batch: Batch, key: Key) -> tuple[Batch, Streams | None]:
        x, other = (batch.x[:, list(CHANNELS[c])] for c in (self.channels, *{"rgb", "nir3"} - {self.channels}))
        return batch._replace(x=x), (x, other)


class ShamPenalty(Intervention):
    "Add the same penalty between the two halves of the batch, of one modality: regularization that leaves the other modality out."

    example, limit, columns = "sham(0.1)", float("inf"), ("penalty",)

    def change_batch(self, batch: Batch, key: Key) -> tuple[Batch, Streams | None]:
        half = len(batch.x) // 2
        return batch, (batch.x[: half or 1], batch.x[half:])


class RandomStatistics(Intervention):
    """Mix the channel means and deviations of each sample with those of another one of the batch: MixStyle (Zhou et al. 2021).

    It is applied to the first norm's output of each block in layers 1 to 3, where IBN-a removes those statistics from half of the
    channels. The weight of the other sample is the strength times a draw from Beta(0.1, 0.1), MixStyle's distribution.
    """

    example, limit = "random_statistics(0.5)", 1.0

    def change_model(self, model: nn.Module, seed: int) -> None:
        resnet = next(m for m in model.modules() if isinstance(m, ResNet))
        blocks = [*resnet.layer1, *resnet.layer2, *resnet.layer3]
        self.n_sites, self.draws = len(blocks), None
        for k, block in enumerate(blocks):
            block.bn1.register_forward_hook(partial(self._mix, k, block))

    def change_batch(self, batch: Batch, key: Key) -> tuple[Batch, Streams | None]:
        rng, shape = _generator(key), (self.n_sites, len(batch.x))
        weights, partners = self.strength * rng.beta(0.1, 0.1, shape), rng.random(shape).argsort(1)
        self.draws = torch.from_numpy(weights).float().to(batch.x.device), torch.from_numpy(partners).to(batch.x.device)
        return batch, None

    def _mix(self, k: int, block: nn.Module, _norm: nn.Module, _inputs: tuple, y: Tensor) -> Tensor | None:
        if not block.training or self.draws is None:  # while running statistics are re-estimated only norms are in training mode
            return None
        weights, partners = (t[k] for t in self.draws)
        return mix_statistics(y, weights, partners)


class FrozenSwitches(Intervention):
    "Fix the shares of IN, LN and BN of every SwitchNorm, see `switch_shares`; all other parameters are trained."

    example, words, norms = "switches(bn)", ("bn", "uniform", "ordered", "shuffled"), ("ibn_s",)

    def change_model(self, model: nn.Module, seed: int) -> None:
        switches = [m for m in model.modules() if isinstance(m, SwitchNorm2d)]
        for switch, shares in zip(switches, switch_shares(self.strength, len(switches), seed), strict=True):
            for weight in (switch.mean_weight, switch.var_weight):
                weight.data.copy_(shares.log().clamp(min=-1e4))  # finite, and its softmax is exactly 0
                weight.requires_grad_(False)


INTERVENTIONS: dict[str, type[Intervention]] = {  # name in a Run → class
    "invert": Inversion,
    "modality_dropout": ModalityDropout,
    "match_nir": MatchedNIR,
    "kl": DivergencePenalty,
    "sham": ShamPenalty,
    "random_statistics": RandomStatistics,
    "switches": FrozenSwitches,
}


def _read_strength(kind: type[Intervention], word: str) -> float | str:
    "Return the strength that a word states; raise ValueError for any other than the canonical spelling of a valid one."
    if kind.words or not kind.limit:
        return (kind.words or ("",))[(kind.words or ("",)).index(word)]
    strength = float(word)
    if not 0 < strength <= kind.limit or strength == float("inf") or f"{strength:g}" != word:
        raise ValueError
    return strength


def make_intervention(
    text: str,  # a name, with its strength in parentheses if it has one; "": change nothing
    channels: str = "rgbn",  # the model's input, a key of `CHANNELS`
    norm: str = "bn",  # of the backbone, a key of `backbones.NORMS`
) -> Intervention:
    "Make an intervention from its name in a Run; raise ValueError if it is unknown or does not apply."
    if not text:
        return Intervention(channels)
    name, _, word = text.removesuffix(")").partition("(")
    try:
        kind = INTERVENTIONS[name]
        strength = _read_strength(kind, word)
        if text != (f"{name}({word})" if word else name):
            raise ValueError
    except (KeyError, ValueError):
        known = (f"{k}({'|'.join(kind.words)})" if kind.words else kind.example for k, kind in INTERVENTIONS.items())
        raise ValueError(f"intervention is {text!r}: wanted one of {', '.join(known)}") from None
    for what, own, wanted in (("channels", channels, kind.inputs), ("norm", norm, kind.norms)):
        if wanted and own not in wanted:
            raise ValueError(f"intervention {text} does not apply to {what} {own!r}: wanted one of {', '.join(wanted)}")
    return kind(channels, strength)


_FIT_TILES = 256  # evenly spread training tiles that values are counted in


def count_values(tiles: Sequence[Tile]) -> np.ndarray:  # of R, G, B, NIR, `(4, 256)` int64
    "Count the values of the valid pixels of evenly spread tiles."
    counts = np.zeros((4, 256), np.int64)
    for tile in thin_out(tiles, _FIT_TILES):
        counts += [np.bincount(channel[tile.valid], minlength=256) for channel in tile.image]
    return counts


def match_histogram(
    source: np.ndarray,  # pixels of each value, `(256,)`
    target: np.ndarray,  # the same, of the distribution to reach
) -> np.ndarray:  # the new value of each value, not decreasing, `(256,)` uint8
    "Return the monotone map of values that gives the source the target's distribution (histogram specification)."
    before, after = (np.cumsum(h) / max(h.sum(), 1) for h in (source, target))
    values = np.flatnonzero(target)
    return np.interp(before, after[values], values).round().astype(np.uint8) if len(values) else np.arange(256, dtype=np.uint8)


def mix_statistics(
    y: Tensor,  # `(B, C, H, W)`
    weights: Tensor,  # of the partner's statistics, in [0, 1], `(B,)`
    partners: Tensor,  # another sample for each, `(B,)` int64
    eps: float = 1e-6,  # added to the variance
) -> Tensor:  # like `y`
    "Mix the channel means and deviations of each sample with its partner's, without a gradient through them."
    with torch.no_grad():
        variance, mean = torch.var_mean(y.to(torch.promote_types(y.dtype, torch.float32)), (2, 3), correction=0)
        std = (variance + eps).sqrt()
        mixed_mean, mixed_std = (torch.lerp(s, s[partners], weights[:, None].to(s)) for s in (mean, std))
        scale = mixed_std / std
        shift = mixed_mean - scale * mean
    return torch.addcmul(shift.to(y.dtype)[..., None, None], y, scale.to(y.dtype)[..., None, None])


def switch_shares(
    order: str,  # a word of `FrozenSwitches`
    n_sites: int,
    seed: int,
) -> Tensor:  # of instance, layer and batch moments, `(n_sites, 3)`
    """Return the shares of frozen switches.

    `bn`: batch moments only; `uniform`: a third each; `ordered`: from the stem to the head, instance moments fall from two thirds to none
    and batch moments rise likewise, the direction that §3.2 reports; `shuffled`: the same shares in a random order of the sites.
    """
    falling = torch.linspace(2 / 3, 0, n_sites)
    profile = torch.stack([falling, torch.full_like(falling, 1 / 3), 2 / 3 - falling], 1)
    if order == "shuffled":
        return profile[torch.from_numpy(np.random.default_rng(seed).permutation(n_sites))]
    fixed = {"bn": (0.0, 0.0, 1.0), "uniform": (1 / 3,) * STATISTICS["in+ln+bn"]}
    return torch.tensor(fixed[order]).expand(n_sites, -1) if order in fixed else profile


def stream_divergence(
    y: Tensor,  # an activation for both streams, one after the other, `(A + B, C, H, W)`
    n_first: int,  # A, samples of the first stream
    eps: float = 0.0,  # added to the variances
) -> Tensor:  # at least 0, `(C,)`
    "Compute the symmetric KL divergence of each channel (eqs 1 and 2) from moments over samples and positions: the estimator `pixel`."
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    (var_a, mean_a), (var_b, mean_b) = (torch.var_mean(part, (0, 2, 3)) for part in (y[:n_first], y[n_first:]))
    return symmetric_kl(mean_a, var_a + eps, mean_b, var_b + eps)


def divergence_penalty(
    model: nn.Module,  # contains a ResNet; left in its mode
    streams: Streams,
    eps: float = 1e-5,  # added to the variances, as in batch norm
) -> Tensor:  # scalar, at least 0, differentiable
    """Compute the mean of log(1 + D) over channels and ReLU layers, D the symmetric KL divergence of two streams.

    The net runs in evaluation mode, as when the divergence is measured: in training mode batch norm would normalize NIR by NIR's own
    moments and hide what is to be reduced. The logarithm bounds the gradient. D itself is the mean of a few near-dead channels, and its
    gradient grows with the ratio of the variances. Moments over positions too are less noisy than those of a batch's few means.
    """
    names, terms, hooks, was_training = find_relu_layers(model), [], [], model.training
    both = torch.cat(streams).contiguous(memory_format=torch.channels_last)

    def read(_module: nn.Module, _inputs: tuple, y: Tensor) -> None:
        terms.append(torch.log1p(stream_divergence(y, len(streams[0]), eps)).mean())
        if len(terms) == len(names):
            raise EnoughError

    try:
        hooks += [model.get_submodule(name).register_forward_hook(read) for name in names]
        model.eval().forward(both)  # not the compiled call, which has no hooks
    except EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return torch.stack(terms).mean()
