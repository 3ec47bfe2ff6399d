"""Layer attention in Triton: no build step, NVIDIA and AMD, and NumPy's interpreter for tests.

`forward_kernels.py` and `backward_kernels.py` hold the kernels of the attention, `producer_kernels.py` and
`row_kernels.py` those that make query, key and value and take their gradients back, `norm_kernels.py` those of a
residual block's end, `tiles.py` what they share. `plan.py` says how a call is cut into programs; `launch.py` and
`launch_backward.py` call the kernels of the attention, `producer.py` those around it, `norm.py` those of the block's
end, and `layer.py` puts a whole layer together.
"""

from ela_kernels.backends.gpu_tables import Retrieved
from ela_kernels.backends.triton.attention import (
    forward,
    weights,
)
from ela_kernels.backends.triton.attention_backward import (
    backward,
    gather,
)

__all__ = ["Retrieved", "backward", "forward", "gather", "weights"]
