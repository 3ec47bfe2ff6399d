"""The light form of layer attention: no history, only the output of the layer before.

`interface.py` is the operation, `layer.py` a whole layer in one autograd node, and `choice.py` says which backend's
kernels serve it.
"""

from ela_kernels.ops.light_layer_attention.interface import light_layer_attention

__all__ = ["light_layer_attention"]
