"""Layer attention in Triton: no build step, NVIDIA and AMD, and NumPy's interpreter for tests.

`forward_kernels.py` and `backward_kernels.py` hold the kernels, `tiles.py` what they share, `plan.py` how a call is cut
into programs, and `launch.py` calls them.
"""

from ela_kernels.ops.layer_attention.gpu import Retrieved
from ela_kernels.ops.layer_attention.triton_kernels.launch import (
    backward,
    forward,
    gather,
    weights,
)

__all__ = ["Retrieved", "backward", "forward", "gather", "weights"]
