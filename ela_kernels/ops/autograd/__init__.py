"""What the autograd nodes of all operations share: the record of the pull form, saved tensors, operators, tracing."""
