"""Layer attention: aggregation over all earlier layers and the divergence between adjacent layers' weights."""

from ela_kernels.ops.layer_attention.history import LayerHistory
from ela_kernels.ops.layer_attention.interface import (
    LayerAttentionOutput,
    LayerAttentionWeights,
    layer_attention,
    layer_attention_weights,
)

__all__ = [
    "LayerAttentionOutput",
    "LayerAttentionWeights",
    "LayerHistory",
    "layer_attention",
    "layer_attention_weights",
]
