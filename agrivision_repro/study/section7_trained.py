"""Section 7's arms that need training: what each changes in the scores, and the score against the dose of lower divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from agrivision_repro.analysis.significance import AGREES, DISAGREES, NOT_JUDGED, Effect, combine, contrast_effect, format_point
from agrivision_repro.data.batches import CHANNEL_LABELS
from agrivision_repro.models.backbones import backbone_label
from agrivision_repro.plots import CURVE_COLORS
from agrivision_repro.report.render import format_score, spread
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.compare import fields_to_draw, format_interval
from agrivision_repro.study.figures import reduce_curve, run_divergence
from agrivision_repro.study.modality import OTHER
from agrivision_repro.study.paper import PAPER_NORMS
from agrivision_repro.study.section7 import run_section7
from agrivision_repro.study.section7_report import judge_arms


@dataclass(frozen=True)
class Trained:
    "The nets of an arm, one per seed."

    channels: str = "rgb"
    norm: str = "bn"
    intervention: str = ""

    @classmethod
    def of(cls, run: Run) -> Trained:
        "Return the arm of a Run."
        return cls(run.channels, run.norm, run.intervention)

    @property
    def label(self) -> str:
        "Return the name of the net, followed by the intervention."
        return ", ".join(filter(None, (backbone_label("", self.norm), self.intervention)))


@dataclass(frozen=True)
class Contrast:
    "A weighted sum of scores that a claim says is above 0."

    experiment: str
    what: str
    weights: dict[Trained, float]
    tested_on: str = "other"  # or "own" modality


def _gain(experiment: str, ours: Trained, others: Trained, tested_on: str = "other") -> Contrast:
    "Return the contrast of two arms."
    trained_on = "" if ours.channels == "rgb" else f" on {CHANNEL_LABELS[ours.channels]}"
    return Contrast(experiment, f"{ours.label} − {others.label}{trained_on}", {ours: 1.0, others: -1.0}, tested_on)


def _shrinkage(norm: str) -> Contrast:
    "Return the contrast of an IBN-Net's gain over ResNet on NRGB as it is and with the histogram of NIR matched to red's."
    weights = {Trained("rgbn", n, i): (1 if n == norm else -1) * (-1 if i else 1) for i in ("", "match_nir") for n in ("bn", norm)}
    return Contrast("E3", f"gain of {backbone_label('', norm)} over ResNet − the same with NIR matched to red", weights, "own")


PLAIN, IBN_A, IBN_S = Trained(), Trained(norm="ibn_a"), Trained(norm="ibn_s")  # ResNet; IBN-Net-a; IBN-Net-s
DOSES = ("kl(0.01)", "kl(0.03)", "kl(0.1)", "kl(0.3)")  # weights of the divergence in the loss
SIDES = ("own", "other")
WHOLE_FALL = "lowest − highest divergence, on a line through the doses"
CONTRASTS = (  # rows of the table of effects, but for the line through the doses
    *(_shrinkage(norm) for norm in ("ibn_a", "ibn_s")),
    *(_gain("E4", Trained(intervention=dose), PLAIN) for dose in DOSES),
    _gain("E4", Trained(intervention="kl(0.1)"), Trained(intervention="sham(0.1)")),
    *(_gain("E5", Trained(intervention=f"random_statistics({s})"), IBN_A) for s in ("0.25", "0.5", "1")),
    *(_gain("E7", IBN_S, Trained(norm="ibn_s", intervention=f"switches({o})"), s) for o in ("bn", "uniform", "shuffled") for s in SIDES),
    *(_gain("E9", Trained(norm=n, intervention="invert(0.5)"), Trained(norm=n), s) for n in ("bn", "ibn_a", "ibn_s") for s in SIDES),
    *(_gain("baseline", Trained(c, "gn"), Trained(c), s) for c in OTHER for s in SIDES),
    _gain("baseline", Trained("rgbn", "gn"), Trained("rgbn"), "own"),
    _gain("baseline", Trained("rgbn", intervention="modality_dropout"), Trained("rgbn"), "own"),
)  # fmt: skip


BASELINES = (Trained(norm="gn"), Trained(intervention="modality_dropout"), Trained(intervention="AdaBN"))  # not in the paper


def _score_row(arm: Trained, seed: int, divergence: float, own: dict, other: dict | None) -> dict:  # of `trained_scores`
    "Lay out the scores of a net on its own modality and on the other one."
    row = {"channels": arm.channels, "norm": arm.norm, "intervention": arm.intervention, "seed": seed, "arm": arm.label, "divergence": divergence}
    for side, scores in zip(SIDES, (own, other), strict=True):
        for metric in ("multilabel", "average_precision"):
            row[f"{side}_{metric}"] = 100 * scores[metric]["mean"] if scores else np.nan
    return row


def trained_scores(
    results: Sequence[Result],  # of `tables.section7_trained`
    workspace: Workspace,
) -> pd.DataFrame:  # per run: channels, norm, intervention, seed, arm, divergence; mIoU and average precision in %, own and other
    "Score every arm, and ResNet with AdaBN, and measure the divergence; NaN where a net has both modalities as input."
    rows = []
    for result in results:
        run, arm, median, other = result.run, Trained.of(result.run), np.nan, None
        own = result.scores[run.channels]
        if run.channels in OTHER:
            curve, other = run_divergence(result, workspace), result.scores[OTHER[run.channels]]
            median = reduce_curve(curve[curve.estimator == "sample"])["median"]
        rows.append(_score_row(arm, run.seed, median, own, other))
        if other and arm == replace(PLAIN, channels=run.channels):
            adapted = run_section7(result, workspace)[0]["AdaBN"]
            rows.append(_score_row(replace(arm, intervention="AdaBN"), run.seed, adapted["divergence"], own, adapted["scores"]))
    return pd.DataFrame(rows)


def _estimate_fall(scores: pd.DataFrame, side: str) -> Effect:
    "Estimate what the whole fall of ResNet's divergence, from the highest to the lowest over the doses of the penalty, is worth in points."
    arms = scores[(scores.channels == "rgb") & (scores.norm == "bn") & scores.intervention.isin(["", *DOSES])].sort_values("seed")
    lines = [(np.log(own.divergence), own[f"{side}_multilabel"]) for _, own in arms.groupby("seed")]
    return combine([-np.polyfit(log, score, 1)[0] * np.ptp(log) for log, score in lines])


def _estimate(contrast: Contrast, nets: dict[Trained, list[Result]], workspace: Workspace) -> Effect:
    "Estimate a contrast from the counts of its nets."
    arms = list(contrast.weights)
    tested = [OTHER[arm.channels] if contrast.tested_on == "other" else "" for arm in arms]
    counts = [[result.tile_counts(on) for result in nets[arm]] for arm, on in zip(arms, tested, strict=True)]
    return contrast_effect(counts, list(contrast.weights.values()), fields_to_draw(nets[arms[0]][0].run, workspace))


def trained_effects(
    results: Sequence[Result],  # of `tables.section7_trained`
    scores: pd.DataFrame,  # of `trained_scores`
    workspace: Workspace,
) -> pd.DataFrame:  # per contrast: experiment, what, tested_on, effect in points with its interval, n, p, verdict
    "Estimate and judge every contrast; Holm's adjustment is over those of an experiment."
    nets: dict[Trained, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.run.seed):
        nets.setdefault(Trained.of(result.run), []).append(result)
    effects = {(c.experiment, c.what, c.tested_on): _estimate(c, nets, workspace) for c in CONTRASTS}
    effects |= {("E4", WHOLE_FALL, side): _estimate_fall(scores, side) for side in SIDES}
    rows = []
    for experiment in dict.fromkeys(key[0] for key in effects):
        own = {key: effect for key, effect in effects.items() if key[0] == experiment}
        verdicts = judge_arms({str(key): effect for key, effect in own.items()})
        rows += [(*key, e.estimate, *e.interval(), e.n_seeds, e.p, verdicts[str(key)]) for key, e in own.items()]
    return pd.DataFrame(rows, columns="experiment what tested_on effect low high n p verdict".split())


def state_trained(
    scores: pd.DataFrame,  # of `trained_scores`
    effects: pd.DataFrame,  # of `trained_effects`
) -> str:
    "State in three sentences what training with one thing changed says of a causal effect of the divergence, and of capacity."
    if (effects.verdict == NOT_JUDGED).all():
        return "With fewer than three seeds nothing is judged."

    def count(rows: pd.DataFrame, what: str, verdict: str = AGREES) -> str:
        return f"{(rows.verdict == verdict).sum()} of {len(rows)} {what} (all: {format_interval(rows.effect.min(), rows.effect.max())} points)"

    rgb = scores[(scores.channels == "rgb") & (scores.norm == "bn")]
    logs = np.log(rgb.divergence).groupby(rgb.intervention).mean()
    factors = np.exp(logs - logs[""])
    doses = effects[(effects.experiment == "E4") & effects.what.str.endswith(f" − {PLAIN.label}")]
    fall = effects[(effects.what == WHOLE_FALL) & (effects.tested_on == "other")].iloc[0]
    own, other = (effects[(effects.experiment == "E9") & (effects.tested_on == side)] for side in SIDES)
    return (
        f"With the divergence as a term of the loss, ResNet's falls to as little as {factors[list(DOSES)].min():.2g} of its value (with its sham, "
        f"which compares RGB with RGB, to {factors['sham(0.1)']:.2g}), and the score on the other modality clearly rises in {count(doses, 'doses')}; on a line through the "
        f"doses, it changes by {format_point(fall.effect)} points ({format_interval(fall.low, fall.high)}) from the highest to the lowest divergence. Inverted "
        f"samples in training clearly raise the score on the other modality in {count(other, 'nets')}, and lower that on the own modality in "
        f"{count(own, 'nets', DISAGREES)}. IBN-Net-s clearly scores higher than with frozen switches, which keep its capacity but not its learned shares, in "
        f"{count(effects[effects.experiment == 'E7'], 'comparisons')}."
    )


def format_trained(scores: pd.DataFrame) -> pd.DataFrame:  # text cells; a row per arm
    "Format scores on both modalities and the divergence (its geometric mean): mean ± standard deviation over seeds."
    columns = {"own modality": "own_multilabel", "other modality": "other_multilabel"}
    columns |= {f"{name}, average precision": f"{side}_average_precision" for name, side in zip(columns, SIDES, strict=True)}
    rows = {}
    for (channels, arm), own in scores.groupby(["channels", "arm"], sort=False):
        cells = {name: "–" if own[c].isna().all() else format_score(own[c].mean(), spread(own[c])) for name, c in columns.items()}
        factor = np.exp(np.log(own.divergence).mean())
        rows[f"{arm} on {CHANNEL_LABELS[channels]}"] = cells | {"divergence": "–" if np.isnan(factor) else f"{factor:.3g}"}
    return pd.DataFrame(rows).T


def select_baselines(
    scores: pd.DataFrame,  # of `trained_scores`
) -> pd.DataFrame:  # the same columns
    "Select the nets of Table 2 (NRGB) and Figure 2 (RGB, NIR), and below them, with a plus, baselines that the paper does not have."
    nets, ours = ({arm.label for arm in arms} for arms in ((PLAIN, IBN_A, IBN_S), BASELINES))
    beside = scores[scores.arm.isin(ours)]
    shown = pd.concat([scores[scores.arm.isin(nets)], beside.assign(arm="+ " + beside.arm)])
    return shown.sort_values("channels", key=lambda c: c.map(["rgbn", *OTHER].index), kind="stable")


def format_effects(effects: pd.DataFrame) -> pd.DataFrame:  # text cells
    "Format contrasts with their intervals and verdicts."
    return pd.DataFrame({
        "experiment": effects.experiment,
        "tested on": effects.tested_on + " input",
        "points": effects.effect.map(format_point).tolist(),
        "95 % interval": list(map(format_interval, effects.low, effects.high)),
        "above 0": effects.verdict,
    }).set_axis(effects.what, axis=0)  # fmt: skip


_MARKERS = {"": "o", "kl": "v", "sham": "^", "random_statistics": "s", "switches": "D", "invert": "*", "AdaBN": "P"}
_COLORS = dict(zip((*PAPER_NORMS, "gn"), CURVE_COLORS, strict=False))  # as in Figure 2
_FACES = {"filled: tested on NIR": "0.4", "open: tested on RGB": "none"}


def _draw_arm(ax, arm: pd.DataFrame, norm: str, kind: str) -> None:
    "Draw the scores of an arm at its divergence, each with the range of its seeds: filled on NIR, open on RGB."
    color, x = _COLORS[norm], np.exp(np.log(arm.divergence).mean())
    for side, face in (("other", color), ("own", "none")):
        y = arm[f"{side}_multilabel"]
        ends = [[y.mean() - y.min()], [y.max() - y.mean()]]
        ax.errorbar(x, y.mean(), ends, marker=_MARKERS[kind], color=color, markerfacecolor=face, markersize=6, elinewidth=0.7)


def draw_trained(scores: pd.DataFrame) -> Figure:
    "Draw mIoU on NIR (filled) and RGB (open) against divergence: a point per arm trained on RGB; the doses of the penalty are joined."
    fig, ax = plt.subplots(figsize=(8.5, 4.2), dpi=80, layout="constrained")
    own = scores[scores.channels == "rgb"]
    for (norm, intervention), arm in own.groupby(["norm", "intervention"], sort=False):
        _draw_arm(ax, arm, norm, intervention.partition("(")[0])
    doses = own[(own.norm == "bn") & own.intervention.isin(["", *DOSES])].groupby("intervention", sort=False)
    x = np.exp(doses.divergence.agg(lambda d: np.log(d).mean()))
    ax.plot(x, doses.other_multilabel.mean(), color=_COLORS["bn"], linewidth=0.8, zorder=0)
    ax.set(xscale="log", xlabel="median divergence of RGB and NIR", ylabel="multi-label mIoU, %")
    handles = [Line2D([], [], color=_COLORS[norm], label=backbone_label("", norm)) for norm in _COLORS if norm in own.norm.values]
    handles += [Line2D([], [], marker=m, color="0.4", linestyle="", label=kind or "as in Figure 2") for kind, m in _MARKERS.items()]
    handles += [Patch(edgecolor="0.4", facecolor=face, label=label) for label, face in _FACES.items()]
    fig.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    plt.close(fig)
    return fig
