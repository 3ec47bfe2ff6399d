"""The operations: each in a folder with its reference, its kernels' glue, its autograd and its public function."""
