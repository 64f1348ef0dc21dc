"""Section 7's tables and figures: what each intervention recovers of the decay, and how score and divergence go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from agrivision_repro.analysis.significance import (
    AGREES, DISAGREES, NOT_JUDGED, UNDECIDED, Effect, combine, draw_fields, format_point, format_points, holm, judge, paired_effect,
    stack_seeds, sum_groups,
)  # fmt: skip
from agrivision_repro.data.batches import CHANNEL_LABELS
from agrivision_repro.models.backbones import backbone_label
from agrivision_repro.plots import CURVE_COLORS
from agrivision_repro.report.render import format_score, spread
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.compare import fields_to_draw, format_interval
from agrivision_repro.study.figures import rank_correlation
from agrivision_repro.study.modality import MODALITIES, OTHER
from agrivision_repro.study.section7 import ARMS, AS_IT_IS, CHANGED, STRENGTHS, run_section7

_Net = tuple[str, str]  # modality that it was trained on, norm


def _sort_nets(nets: Iterable[_Net]) -> list[_Net]:
    "Sort nets by their training modality, RGB first."
    return sorted(nets, key=lambda net: MODALITIES.index(net[0]))


def _group_nets(results: Sequence[Result]) -> dict[_Net, list[Result]]:  # in the order of their seeds
    "Group results by training modality and norm."
    nets: dict[_Net, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.run.seed):
        nets.setdefault((result.run.channels, result.run.norm), []).append(result)
    return {net: nets[net] for net in _sort_nets(nets)}


def _name_net(net: _Net) -> str:
    "Return the name of a net with its training modality."
    return f"{backbone_label('', net[1])} on {CHANNEL_LABELS[net[0]]}"


def share_recovered(
    own: Sequence,  # intersection and union on the own modality, one `(N, C, 2)` per seed
    plain: Sequence,  # on the other modality as it is
    arm: Sequence,  # on the other modality in an arm
    groups: Sequence | None = None,  # the field of each tile, N names; None: every tile is its own
    n_resamples: int = 1_000,
    seed: int = 0,  # of the drawing
) -> Effect:  # in %
    "Estimate the share of the decay that an arm recovers: mean gain over mean decay, its error linearized."
    stacks = torch.cat([stack_seeds(c, name) for c, name in ((own, "own"), (plain, "plain"), (arm, "arm"))])
    counts = sum_groups(stacks, groups).numpy()
    counts = counts[:, :, (counts.sum(0)[..., 1] > 0).all(0)]

    def gain_and_decay(sums: np.ndarray) -> np.ndarray:  # `(…, 3S, C, 2)` to `(2, …, S)`
        scores = np.split((sums[..., 0] / sums[..., 1]).mean(-1), 3, axis=-1)
        return np.stack([scores[2] - scores[1], scores[0] - scores[1]])

    gain, decay = gain_and_decay(counts.sum(0))
    share = gain.mean() / decay.mean()
    drawn = gain_and_decay(draw_fields(counts, n_resamples, np.random.default_rng(seed))).mean(-1)
    errors, n = (drawn[0] - share * drawn[1]) / decay.mean(), len(counts)
    return combine(100 * (share + (gain - share * decay) / decay.mean()), 1e4 * errors.var(ddof=1) * n / (n - 1), n)


def _recover(results: Sequence[Result], workspace: Workspace) -> dict[str, tuple[Effect, Effect | None]]:
    "Estimate what each arm gains on the other modality, in points and as a share of the decay: of one net, a result per seed."
    groups = fields_to_draw(results[0].run, workspace)
    own, found = [r.tile_counts() for r in results], [run_section7(r, workspace)[1] for r in results]
    counts = {name: [tiles[name] for tiles in found] for name in (AS_IT_IS, *CHANGED)}
    decay, effects = paired_effect(counts[AS_IT_IS], own, groups), {}
    has_decay = judge(decay) == AGREES or (judge(decay) == NOT_JUDGED and decay.estimate >= 1)
    for name in CHANGED:
        share = share_recovered(own, counts[AS_IT_IS], counts[name], groups) if has_decay else None
        effects[name] = paired_effect(counts[AS_IT_IS], counts[name], groups), share
    return effects


def judge_arms(gains: Mapping[str, Effect]) -> dict[str, str]:
    "Judge whether each arm of a net recovers part of the decay; Holm's adjustment is over the arms."
    adjusted = holm({name: gain.p for name, gain in gains.items()})
    return {name: judge(gain, p=adjusted[name]) for name, gain in gains.items()}


def section7_recovery(
    results: Sequence[Result],  # of `tables.section7`
    workspace: Workspace,
) -> pd.DataFrame:  # per net and arm: gain in points, share of the decay in %, each with its interval; n, p, verdict
    "Estimate and judge what each arm recovers of the decay on the other modality."
    rows = []
    for net, own in _group_nets(results).items():
        effects = _recover(own, workspace)
        verdicts = judge_arms({name: gain for name, (gain, _) in effects.items()})
        for name, (gain, share) in effects.items():
            shares = (np.nan,) * 3 if share is None else (share.estimate, *share.interval())
            rows.append((*net, name, ARMS[name].experiment, gain.estimate, *gain.interval(), *shares, gain.n_seeds, gain.p, verdicts[name]))
    columns = "trained_on norm arm experiment gain gain_low gain_high share share_low share_high n p verdict".split()
    return pd.DataFrame(rows, columns=columns)


def _fit_slopes(
    scores: pd.DataFrame,  # of `section7_scores`
) -> pd.DataFrame:  # per run: rank correlation, slope (points per e-fold of divergence), log_divergence and other (mIoU) as it is
    "Relate score and divergence over the arms on the other modality within each run."
    rows, other = {}, scores[scores.tested_on == "other"]
    for run, arms in other.groupby(["trained_on", "norm", "seed"], sort=False):
        x, y, plain = np.log(arms.divergence), arms.multilabel, arms.arm == AS_IT_IS
        rank = np.nan_to_num(rank_correlation(x, y))  # 0: all arms have one score
        rows[run] = (rank, np.polyfit(x, y, 1)[0], x[plain].item(), y[plain].item())
    names = ["trained_on", "norm", "seed"]
    return pd.DataFrame(rows.values(), pd.MultiIndex.from_tuples(rows, names=names), ["rank", "slope", "log_divergence", "other"]).sort_index()


def relate(scores: pd.DataFrame) -> dict[_Net, dict[str, Effect]]:
    "Estimate, per net: rank agreement, slope; for IBN-Nets the gain over ResNet that the slope predicts, the observed one, and the rest."
    fits, found = _fit_slopes(scores), {}
    for net in _sort_nets(dict.fromkeys(zip(scores.trained_on, scores.norm, strict=True))):
        own = fits.loc[net]
        found[net] = {name: combine(own[name]) for name in ("rank", "slope")}
        if net[1] != "bn" and (net[0], "bn") in fits.index:
            resnet = fits.loc[net[0], "bn"]
            predicted, observed = resnet.slope * (own.log_divergence - resnet.log_divergence), own.other - resnet.other
            gains = {"predicted": predicted, "observed": observed, "rest": observed - predicted}
            found[net] |= {name: combine(values) for name, values in gains.items()}
    return found


NO_GAIN = "no clear gain to explain"


def judge_mediation(effects: Mapping[str, Effect]) -> str:
    "Judge whether lower divergence accounts for an IBN-Net's gain over ResNet on the other modality."
    if "observed" not in effects or judge(effects["observed"]) == NOT_JUDGED:
        return NOT_JUDGED
    if judge(effects["observed"]) != AGREES:
        return NO_GAIN
    low, high = effects["rest"].interval()
    return DISAGREES if low > 0 or high < 0 else AGREES if judge(effects["predicted"]) == AGREES else UNDECIDED


def _lay_out(cells: Mapping[_Net, Mapping[str, str]], rows: Sequence[str]) -> pd.DataFrame:
    "Lay out text cells: arms by nets."
    return pd.DataFrame({_name_net(net): {row: own[row] for row in rows} for net, own in cells.items()})


def format_scores(
    scores: pd.DataFrame,  # of `section7_scores`
) -> pd.DataFrame:  # text cells; rows: arms, columns: nets
    "Format multi-label mIoU, averaged over seeds, with the divergence (its geometric mean) in brackets."
    rows = ["own modality", AS_IT_IS, *CHANGED]
    cells: dict[_Net, dict[str, str]] = {}
    for (trained, norm, arm), own in scores[scores.arm.isin(rows)].groupby(["trained_on", "norm", "arm"], sort=False):
        factor = np.exp(np.log(own.divergence).mean())
        bracket = "" if np.isnan(factor) else f" ({factor:.2g})" if factor < 100 else f" ({factor:,.0f})"
        cells.setdefault((trained, norm), {})[arm] = format_score(own.multilabel.mean(), spread(own.multilabel)) + bracket
    return _lay_out({net: cells[net] for net in _sort_nets(cells)}, rows)


def format_recovery(
    recovery: pd.DataFrame,  # of `section7_recovery`
) -> pd.DataFrame:  # text cells; rows: arms, columns: nets
    "Format gains in points, the share of the decay, and the verdict."
    cells: dict[_Net, dict[str, str]] = {}
    for row in recovery.itertuples():
        ends = f" ({format_interval(row.gain_low, row.gain_high)})" if np.isfinite(row.gain_low) else ""
        share = "" if np.isnan(row.share) else f", {round(row.share)} %"
        cells.setdefault((row.trained_on, row.norm), {})[row.arm] = f"{format_point(row.gain)}{ends}{share}; {row.verdict}"
    return _lay_out(cells, CHANGED)


def section7_relation(scores: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:  # numbers, one row per net and quantity; text cells
    "Relate divergence and score over arms: rank agreement, slope, and the gain over ResNet that the slope predicts."
    rows, cells = [], {}
    for net, effects in relate(scores).items():
        mediation = judge_mediation(effects)
        verdicts = {name: judge(effects[name], -1, margin=0) for name in ("rank", "slope")}
        rows += [(*net, name, e.estimate, *e.interval(), e.n_seeds, verdicts.get(name, mediation)) for name, e in effects.items()]
        gains = {name: format_points(effects[name]) if name in effects else "–" for name in ("predicted", "observed")}
        cells[_name_net(net)] = {
            "rank correlation": f"{_format_number(effects['rank'])}; {verdicts['rank']}",
            "slope, points per factor of e": f"{format_points(effects['slope'])}; {verdicts['slope']}",
            "gain over ResNet, predicted": gains["predicted"],
            "gain over ResNet, observed": gains["observed"],
            "divergence accounts for it": "–" if gains["observed"] == "–" else mediation,
        }
    columns = "trained_on norm quantity estimate low high n verdict".split()
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(cells).T


def _count_answer(scores: pd.DataFrame, recovery: pd.DataFrame, relation: pd.DataFrame) -> dict[str, str]:  # empty: nothing was judged
    "Count the verdicts of the arms, with the ranges of what was measured."
    if (recovery.verdict == NOT_JUDGED).all():
        return {}
    matched, turned = recovery[recovery.experiment.isin(["E1", "E2"])], recovery[recovery.experiment == "E9"]
    resnets = scores[(scores.norm == "bn") & (scores.tested_on == "other")]
    logs = np.log(resnets.divergence).groupby([resnets.trained_on, resnets.arm]).mean().unstack()
    factors = np.exp(logs[list(dict.fromkeys(matched.arm))].sub(logs[AS_IT_IS], axis=0).stack())
    observed = relation[relation.quantity == "observed"].verdict
    ranges = {name: format_interval(part.gain.min(), part.gain.max()) for name, part in (("matched", matched), ("turned", turned))}
    counts = {"helped": (matched.verdict == AGREES).sum(), "hurt": (matched.verdict == DISAGREES).sum(), "arms": len(matched)}
    counts |= {"turned_helped": (turned.verdict == AGREES).sum(), "nets": len(turned)}
    counts |= {"gains": (observed != NO_GAIN).sum(), "explained": (observed == AGREES).sum(), "pairs": len(observed)}
    return {"factors": f"{factors.min():.2g} to {factors.max():.2g}"} | ranges | {name: str(n) for name, n in counts.items()}


def state_answer(
    scores: pd.DataFrame,  # of `section7_scores`
    recovery: pd.DataFrame,  # of `section7_recovery`
    relation: pd.DataFrame,  # the first table of `section7_relation`
) -> str:
    "State in three sentences what the arms say of a causal effect of the divergence."
    found = _count_answer(scores, recovery, relation)
    if not found:
        return "With fewer than three seeds nothing is judged."
    answer = (
        "Matching the statistics of the two modalities multiplies ResNet's divergence by {factors}, depending on the arm; it clearly raises the score "
        "on the other modality in {helped} of {arms} comparisons and lowers it in {hurt} (range of all: {matched} points). Inverting the contrast, then "
        "matching mean and standard deviation, clearly raises it in {turned_helped} of {nets} nets (all: {turned} points). An IBN-Net clearly scores "
        "higher than ResNet on the other modality in {gains} of {pairs} comparisons; "
    )
    explained = "in {explained} of these is lower divergence shown to be the reason."
    return (answer + (explained if found["gains"] != "0" else "there is no clear gain that lower divergence could explain.")).format(**found)


def answer_table(
    studies: Mapping[str, Sequence[pd.DataFrame]],  # data set → the three tables of `state_answer`
) -> pd.DataFrame:  # text cells; rows: data sets
    "Tabulate what `state_answer` states; scores are on the other modality, in points of mIoU."
    columns = {
        "matched statistics: ResNet's divergence": "×{factors}",
        "matched statistics: score": "higher in {helped} of {arms} comparisons, lower in {hurt}: {matched}",
        "inverted contrast, then mean and standard deviation: score": "higher in {turned_helped} of {nets} nets: {turned}",
        "IBN-Net instead of ResNet: score": "higher in {gains} of {pairs} comparisons; shown to be due to lower divergence: {explained}",
    }
    found = {name: _count_answer(*tables) for name, tables in studies.items()}
    cells = {column: {name: text.format(**counts) if counts else NOT_JUDGED for name, counts in found.items()} for column, text in columns.items()}
    return pd.DataFrame(cells)


def _format_number(effect: Effect) -> str:
    "Format an effect with two decimals and its interval."
    low, high = effect.interval()
    return f"{effect.estimate:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if effect.n_seeds > 1 else "")


def format_sensitivity(scores: pd.DataFrame) -> pd.DataFrame:  # text cells; rows: nets
    "Format the share of the own modality's mIoU that is kept under a random gain and offset: mean ± standard deviation over seeds."
    cells: dict[str, dict[str, str]] = {}
    for net in _sort_nets(dict.fromkeys(zip(scores.trained_on, scores.norm, strict=True))):
        own = scores[(scores.trained_on == net[0]) & (scores.norm == net[1])]
        for name, (gain, offset) in STRENGTHS.items():
            kept = own[own.arm.str.startswith(f"{name} gain")].groupby("seed").share_kept.mean()
            column = f"gain up to ×{gain:g}, offset up to ±{offset:g}: mIoU kept, %"
            cells.setdefault(_name_net(net), {})[column] = format_score(kept.mean(), spread(kept))
    return pd.DataFrame(cells).T


_MARKERS = dict(zip((AS_IT_IS, *CHANGED), "o^vsD+x*", strict=True))


def draw_dose(scores: pd.DataFrame) -> Figure:
    "Draw mIoU on the other modality against divergence: an arm per marker, a net per color, a line fitted to the arms of each net."
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), dpi=80, sharey=True, layout="constrained")
    for ax, trained in zip(axes, MODALITIES, strict=True):
        own = scores[scores.trained_on == trained]
        for norm, color in zip(own.norm.unique(), CURVE_COLORS, strict=False):
            arms = own[(own.norm == norm)].groupby("arm", sort=False)
            _draw_net(ax, {name: arms.get_group(name) for name in ("own modality", *_MARKERS)}, color, backbone_label("", norm))
        ax.set_title(f"trained on {CHANNEL_LABELS[trained]}, tested on {CHANNEL_LABELS[OTHER[trained]]}", fontsize=9)
        ax.set(xscale="log", xlabel="median divergence of the two modalities")
    axes[0].set_ylabel("multi-label mIoU, %")
    gray = {"color": "0.4", "linestyle": "", "markersize": 7, "markeredgewidth": 1.5}
    handles = axes[0].get_legend_handles_labels()[0]
    handles += [Line2D([], [], marker=marker, label=name, **gray) for name, marker in _MARKERS.items()]
    fig.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    plt.close(fig)
    return fig


def _draw_net(ax, arms: Mapping[str, pd.DataFrame], color: str, label: str) -> None:
    "Draw the arms of a net: means over seeds, with the range of the seeds."
    ax.axhline(arms["own modality"].multilabel.mean(), color=color, linewidth=0.8, linestyle=":")
    points = []
    for name, marker in _MARKERS.items():
        x, y = arms[name].divergence.to_numpy(), arms[name].multilabel.to_numpy()
        points.append((np.exp(np.log(x).mean()), y.mean()))
        ends = [[[c - s.min()], [s.max() - c]] for c, s in zip(points[-1], (x, y), strict=True)] if len(x) > 1 else [None, None]
        ax.errorbar(*points[-1], ends[1], ends[0], marker=marker, color=color, markersize=7, markeredgewidth=1.5, elinewidth=0.6, alpha=0.8)
    x, y = np.array(points).T
    line = np.poly1d(np.polyfit(np.log(x), y, 1))
    ax.plot(sorted(x), line(np.log(sorted(x))), color=color, linewidth=1.2, label=label)


def draw_shares(recovery: pd.DataFrame) -> Figure:
    "Draw the share of the decay that each arm recovers: a net per color, with its interval over seeds and fields."
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), dpi=80, sharey=True, sharex=True, layout="constrained")
    for ax, trained in zip(axes, MODALITIES, strict=True):
        own = recovery[recovery.trained_on == trained]
        for k, (norm, color) in enumerate(zip(own.norm.unique(), CURVE_COLORS, strict=False)):
            net = own[own.norm == norm].set_index("arm").loc[list(CHANGED)]
            y, ends = np.arange(len(net)) + 0.15 * k - 0.2, [net.share - net.share_low, net.share_high - net.share]
            ax.errorbar(net.share, y, xerr=ends if net.share_low.notna().any() else None, fmt="o", color=color, markersize=4, elinewidth=1)
            ax.plot([], [], "o", color=color, markersize=4, label=backbone_label("", norm))
        for share in (0, 100):
            ax.axvline(share, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        ax.set_title(f"trained on {CHANNEL_LABELS[trained]}, tested on {CHANNEL_LABELS[OTHER[trained]]}", fontsize=9)
        ax.set(yticks=range(len(CHANGED)), yticklabels=CHANGED, xlabel="share of the decay recovered, %", xlim=(-100, 150))
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    plt.close(fig)
    return fig
