"""Compiled kernels for the CPU, in `csrc/cpu`; `backend.py` is what the operations see of them."""
