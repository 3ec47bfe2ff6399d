"""Fused kernels for layer attention in deep networks, and ELA, which skips the retrievals that repeat themselves."""

# ruff: noqa: E402

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ela_kernels.interrupts import end_at_once as _end_at_once

_end_at_once()  # before PyTorch is imported, which takes seconds

from ela_kernels.analysis import analyze
from ela_kernels.backends import backend_status, use_backend
from ela_kernels.conversion import ConversionReport, convert, unconvert
from ela_kernels.ebqm import EBQM, prune
from ela_kernels.explaining import explain
from ela_kernels.modules import ELA, AttentionResidual, LayerAttention, LightLayerAttention
from ela_kernels.ops.depth_mix import depth_mix
from ela_kernels.ops.layer_attention import (
    LayerAttentionOutput,
    LayerAttentionWeights,
    LayerHistory,
    layer_attention,
    layer_attention_weights,
)
from ela_kernels.ops.light_layer_attention import light_layer_attention
from ela_kernels.ops.position_attention import (
    PositionAttentionOutput,
    PositionHistory,
    position_attention,
)
from ela_kernels.warming import warmup

if _TYPE_CHECKING:
    from ela_kernels import integrations as integrations
    from ela_kernels import models as models

__version__ = "0.2.0"

__all__ = [
    "EBQM",
    "ELA",
    "AttentionResidual",
    "ConversionReport",
    "LayerAttention",
    "LayerAttentionOutput",
    "LayerAttentionWeights",
    "LayerHistory",
    "LightLayerAttention",
    "PositionAttentionOutput",
    "PositionHistory",
    "__version__",
    "analyze",
    "backend_status",
    "convert",
    "depth_mix",
    "explain",
    "layer_attention",
    "layer_attention_weights",
    "light_layer_attention",
    "position_attention",
    "prune",
    "unconvert",
    "use_backend",
    "warmup",
]

# The subpackages that are for users. Networks and what is for them are imported when they are asked for.
_SUBPACKAGES = ("analysis", "ebqm", "integrations", "models", "modules")


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_SUBPACKAGES))
