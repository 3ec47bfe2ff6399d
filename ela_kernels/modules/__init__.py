"""Layer attention as PyTorch modules."""

from ela_kernels.modules.attention_residual import AttentionResidual
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.light import LightLayerAttention
from ela_kernels.modules.published import ConcatHistory, ConcatLayerAttention

__all__ = [
    "ELA",
    "AttentionResidual",
    "ConcatHistory",
    "ConcatLayerAttention",
    "LayerAttention",
    "LightLayerAttention",
]


def __dir__() -> list[str]:
    return sorted(__all__)
