"""The sum of feature maps over depth by weights that are given, as DenseFormer and dynamic layer attention have it.

`interface.py` is the operation, `autograd.py` what autograd and compiled graphs see of it, `reference.py` the formula.
"""

from ela_kernels.ops.depth_mix.interface import depth_mix

__all__ = ["depth_mix"]
