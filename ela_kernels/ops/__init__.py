"""The operations: each in a folder with its reference, its autograd and its public function."""
