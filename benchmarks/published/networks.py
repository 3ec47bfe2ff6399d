"""Every shape of network here, small: how it is made, what it is called with, and what can be said of its layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from benchmarks.published.deit import DeiT
from benchmarks.published.dla import DLAResNet
from benchmarks.published.filters import RawAttention, RawLinearAttention
from benchmarks.published.kcla import NormWeightedResNet
from benchmarks.published.linear import LinearResNet
from benchmarks.published.resnet_base import BaseResNet, ContextResNet
from benchmarks.published.resnet_light import LightBackbone, LightResNet


class Published(NamedTuple):
    """A network in a published shape.

    `layers`: how many attention layers it has. `softmax`: whether all of them are the base form, of keys and values
    that each layer makes once, or the light form: what this package computes. The others compute something else.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: int
    softmax: bool = True


CIFAR = (3, 3, 8, 8)
IMAGES = (3, 3, 32, 32)
TOKENS = (3, 3, 16, 16)
DEPTHS = (3, 2)

_cifar: dict[str, Any] = {"width": 8, "dim_perhead": 8, "drop": 0.3, "image": 8}
_images: dict[str, Any] = {"width": 8, "dim_perhead": 8, "drop": 0.3}
_tokens: dict[str, Any] = {
    "image": 16,
    "patch": 4,
    "dim": 32,
    "depth": 5,
    "heads": 2,
    "dim_perhead": 8,
    "drop": 0.3,
}
_basic: dict[str, Any] = {**_cifar, "dim_perhead": 4, "basic": True}

NETWORKS = {
    "base cifar": Published(partial(BaseResNet, DEPTHS, **_cifar), CIFAR, 5),
    "base cifar, basic blocks": Published(partial(BaseResNet, DEPTHS, **_basic), CIFAR, 5),
    "base imagenet": Published(partial(BaseResNet, DEPTHS, stem="deep", **_images), IMAGES, 5),
    "base imagenet, no activation": Published(
        partial(BaseResNet, DEPTHS, stem="imagenet", activated=False, **_images), IMAGES, 5
    ),
    "base imagenet, channel-wise, gates": Published(
        partial(BaseResNet, DEPTHS, stem="deep", channel_wise=True, se=True, eca=3, **_images),
        IMAGES,
        5,
    ),
    "light cifar": Published(partial(LightResNet, DEPTHS, **_cifar), CIFAR, 5),
    "light cifar, basic blocks": Published(partial(LightResNet, DEPTHS, **_basic), CIFAR, 5),
    "light imagenet": Published(
        partial(LightResNet, DEPTHS, stem="imagenet", **_images), IMAGES, 5
    ),
    "light imagenet, gates": Published(
        partial(LightResNet, DEPTHS, stem="imagenet", se=True, eca=3, **_images), IMAGES, 5
    ),
    "light backbone": Published(partial(LightBackbone, DEPTHS, 8, dim_perhead=8), IMAGES, 5),
    "base tokens": Published(partial(DeiT, "base", every=2, **_tokens), TOKENS, 5),
    "light tokens": Published(partial(DeiT, "light", **_tokens), TOKENS, 5),
    "dynamic base": Published(partial(DLAResNet, "base", DEPTHS, **_cifar), CIFAR, 5),
    "dynamic light": Published(partial(DLAResNet, "light", DEPTHS, **_cifar), CIFAR, 5),
    "dynamic light, imagenet": Published(
        partial(
            DLAResNet,
            "light",
            DEPTHS,
            stem="imagenet",
            reduction=16,
            names=("mrla", "extict"),
            **_images,
        ),
        IMAGES,
        5,
    ),
    "equation (4)": Published(partial(ContextResNet, DEPTHS, **_images), IMAGES, 5, False),
    "raw features": Published(
        partial(BaseResNet, DEPTHS, attention=RawAttention, **_cifar), CIFAR, 5, False
    ),
    "raw features, linear": Published(
        partial(BaseResNet, DEPTHS, attention=RawLinearAttention, activated=False, **_cifar),
        CIFAR,
        5,
        False,
    ),
    "linear": Published(partial(LinearResNet, DEPTHS, **_cifar), CIFAR, 5, False),
    "norms of keys": Published(partial(NormWeightedResNet, DEPTHS, **_cifar), CIFAR, 5, False),
}
