"""Models for `torch.hub.load("agrivision-repro/agrivision_repro", NAME, …)`: nets with random or ImageNet weights, and trained models."""

dependencies = [
    "torch", "torchvision", "timm", "torchmetrics", "accelerate", "safetensors", "huggingface_hub",
    "numpy", "pandas", "matplotlib", "PIL", "tifffile", "tqdm", "filelock",
]  # fmt: skip

from agrivision_repro.models.backbones import create_backbone as backbone  # noqa: E402, F401
from agrivision_repro.models.deeplab import DeepLabV3Plus as deeplabv3plus  # noqa: E402, F401
from agrivision_repro.predict.trained import TrainedModel  # noqa: E402

trained = TrainedModel.from_pretrained  # a folder of `agrivision share`, or OWNER/NAME on the Hugging Face Hub
