"""Fused kernels for layer attention in deep networks, and ELA, which skips the retrievals that repeat themselves."""

from __future__ import annotations

from ela_kernels.backends import backend_status, use_backend
from ela_kernels.ebqm import EBQM, prune
from ela_kernels.modules import ELA, LayerAttention, LightLayerAttention, convert, unconvert
from ela_kernels.ops.layer_attention import (
    LayerAttentionOutput,
    LayerAttentionWeights,
    LayerHistory,
    layer_attention,
    layer_attention_weights,
    warmup,
)
from ela_kernels.ops.light_layer_attention import light_layer_attention

__version__ = "0.1.0"

__all__ = [
    "EBQM",
    "ELA",
    "LayerAttention",
    "LayerAttentionOutput",
    "LayerAttentionWeights",
    "LayerHistory",
    "LightLayerAttention",
    "__version__",
    "backend_status",
    "convert",
    "layer_attention",
    "layer_attention_weights",
    "light_layer_attention",
    "prune",
    "unconvert",
    "use_backend",
    "warmup",
]
