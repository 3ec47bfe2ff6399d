"""`python -m ela_kernels bench`: what the kernels are worth on this machine, by the installed package alone."""
