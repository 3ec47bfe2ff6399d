"""The light form of layer attention: no history, only the output of the layer before.

`interface.py` is the operation, `layer.py` a whole layer in one autograd node. The kernels of a whole layer have the
interface in `light_kernels.py`: `cpp_layer.py` calls those of the CPU, `triton_layer.py` those in `triton_kernels.py`.
"""

from ela_kernels.ops.light_layer_attention.interface import light_layer_attention

__all__ = ["light_layer_attention"]
