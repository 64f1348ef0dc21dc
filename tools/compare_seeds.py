"""Compare ResNet101 with itself under other seeds, where every verdict is false; write results/seeds.csv and results/same_net.csv.

usage: compare_seeds.py DATA [--data-root DIR] [--out DIR] [--scale laptop] [--seeds 0,1,2,3,4,5] [--results DIR]

Runs that are not finished are trained; rows of the same data in the two files are replaced. Six seeds can be divided into halves in
ten ways, which share their runs: they are not ten independent trials.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd

from agrivision_repro.analysis.significance import RATIO_MARGIN, Effect, holm, judge, log_ratio
from agrivision_repro.runs.launch import launch
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.compare import score_gain
from agrivision_repro.study.figures import figure2_medians, figure2_scores
from agrivision_repro.study.modality import OTHER
from agrivision_repro.study.tables import table1

RESULTS = Path(__file__).resolve().parents[1] / "results"


def measure_seeds(results: Sequence[Result], workspace: Workspace) -> pd.DataFrame:  # one row per run
    "Return scores in % on both modalities, and the median divergence over the layers."
    medians = figure2_medians(figure2_scores(results, workspace)).set_index(["trained_on", "seed"])["median"]
    rows = []
    for result in results:
        trained, seed = result.run.channels, result.run.seed
        row = {"trained_on": trained, "seed": seed, "divergence": medians[trained, seed], "precision": result.record["precision"]}
        for place, channels in (("own", trained), ("other", OTHER[trained])):
            row |= {f"{name}, {place}": 100 * result.scores[channels][name]["mean"] for name in ("multilabel", "average_precision")}
        rows.append(row | {"commit": result.record["commit"][:10]})
    return pd.DataFrame(rows)


def halves(seeds: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    "Divide seeds into two halves in every way, each once."
    for first in combinations(seeds, len(seeds) // 2):
        if seeds[0] in first:
            yield first, tuple(s for s in seeds if s not in first)


def compare(results: Sequence[Result], measured: pd.DataFrame, workspace: Workspace, split: tuple) -> pd.DataFrame:
    "Judge the second half of the seeds against the first, with Holm's adjustment over the comparisons."
    effects: dict[tuple[str, str], tuple[Effect, float]] = {}
    for trained, other in OTHER.items():
        first, second = ([r for s in half for r in results if (r.run.channels, r.run.seed) == (trained, s)] for half in split)
        medians = measured[measured.trained_on == trained].set_index("seed").divergence
        for place, channels in (("own", trained), ("other", other)):
            effects[trained, f"points, {place}"] = score_gain(second, first, workspace, channels, channels), 1.0
        effects[trained, "log ratio of divergences"] = log_ratio(*(medians[list(half)].tolist() for half in split)), RATIO_MARGIN
    p = holm({key: effect.p for key, (effect, _) in effects.items()})
    rows = [(*key, e.estimate, *e.interval(), judge(e, margin=m), judge(e, margin=m, p=p[key])) for key, (e, m) in effects.items()]
    table = pd.DataFrame(rows, columns=["trained_on", "quantity", "estimate", "low", "high", "verdict", "holm"])
    table.insert(0, "seeds", " against ".join(" ".join(map(str, half)) for half in split))
    return table


def keep(table: pd.DataFrame, data: str, path: Path) -> None:
    "Write the rows of a data set in place of those that a file has."
    table.insert(0, "data", data)
    old = pd.read_csv(path) if path.is_file() else table[:0]
    pd.concat([old[old.data != data], table]).sort_values("data", kind="stable").to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    for name, default in {"data-root": "", "out": "out", "scale": "laptop", "seeds": "0,1,2,3,4,5", "results": str(RESULTS)}.items():
        parser.add_argument(f"--{name}", default=default)
    args = parser.parse_args()
    workspace, seeds, folder = Workspace(args.out, args.data_root, "cpu"), [int(s) for s in args.seeds.split(",")], Path(args.results)
    if len(seeds) % 2:
        parser.error(f"--seeds names {len(seeds)} seeds: wanted an even number, for two halves")
    outcome = launch(table1(args.scale, args.data, seeds), workspace)
    if outcome.failures:
        sys.exit("\n".join(f"{run.title} failed: {why}" for run, why in outcome.failures.items()))
    results = list(outcome.results.values())
    measured = measure_seeds(results, workspace)
    compared = pd.concat([compare(results, measured, workspace, split) for split in halves(seeds)])
    keep(compared, args.data, folder / "same_net.csv")
    keep(measured, args.data, folder / "seeds.csv")
    print(compared.verdict.value_counts().to_string())
