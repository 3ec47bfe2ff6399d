"""The Triton kernels themselves, by what they compute; `tiles.py` is what they share."""
