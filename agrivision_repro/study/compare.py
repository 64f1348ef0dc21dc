"""The one comparison of two configurations that tables and claims share: paired by seed, with its interval and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from agrivision_repro.analysis.significance import Effect, format_point, judge, paired_effect
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace


def fields_to_draw(run: Run, workspace: Workspace) -> list[str] | None:  # of each validation tile; None: a single field, its tiles are drawn
    "Return what a resample draws: whole fields if there are several."
    fields = workspace.fields(run)
    return fields if len(set(fields)) > 1 else None


def score_gain(
    ours: Sequence[Result],  # one per seed
    others: Sequence[Result],  # of the same seeds in the same order
    workspace: Workspace,
    ours_on: str = "",  # test input of `ours`; "": the channels that they were trained on
    others_on: str = "",
) -> Effect:  # points of multi-label mIoU
    "Estimate what one configuration gains over another."
    own, other = ([r.tile_counts(on) for r in some] for some, on in ((ours, ours_on), (others, others_on)))
    return paired_effect(other, own, fields_to_draw(ours[0].run, workspace))


def tabulate_gains(
    effects: Mapping[tuple[str, str], Effect],  # (of, against) → effect; `of` is the one that the paper calls better
) -> pd.DataFrame:  # one row per pair: of, against, difference, low, high, n, detectable, verdict
    "Judge differences."
    rows = [(*pair, e.estimate, *e.interval(), e.n_seeds, e.detectable, judge(e)) for pair, e in effects.items()]
    return pd.DataFrame(rows, columns=["of", "against", "difference", "low", "high", "n", "detectable", "verdict"])


def format_interval(low: float, high: float) -> str:
    "Format an interval in points; NaN: there is none."
    return f"{format_point(low)} to {format_point(high)}" if np.isfinite(low) else "–"


def format_gains(
    gains: pd.DataFrame,  # of `tabulate_gains`
) -> pd.DataFrame:  # text cells
    "Format differences; without an interval for a single seed."
    return pd.DataFrame({
        "difference, points": gains.difference.map(format_point).tolist(),
        "95 % interval": list(map(format_interval, gains.low, gains.high)),
        "seeds": gains.n.astype(str).tolist(),
        "detectable": [f"{d:.1f}" if np.isfinite(d) else "–" for d in gains.detectable],
        "verdict": gains.verdict.tolist(),
    }, index=gains["of"].str.removeprefix("+ ") + " against " + gains["against"].str.removeprefix("+ "))  # fmt: skip
