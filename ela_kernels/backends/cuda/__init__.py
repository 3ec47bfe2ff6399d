"""Compiled kernels in CUDA C++, in `csrc/cuda`; `backend.py` is what the operations see of them."""
