"""Check the fields of a Run before anything is written."""

from __future__ import annotations

from agrivision_repro.core import check_choice
from agrivision_repro.data.batches import AUGMENTATIONS, CHANNELS, SAMPLERS
from agrivision_repro.models.backbones import DEPTHS, DILATIONS, NORMS
from agrivision_repro.runs.run import Run, build_intervention, build_loss

MAX_SEED = 2**31 - 1  # seeds of PyTorch, which must be below 2⁶⁴, are derived from it
_CHOICES = {  # registries as they are: a user may add to them
    "channels": CHANNELS, "statistics": ("imagenet", "dataset"), "depth": DEPTHS, "norm": NORMS, "low_level": (1, 3),
    "output_stride": DILATIONS, "shared_places": ("val", "train", "keep"),
}  # fmt: skip
_RECIPE_CHOICES = {"augmentation": AUGMENTATIONS, "sampler": SAMPLERS}
_RECIPE_LEAST = {
    "warmup": 0, "constant": 0, "decay": 0, "stop": 0, "lr": 0, "momentum": 0, "weight_decay": 0, "batch_size": 1, "crop": 0,
    "width": 1 / 256, "recalibrate": 0, "evaluate_every": 1, "max_val_tiles": 0,
}  # fmt: skip


def check_run(run: Run) -> None:
    "Raise ValueError if a field of a Run or of its recipe has a value with which nothing can be trained."
    recipe = run.recipe
    for chosen, start, choices in ((run, "", _CHOICES), (recipe, "recipe.", _RECIPE_CHOICES)):
        for name, allowed in choices.items():
            check_choice(start + name, getattr(chosen, name), tuple(allowed))
    for name, least in _RECIPE_LEAST.items():
        if not getattr(recipe, name) >= least:
            raise ValueError(f"recipe.{name} is {getattr(recipe, name)}: wanted at least {least}")
    n_planned = recipe.warmup + recipe.constant + recipe.decay
    if not 1 <= recipe.iterations <= n_planned:
        raise ValueError(f"the recipe has {recipe.iterations} iterations: wanted 1 to {n_planned}, its warmup + constant + decay; see recipe.stop")
    if not 0 <= run.seed <= MAX_SEED:
        raise ValueError(f"seed is {run.seed}: wanted 0 to {MAX_SEED} (2^31 - 1)")
    build_loss(run), build_intervention(run)
