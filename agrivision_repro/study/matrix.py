"""The matrix of verdicts: claims × data sets, collected from several results folders and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from agrivision_repro.analysis.significance import AGREES, DISAGREES, NO_EFFECT, NOT_JUDGED, UNDECIDED
from agrivision_repro.study.claims import NO_RATIO, NO_SHARE, UNTESTED

ALONE = ", alone"  # ends a verdict that Holm's adjustment for the number of claims turns into "undecided"
VERDICT_COLORS = {  # verdict → color of its cell
    AGREES: "#009e73", DISAGREES: "#d55e00", NO_EFFECT: "#56b4e9", NO_RATIO: "#56b4e9", NO_SHARE: "#56b4e9", AGREES + ALONE: "#a6dcc9", DISAGREES + ALONE: "#f2c6a3",
    UNDECIDED: "#e0e0e0", NOT_JUDGED: "#f4f4f4", UNTESTED: "white",
}  # fmt: skip


def draw_matrix(
    matrix: pd.DataFrame,  # of `claims_matrix`
) -> Figure:
    "Draw the verdicts, a row per claim and a column per data set."
    rows, columns = matrix.shape
    fig, ax = plt.subplots(figsize=(3.2 + 2.6 * columns, 0.9 + 0.24 * rows), dpi=80, layout="constrained")
    for y, verdicts in enumerate(matrix.to_numpy()):
        for x, verdict in enumerate(verdicts):
            ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=VERDICT_COLORS[verdict], edgecolor="0.7", linewidth=0.6))
            ax.text(x + 0.5, y + 0.5, verdict, ha="center", va="center", fontsize=7.5)
    ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=np.arange(columns) + 0.5, yticks=np.arange(rows) + 0.5)
    ax.set_xticklabels(matrix.columns, fontsize=8)
    ax.set_yticklabels([f"{key.replace('_', ' ')} ({where})" for where, key in matrix.index], fontsize=7.5)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    plt.close(fig)
    return fig


def claims_matrix(
    judged: pd.DataFrame,  # of `judge_claims`
    others: Sequence[str | Path] = (),  # results folders of other data sets, each with tables/claims.csv
) -> pd.DataFrame:  # verdict per claim (where, key) and data set: after Holm, or that of the claim by itself with `ALONE`
    "Collect the verdicts on several data sets."
    tables = [judged]
    for path in (Path(folder).expanduser() / "tables" / "claims.csv" for folder in others):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: make it with agrivision reproduce claims --out {path.parents[1]}")
        tables.append(pd.read_csv(path))
    columns: dict[str, pd.Series] = {}
    for table in tables:
        missing = {"where", "key", "n", "verdict", "holm", "data"} - set(table.columns)
        if missing:
            raise ValueError(f"a claims.csv lacks {', '.join(sorted(missing))}: it is from another version; make it again")
        n = int(table.n.max())
        title = f"{table.data[0]}, {n} seed{'s' * (n > 1)}"
        if title in columns:
            raise ValueError(f"two folders judge the claims on {title}: name one folder per data set")
        own = table.set_index(["where", "key"])
        is_lost = own.verdict.isin([AGREES, DISAGREES]) & (own.holm == UNDECIDED)
        columns[title] = own.holm.mask(is_lost, own.verdict + ALONE)
    return pd.DataFrame(columns).reindex(pd.MultiIndex.from_frame(judged[["where", "key"]])).fillna(UNTESTED)


def compare_replicated(
    results: Path,  # a folder of results folders, with replicated.csv
) -> pd.DataFrame:  # name, key, machine; interval, verdict and holm as published, and with " again" as found on the other machine
    "Load the verdicts that the same seeds gave on other machines beside the published ones: distinct claims that can be tested."
    again = pd.read_csv(results / "replicated.csv", keep_default_na=False)
    tables = {name: pd.read_csv(results / name / "tables" / "claims.csv", keep_default_na=False) for name in again.name.unique()}
    both = pd.concat(tables, names=["name"]).reset_index("name").merge(again, on=["name", "key"], suffixes=("", " again"))
    return both[(both.verdict != UNTESTED) & (both.same_as == "")]
