"""Companion to Yang et al. (CVPR-W 2020): the divergence of RGB and near-infrared features, and Switchable Normalization."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis.divergence import divergence as divergence
    from .losses import HybridLoss as HybridLoss
    from .metrics import AveragePrecision as AveragePrecision
    from .metrics import ChallengeIoU as ChallengeIoU
    from .metrics import MultilabelIoU as MultilabelIoU
    from .models.backbones import create_backbone as create_backbone
    from .models.deeplab import DeepLabV3Plus as DeepLabV3Plus
    from .models.norms import InstanceBatchNorm2d as InstanceBatchNorm2d
    from .models.norms import SwitchNorm2d as SwitchNorm2d
    from .predict.trained import TrainedModel as TrainedModel
    from .runs.run import plan_run as plan_run
    from .runs.workspace import Workspace as Workspace

_ROOMS = {
    "AveragePrecision": "metrics", "ChallengeIoU": "metrics", "DeepLabV3Plus": "models.deeplab", "HybridLoss": "losses",
    "InstanceBatchNorm2d": "models.norms", "MultilabelIoU": "metrics", "SwitchNorm2d": "models.norms", "TrainedModel": "predict.trained",
    "Workspace": "runs.workspace", "create_backbone": "models.backbones", "divergence": "analysis.divergence", "plan_run": "runs.run",
}  # fmt: skip


def __getattr__(name: str) -> object:
    "Import a public name from its module on first use, so that importing the package loads no torch (PEP 562)."
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
