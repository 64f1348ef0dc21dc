"""Section 7: does lower divergence cause better segmentation? One intervention at a time on trained nets, scored on the other modality."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat

import numpy as np
import pandas as pd
import torch
from torch import nn

from agrivision_repro.analysis.divergence import tabulate
from agrivision_repro.analysis.interventions import (
    Intervened, Intervention, adapt_norms, apply_to, invert_contrast, match_amplitude, match_histogram, match_moments, random_gain_offset,
)  # fmt: skip
from agrivision_repro.analysis.moments import measure
from agrivision_repro.core import exit_with_parent, fork_server, read_json, write_array, write_json
from agrivision_repro.data.batches import TileDataset, scoring_loader, thin_out
from agrivision_repro.runs.run import Run
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.modality import OTHER
from agrivision_repro.training.engine import Engine
from agrivision_repro.training.evaluate import score_tiles


@dataclass(frozen=True)
class Arm:
    "One condition under which a trained net is scored."

    experiment: str = ""
    adapts_to: str = ""  # AdaBN on the training tiles of the "own" or the "other" modality; "": norms as trained
    steps: tuple[str, ...] = ()  # names in `_fit_steps`, applied to the inputs in this order
    tested_on: str = "other"  # or "own" modality


STRENGTHS = {"weak": (1.25, 0.25), "strong": (2.0, 1.0)}  # of a random gain and offset: largest factor and largest shift
DRAWS = 2  # random gains and offsets per strength
AS_IT_IS = "as it is"
ARMS = {  # name → arm
    AS_IT_IS: Arm(),
    "AdaBN": Arm("E1", adapts_to="other"),
    "AdaBN on own tiles": Arm("E1 control", adapts_to="own"),
    "mean and std": Arm("E2", steps=("moments",)),
    "histogram": Arm("E2", steps=("histogram",)),
    "Fourier amplitude": Arm("E2", steps=("amplitude",)),
    "inverted": Arm("E2 control", steps=("inverted",)),
    "inverted, mean and std": Arm("E9", steps=("inverted", "moments")),
} | {f"{name} gain, draw {k}": Arm("E6", steps=(f"{name} {k}",), tested_on="own") for name in STRENGTHS for k in range(DRAWS)}
CHANGED = tuple(name for name, arm in ARMS.items() if arm.tested_on == "other" and name != AS_IT_IS)
N_FIT = 64  # training tiles, evenly spread, that interventions are fitted on; half of them if there are fewer than twice as many
_SCORES = ("multilabel", "gated", "average_precision")


def _training_inputs(
    run: Run,
    workspace: Workspace,
    channels: str,  # a modality
    engine: Engine,
) -> list:  # of x `(B, 3, H, W)` and valid `(B, H, W)`
    "Load the inputs of training tiles, without labels."
    feed = workspace.feed(run, "train", channels)
    chosen = thin_out(range(len(feed.tiles)), 2 * N_FIT)[1::2]  # where there are enough, not those that training took the running statistics from
    loader = scoring_loader([feed.tiles[k] for k in chosen], prepare=feed.prepare(engine.device))
    return [(batch.x.contiguous(memory_format=torch.channels_last), batch.valid) for batch in loader]


def _fit_steps(
    own: Sequence,  # of `training_inputs`
    other: Sequence,
) -> dict[str, Intervention]:
    "Fit all changes of inputs: those of the other modality, and random gains and offsets for the own one."
    fitted = {"moments": match_moments(other, own), "histogram": match_histogram(other, own)}
    fitted |= {"amplitude": match_amplitude(other, own), "inverted": invert_contrast(other)}
    n_channels = own[0][0].shape[1]
    return fitted | {f"{name} {k}": random_gain_offset(n_channels, *s, seed=k) for name, s in STRENGTHS.items() for k in range(DRAWS)}


@lru_cache(maxsize=2)  # one per modality: the nets and seeds of a study share them
def _prepare(run: Run, workspace: Workspace) -> tuple[dict[str, list], dict[str, Intervention]]:
    "Load the training inputs of both modalities and fit the interventions."
    engine = workspace.engine()
    streams = {"own": run.channels, "other": OTHER[run.channels]}
    inputs = {side: _training_inputs(run, workspace, channels, engine) for side, channels in streams.items()}
    return inputs, _fit_steps(inputs["own"], inputs["other"])


def _load_inputs(feed: TileDataset, engine: Engine) -> list:  # of x `(B, 3, H, W)`
    return [batch.x for batch in scoring_loader(feed.tiles, prepare=feed.prepare(engine.device))]


def _evaluate_arms(result: Result, workspace: Workspace) -> tuple[dict, np.ndarray]:
    "Score a trained net in every arm: arm → scores and medians of the divergence over layers; counts per tile, `(arms, N, C, 2)`."
    run, engine = result.run, workspace.engine()
    inputs, steps = _prepare(replace(run, norm="bn", seed=0), workspace)
    model = result.model().to(engine.device, memory_format=torch.channels_last)
    feeds = {"own": workspace.feed(run, "val", run.channels), "other": workspace.feed(run, "val", OTHER[run.channels])}
    own, other = measure(model, _load_inputs(feeds["own"], engine)), _load_inputs(feeds["other"], engine)
    found, counts = {}, []
    for name, arm in ARMS.items():
        chosen = [steps[step] for step in arm.steps]
        net = _adapt(model, inputs[arm.adapts_to], engine) if arm.adapts_to else model
        changed = apply_to(other, *chosen) if arm.tested_on == "other" else []
        if name == AS_IT_IS:  # scored when it was trained
            scores, tiles = result.scores[OTHER[run.channels]], result.tile_counts(OTHER[run.channels])
        else:
            chosen = [_in_turn(changed)] if changed else chosen
            with engine.autocast():  # weights are converted once, not for each batch
                scores, tiles = score_tiles(Intervened(net, *chosen), feeds[arm.tested_on], engine)
        found[name] = {"scores": scores}
        if changed:
            table = tabulate(own, measure(net, changed))
            found[name] |= {c: float(np.nanmedian(table[c])) for c in ("divergence", "median_channel")}
        counts.append(np.asarray(tiles))
    return found, np.stack(counts)


def _in_turn(batches: list) -> Intervention:
    "Return an intervention that gives stored inputs, in their order, for those of the same tiles."
    stored = iter(batches)
    return lambda x: next(stored).contiguous(memory_format=torch.channels_last)


def _adapt(model: nn.Module, inputs: list, engine: Engine) -> nn.Module:
    "Apply AdaBN in the precision of training."
    with engine.autocast():
        return adapt_norms(model, inputs)


_DESIGN = repr((ARMS, STRENGTHS, N_FIT))


def _is_evaluated(result: Result) -> bool:
    "Return True if a net is scored in every arm, as the arms are now."
    path = result.folder / "section7.json"
    return path.is_file() and (result.folder / "section7.npy").is_file() and read_json(path)["design"] == _DESIGN


def run_section7(
    result: Result,  # of a Run on `rgb` or `nir3`
    workspace: Workspace,
) -> tuple[dict, dict[str, np.ndarray]]:  # scores by arm, with divergence; arm → counts, `(N, C, 2)` int64
    "Score a net in every arm, or load it if already done."
    path, tiles = result.folder / "section7.json", result.folder / "section7.npy"
    if not _is_evaluated(result):
        found, counts = _evaluate_arms(result, workspace)
        write_array(tiles, counts)
        write_json(path, {"design": _DESIGN, "arms": found})
    return read_json(path)["arms"], dict(zip(ARMS, np.load(tiles, allow_pickle=False), strict=True))


_HERE_UP_TO = 500  # tiles to score; more are worth a second process


def _evaluate_group(runs: Sequence[Run], kwargs: dict, n_threads: int) -> None:
    "Score nets of one training modality, in a process of its own."
    torch.set_num_threads(n_threads)
    workspace = Workspace(**kwargs)
    for run in runs:
        run_section7(workspace.result(run), workspace)


def evaluate_nets(
    results: Sequence[Result],  # of Runs on `rgb` or `nir3`
    workspace: Workspace,
) -> None:
    "Score the nets that are not scored yet in every arm; on a CPU, long work takes a process per training modality."
    groups: dict[str, list[Run]] = {}
    for result in results:
        if not _is_evaluated(result):
            groups.setdefault(result.run.channels, []).append(result.run)
    n_tiles = sum(len(workspace.tiles(run, "val")) for runs in groups.values() for run in runs)
    if len(groups) < 2 or n_tiles <= _HERE_UP_TO or workspace.on_gpu:
        return  # `run_section7` does it when asked
    n_threads = max(torch.get_num_threads() // len(groups), 1)
    with ProcessPoolExecutor(len(groups), fork_server(__name__), exit_with_parent) as pool:
        list(pool.map(_evaluate_group, groups.values(), repeat(workspace.as_kwargs()), repeat(n_threads)))


def section7_scores(
    results: Sequence[Result],  # of `tables.fig2`
    workspace: Workspace,
) -> pd.DataFrame:  # per run and arm: trained_on, norm, seed, arm, experiment, tested_on, scores in %, divergence, median_channel, share_kept
    "Score all nets in all arms, and on their own modality as they are."
    evaluate_nets(results, workspace)
    rows = []
    for result in results:
        run, found = result.run, run_section7(result, workspace)[0]
        who = {"trained_on": run.channels, "norm": run.norm, "seed": run.seed}
        arms = {"own modality": ("", "own", {"scores": result.scores[run.channels]})}
        arms |= {name: (arm.experiment, arm.tested_on, found[name]) for name, arm in ARMS.items()}
        for name, (experiment, tested_on, values) in arms.items():
            means = {metric: 100 * values["scores"][metric]["mean"] for metric in _SCORES}
            medians = {c: values.get(c, np.nan) for c in ("divergence", "median_channel")}
            kept = means["multilabel"] / result.score(run.channels) if tested_on == "own" and result.score(run.channels) else np.nan
            rows.append({**who, "arm": name, "experiment": experiment, "tested_on": tested_on, **means, **medians, "share_kept": kept})
    return pd.DataFrame(rows)


def section7_classes(
    results: Sequence[Result],  # of `tables.fig2`
    workspace: Workspace,
) -> pd.DataFrame:  # per run, arm and class: trained_on, norm, seed, arm, class, iou, average_precision in %; NaN: absent
    "Tabulate the scores per class."
    rows = []
    for result in results:
        run, found = result.run, run_section7(result, workspace)[0]
        arms = {"own modality": result.scores[run.channels]} | {name: found[name]["scores"] for name in ARMS}
        for name, scores in arms.items():
            columns = (scores[metric]["per_class"] for metric in ("multilabel", "average_precision"))
            for label, *values in zip(run.edition.classes, *columns, strict=True):
                rows.append((run.channels, run.norm, run.seed, name, label, *(np.nan if v is None else 100 * v for v in values)))
    return pd.DataFrame(rows, columns=["trained_on", "norm", "seed", "arm", "class", "iou", "average_precision"])
