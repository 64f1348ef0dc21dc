"""Evaluate recipes on ResNet101 alone, on a held-out part of the *training* tiles; append one table row per recipe and seed.

usage: tune_recipe.py DATA TABLE.csv [--data-root DIR] [--out DIR] [--seeds 0,1] [--channels rgb] [--n-train N]
       [--scale laptop] [--device cpu]
       FIELD=VALUE[,FIELD=VALUE ...] ...

Each argument is one recipe: the fields of `Recipe` in which it differs from the scale's. `iterations=N` keeps the paper's
proportions of constant phase and decay. Rows already in the table are not run again.
"""

import argparse
import os
import time
from ast import literal_eval
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from agrivision_repro.data.batches import TileDataset, thin_out
from agrivision_repro.data.editions import find_edition
from agrivision_repro.runs.run import Run, build_loss, build_model, plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.training.evaluate import score_tiles
from agrivision_repro.training.loop import Trainer, fit, recalibrate_norms
from agrivision_repro.training.schedule import Recipe

HELD_OUT = 4  # one in so many places of the training tiles is held out for scoring


def read_recipe(base: Recipe, words: str) -> Recipe:
    "Set fields of a recipe by name."
    fields = dict(word.split("=") for word in words.split(","))
    changes = {name: literal_eval(value) if value[0] in "0123456789" else value for name, value in fields.items()}
    n, warmup = changes.pop("iterations", base.iterations), changes.pop("warmup", base.warmup)
    left = n - warmup
    constant = round(left * 7 / 24)  # the paper's 7,000 and 17,000 after its warm-up
    return replace(base, warmup=warmup, constant=constant, decay=left - constant, **changes)


def split_training(run: Run, workspace: Workspace, n_train: int) -> tuple[TileDataset, TileDataset]:
    "Split the training tiles by place into at most `n_train` for training and the rest for scoring."
    feed, places = workspace.feed(run, "train"), workspace.open(run.source, "train").fields
    fields = [places[k] for k in workspace.kept(run, "train")]
    held = set(sorted(set(fields))[::HELD_OUT])
    kept, scored = ([feed.tiles[k] for k, f in enumerate(fields) if (f in held) == is_held] for is_held in (False, True))
    return replace(feed, tiles=thin_out(kept, n_train)), replace(feed, tiles=thin_out(scored, run.recipe.max_val_tiles))


def last_norms(model: torch.nn.Module) -> float:
    "Return the mean |gamma| of the residual branches' last norms."
    blocks = [b for k in (1, 2, 3, 4) for b in model.backbone.get_submodule(f"layer{k}")]
    return float(torch.cat([(b.bn3 if hasattr(b, "bn3") else b.bn2).weight.detach().abs() for b in blocks]).mean())


def try_recipe(run: Run, workspace: Workspace, state: Path, n_train: int) -> dict:
    "Train on one part of the training tiles and score on the other, before and after recalibration."
    engine, (train, held) = workspace.engine(), split_training(run, workspace, n_train)
    recipe, began = replace(run.recipe, recalibrate=0), time.monotonic()
    trainer = Trainer(build_model(run), build_loss(run), recipe, seed=run.seed, engine=engine)
    fit(trainer, train, state, title=run.title, save_every=10**9)
    seconds, losses = time.monotonic() - began, torch.stack(trainer.history)[:, 1]
    trainer.recipe, n = run.recipe, len(losses) // 10
    stale = score_tiles(trainer.bare_model, held, engine)[0]
    recalibrate_norms(trainer, train)
    fresh = score_tiles(trainer.bare_model, held, engine)[0]
    row = {"seconds": round(seconds), "loss": float(losses[-n:].mean()), "tenth before": float(losses[-2 * n : -n].mean())}
    row |= {"stale": stale["multilabel"]["mean"], **{name: s["mean"] for name, s in fresh.items()}}
    row["background_only"] = fresh["challenge"]["background_only"]
    return row | {"last gamma": last_norms(trainer.bare_model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data"), parser.add_argument("table", type=Path), parser.add_argument("recipes", nargs="+")
    parser.add_argument("--data-root", default=""), parser.add_argument("--out", default="out/tuning")
    parser.add_argument("--seeds", default="0"), parser.add_argument("--channels", default="rgb")
    parser.add_argument("--n-train", type=int, default=0, help="maximum number of training tiles, evenly spread; 0: all")
    parser.add_argument("--scale", default="laptop"), parser.add_argument("--device", default="cpu", help="cpu or auto")
    args = parser.parse_args()
    workspace = Workspace(args.out, args.data_root, args.device)
    for words in args.recipes:
        for seed in map(int, args.seeds.split(",")):
            key = {"data": find_edition(args.data).name, "channels": args.channels, "recipe": words, "seed": seed}
            run = plan_run(args.scale, args.data, channels=args.channels, seed=seed, lovasz=1.0)
            run = replace(run, recipe=read_recipe(run.recipe, words))
            known = pd.read_csv(args.table) if args.table.exists() else pd.DataFrame(columns=list(key))
            if (known[list(key)].astype(str) == {k: str(v) for k, v in key.items()}).all(axis=1).any():
                continue
            row = key | try_recipe(run, workspace, Path(args.out) / f"tuning-{os.getpid()}" / "state.safetensors", args.n_train)
            known = pd.read_csv(args.table) if args.table.exists() else pd.DataFrame()
            pd.concat([known, pd.DataFrame([row])]).round(4).to_csv(args.table, index=False)
            print(row, flush=True)


if __name__ == "__main__":
    main()
