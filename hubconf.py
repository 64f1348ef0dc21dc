"""Models for `torch.hub.load("agrivision-repro/agrivision_repro", NAME, …)`; random weights, or ImageNet's for the backbone."""

dependencies = ["torch", "torchvision", "timm", "torchmetrics", "accelerate", "safetensors"]

from agrivision_repro.models.backbones import create_backbone as backbone  # noqa: E402, F401
from agrivision_repro.models.deeplab import DeepLabV3Plus as deeplabv3plus  # noqa: E402, F401
