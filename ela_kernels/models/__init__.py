"""Networks with layer attention."""

from ela_kernels.models.resnet import ResNet
from ela_kernels.models.vit import VisionTransformer
from ela_kernels.models.weights import LoadedWeights, load_weights
from ela_kernels.models.zoo import (
    MODELS,
    CifarResNet,
    build_model,
    resnet18,
    resnet20,
    resnet26,
    resnet32,
    resnet34,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    vit_small,
    vit_tiny,
)

__all__ = [
    "MODELS",
    "CifarResNet",
    "LoadedWeights",
    "ResNet",
    "VisionTransformer",
    "build_model",
    "load_weights",
    "resnet18",
    "resnet20",
    "resnet26",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "vit_small",
    "vit_tiny",
]


def __dir__() -> list[str]:
    return sorted(__all__)
