"""Which Runs and which notebook each table and figure needs."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import agrivision_repro
from agrivision_repro.runs.check import MAX_SEED
from agrivision_repro.runs.run import Run, plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study.paper import PAPER_NORMS

STUDIED_NORMS = PAPER_NORMS  # trained for Table 2 and Figure 2: names in `backbones.NORMS`


def table1(
    scale: str = "smoke",  # a key of `runs.run.SCALES`
    data: str = "synthetic",  # a key of `data.editions.EDITIONS`
    seeds: Sequence[int] = (0,),  # one run of each kind per seed
    lambda1: float = 1.0,  # weight of Dice in the loss (eq. 10)
    lambda2: float = 1.0,  # weight of Lovász in the loss (eq. 10)
) -> list[Run]:
    "Return the Runs of Table 1: ResNet101 on RGB and on NIR."
    return [
        plan_run(scale, data, channels=channels, seed=seed, dice=float(lambda1), lovasz=float(lambda2))
        for seed in check_seeds(seeds)
        for channels in ("rgb", "nir3")
    ]


def table_of(
    stem: str,  # name of a table or figure, without its ending
) -> str:  # a key of `TABLES`; "": none
    "Return the table whose notebook makes a file: its name, or the longest that is followed by - or _."
    return max((t for t in TABLES if stem == t or stem.startswith((f"{t}-", f"{t}_"))), key=len, default="")


def check_seeds(
    seeds: Sequence[int] | int | str,  # a list, one number, or numbers separated by commas, as on a command line
) -> list[int]:
    "Return seeds as a list; raise ValueError unless there is at least one and all are different non-negative integers."
    try:
        if isinstance(seeds, str):
            seeds = [int(word) for word in seeds.strip("[]").split(",")]
    except ValueError as error:
        raise ValueError(f"seeds are {seeds!r}: wanted whole numbers separated by commas, like 0,1,2") from error
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if not seeds or any(not isinstance(s, int) or not 0 <= s <= MAX_SEED for s in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {seeds}: wanted at least one, all different integers from 0 to 2^31 - 1")
    return seeds


def fig2(
    scale: str = "smoke",  # a key of `runs.run.SCALES`
    data: str = "synthetic",  # a key of `data.editions.EDITIONS`
    seeds: Sequence[int] = (0,),  # one run of each kind per seed
    lambda1: float = 1.0,  # weight of Dice in the loss (eq. 10)
    lambda2: float = 1.0,  # weight of Lovász in the loss (eq. 10)
) -> list[Run]:
    "Return the Runs of Figure 2, and of the nets that we add: each net on RGB and on NIR."
    own = {"scale": scale, "data": data, "dice": float(lambda1), "lovasz": float(lambda2)}
    nets = [(norm, channels) for norm in STUDIED_NORMS for channels in ("rgb", "nir3")]
    return [plan_run(**own, channels=c, norm=norm, seed=seed) for seed in check_seeds(seeds) for norm, c in nets]


def table2(
    scale: str = "smoke",  # a key of `runs.run.SCALES`
    data: str = "synthetic",  # a key of `data.editions.EDITIONS`
    seeds: Sequence[int] = (0,),  # one run of each kind per seed
) -> list[Run]:
    "Return the Runs of Table 2: eight backbones with BCE + Dice on NRGB; beyond the paper, two of them on other channels."
    nets = [(depth, norm, "rgbn") for depth in (50, 101) for norm in STUDIED_NORMS]
    nets += [(101, "ibn_s", c) for c in ("rgbr", "rgb", "nir3")] + [(101, "bn", "rgb")]
    return [plan_run(scale, data, seed=s, depth=d, norm=n, channels=c) for s in check_seeds(seeds) for d, n, c in nets]


def table3(
    scale: str = "smoke",  # a key of `runs.run.SCALES`
    data: str = "synthetic",  # a key of `data.editions.EDITIONS`
    seeds: Sequence[int] = (0,),  # one run of each kind per seed
) -> list[Run]:
    "Return the Runs of Table 3: IBN-Net101-a on NRGB with each loss; beyond the paper, its best model."
    weights = [(float(dice), float(lovasz)) for lovasz in (0, 1) for dice in (0, 1)]
    own = [plan_run(scale, data, norm="ibn_a", seed=seed, dice=d, lovasz=lv) for seed in check_seeds(seeds) for d, lv in weights]
    return own + fig3(scale, data, seeds)


def fig3(
    scale: str = "smoke",  # a key of `runs.run.SCALES`
    data: str = "synthetic",  # a key of `data.editions.EDITIONS`
    seeds: Sequence[int] = (0,),  # one run per seed; the first is drawn
) -> list[Run]:
    "Return the Runs of Figure 3: IBN-Net101-s with the hybrid loss."
    return [plan_run(scale, data, norm="ibn_s", seed=seed, lovasz=1.0) for seed in check_seeds(seeds)]


def section7_trained(
    scale: str = "smoke",  # a key of `runs.run.SCALES`
    data: str = "synthetic",  # a key of `data.editions.EDITIONS`
    seeds: Sequence[int] = (0,),  # one run of each kind per seed
) -> list[Run]:
    "Return the Runs of section 7 that need training, and the plain ones that they are compared with, each once."
    rgb, nrgb = {"channels": "rgb", "lovasz": 1.0}, {"channels": "rgbn"}  # as in Figure 2 and as in Table 2
    arms = [nrgb | {"norm": norm, "intervention": name} for name in ("", "match_nir") for norm in ("bn", "ibn_a", "ibn_s")]  # E3
    arms += [rgb | {"intervention": name} for name in ("", "kl(0.01)", "kl(0.03)", "kl(0.1)", "kl(0.3)", "sham(0.1)")]  # E4
    arms += [rgb | {"intervention": f"random_statistics({strength})"} for strength in (0.25, 0.5, 1)]  # E5, against IBN-a
    arms += [rgb | {"norm": "ibn_s", "intervention": f"switches({order})"} for order in ("bn", "uniform", "shuffled")]  # E7
    arms += [rgb | {"norm": norm, "intervention": name} for name in ("", "invert(0.5)") for norm in ("bn", "ibn_a", "ibn_s")]  # E9
    arms += [rgb | {"norm": norm, "channels": channels} for norm in ("bn", "ibn_a", "ibn_s", "gn") for channels in ("rgb", "nir3")]  # baselines
    arms += [nrgb | {"norm": "gn"}, nrgb | {"intervention": "modality_dropout"}]
    return list(dict.fromkeys(plan_run(scale, data, seed=seed, **arm) for seed in check_seeds(seeds) for arm in arms))


def all_runs(
    scale: str = "smoke",  # a key of `runs.run.SCALES`
    data: str = "synthetic",  # a key of `data.editions.EDITIONS`
    seeds: Sequence[int] = (0,),  # one run of each kind per seed
    lambda1: float = 1.0,  # weight of Dice in the loss of Table 1 and Figure 2 (eq. 10)
    lambda2: float = 1.0,  # weight of Lovász in the same loss
) -> list[Run]:
    "Return every Run of the paper, and those that we add, each once."
    hybrid = {"lambda1": lambda1, "lambda2": lambda2}
    both = table1(scale, data, seeds, **hybrid) + fig2(scale, data, seeds, **hybrid)
    return list(dict.fromkeys(both + table2(scale, data, seeds) + table3(scale, data, seeds)))


def no_runs() -> list[Run]:
    "Return no Runs."
    return []


TABLES: dict[str, Callable[..., list[Run]]] = {  # notebook → its Runs, in reading order
    "claims": all_runs,
    "table1_modality": table1,
    "table2_backbones": table2,
    "table3_losses": table3,
    "fig1_blocks": no_runs,
    "fig2_divergence": fig2,
    "section7": fig2,  # interventions need no training
    "section7_trained": section7_trained,
    "fig3_predictions": fig3,
    "fig_schedule": no_runs,
}
ON_REQUEST = ("section7_trained",)  # made only when it is named: nearly as many runs as all others


def table_notebook(
    name: str,  # a key of `TABLES`
) -> Path:
    "Return the path of a table's notebook, in a checkout or in an installed package."
    package = Path(agrivision_repro.__file__).resolve().parent
    found = [p for p in (package / "notebooks", package.parent / "nbs" / "tables") if (p / f"{name}.ipynb").is_file()]
    if not found:
        raise FileNotFoundError(f"{name}.ipynb is in no folder of the package: wanted one of {', '.join(TABLES)}")
    return found[0] / f"{name}.ipynb"


def known_parameters(
    table: Callable[..., list[Run]],  # a value of `TABLES`
    *others: str,  # names of the notebook's own parameters
) -> set[str]:
    "Return the names of a table notebook's parameters."
    own = {p.name for p in inspect.signature(Workspace).parameters.values() if p.kind is not p.KEYWORD_ONLY}
    return own | set(inspect.signature(table).parameters) | set(others)


def refuse_unknown(
    cells: Sequence[str],  # sources executed so far: IPython's `In`
    table: Callable[..., list[Run]],  # a value of `TABLES`
    *others: str,  # names of the notebook's own parameters
) -> None:
    "Check that papermill set only parameters of the notebook; raise ValueError if not."
    for source in cells:
        if source.startswith("# Parameters\n"):
            names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
            unknown = sorted(names - known_parameters(table, *others) - {"True", "False", "None"})
            if unknown:
                known = ", ".join(sorted(known_parameters(table, *others)))
                raise ValueError(f"unknown parameter {', '.join(unknown)}: this notebook accepts {known}")
