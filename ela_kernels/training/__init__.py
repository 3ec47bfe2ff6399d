"""The training program: `python -m ela_kernels train`."""
