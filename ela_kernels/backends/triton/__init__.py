"""Kernels in Triton: no build step, NVIDIA and AMD, and NumPy's interpreter for tests.

`backend.py` is what the operations see. `kernels/` holds the kernels by what they compute, `plan.py` says how a call is
cut into programs; `attention.py` and `attention_backward.py` launch the kernels of the attention, `producer.py` those
around it, `norm.py` those of a block's end, `layer.py` and `light.py` put whole layers together.
"""
