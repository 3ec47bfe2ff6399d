"""The light form of layer attention: no history, only the output of the layer before."""

from ela_kernels.ops.light_layer_attention.interface import light_layer_attention

__all__ = ["light_layer_attention"]
