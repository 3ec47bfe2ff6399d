"""The light form of layer attention: no history, only the output of the layer before.

`interface.py` is the operation, `layer.py` a whole layer in one autograd node, `plan.py` says which kernels serve it,
and `history.py` keeps the previous output for it.
"""

from ela_kernels.ops.light_layer_attention.interface import light_layer_attention

__all__ = ["light_layer_attention"]
