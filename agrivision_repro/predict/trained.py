"""A trained model with all that its user needs: a folder of weights and a description, which needs neither the Run nor its data."""

from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from agrivision_repro.core import REPOSITORY
from agrivision_repro.data.batches import CHANNELS
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.plots import CLASS_COLORS
from agrivision_repro.runs.run import model_options

if TYPE_CHECKING:
    from agrivision_repro.runs.store import Result


@dataclass(frozen=True)
class About:
    "The description of a trained model, of JSON types."

    title: str  # model and training data, outside of which its maps are unreliable
    data: str  # the edition that it was trained on
    classes: tuple[str, ...]  # of the logits, background first
    colors: tuple[str, ...]  # of each class, `#rrggbb`
    channels: str  # its input: a key of `batches.CHANNELS`
    statistics: tuple[tuple[float, ...], ...]  # mean and standard deviation of R, G, B, NIR, of values in [0, 1]
    window: int  # side of the crops that it was trained on, pixels
    options: dict  # of `DeepLabV3Plus`

    def __post_init__(self):
        "Turn the lists of a JSON file into tuples, so that descriptions compare."
        for name, values in {"classes": self.classes, "colors": self.colors, "statistics": map(tuple, self.statistics)}.items():
            object.__setattr__(self, name, tuple(values))


class TrainedModel(
    nn.Module, PyTorchModelHubMixin, library_name="agrivision_repro", repo_url=REPOSITORY, pipeline_tag="image-segmentation"
):  # fmt: skip
    "A model from bytes to logits: it selects and normalizes its channels itself."

    def __init__(
        self,
        config: About,  # the mixin's name: it writes `config.json`
        net: DeepLabV3Plus | None = None,  # None: random weights
    ):
        super().__init__()
        self.about, self.chosen = config, list(CHANNELS[config.channels])
        self.net = net or DeepLabV3Plus(**config.options, pretrained=False)
        for name, values in zip(("mean", "std"), config.statistics, strict=True):
            self.register_buffer(name, 255 * torch.tensor(values)[self.chosen, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:  # R, G, B, NIR, `(B, 4, H, W)` uint8, to logits `(B, C, H, W)`
        x = (images[:, self.chosen].to(self.mean.dtype) - self.mean) / self.std
        return self.net(x.contiguous(memory_format=torch.channels_last))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,  # a folder of `save_pretrained` or `agrivision share`, or OWNER/NAME on the Hub
        **options,  # of `PyTorchModelHubMixin.from_pretrained`
    ) -> "TrainedModel":
        "Load a model, in evaluation mode; raise ValueError if it cannot be loaded completely."
        try:
            if Path(source).is_dir() and (lacking := {"config.json", "model.safetensors"} - {p.name for p in Path(source).iterdir()}):
                raise ValueError(f"without {' and '.join(sorted(lacking))}")
            with redirect_stdout(None):  # the mixin prints
                return super().from_pretrained(source, strict=True, **options)
        except Exception as error:  # a stranger's files, or the network
            reason = " ".join(str(error).split())[:200]
            wanted = "wanted a folder written by agrivision share, or OWNER/NAME on the Hub"
            raise ValueError(f"{source} is not a complete model ({reason}): {wanted}") from error


def describe_model(result: "Result") -> About:
    "Describe a Run's model for its users; raise ValueError if it does not fit other images."
    run = result.run
    if run.intervention == "match_nir":
        raise ValueError("the model was trained on NIR matched to red (match_nir), which other images are not: choose another run")
    classes, title = run.edition.classes, f"{run.title}: {run.recipe.iterations:,} iterations on {run.edition.title}"
    window = run.recipe.crop or 512  # whole tiles of the challenge
    colors = CLASS_COLORS[: len(classes)]
    return About(title, run.source.name, classes, colors, run.channels, result.statistics, window, model_options(run))


def load_trained(
    result: "Result",
    checkpoint: str = "last",  # or "best"
    channels: str = "",  # a test input of the Run; "": the training input
) -> TrainedModel:
    "Load a finished Run's model, in evaluation mode, on the CPU."
    about = describe_model(result)
    return TrainedModel(replace(about, channels=channels or about.channels), result.model(checkpoint)).eval()
