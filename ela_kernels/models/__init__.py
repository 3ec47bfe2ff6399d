"""Networks with layer attention."""

from ela_kernels.models.resnet import (
    MODELS,
    CifarResNet,
    ResNet,
    build_model,
    resnet20,
    resnet32,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
)

__all__ = [
    "MODELS",
    "CifarResNet",
    "ResNet",
    "build_model",
    "resnet20",
    "resnet32",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
]


def __dir__() -> list[str]:
    return sorted(__all__)
