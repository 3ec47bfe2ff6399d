"""Networks with layer attention in the shapes in which they were published, written anew.

Module trees, names and order of parameters, arguments of the layers and the way of keys and values from block to block
are those of the published code, so that its checkpoints load; the sizes are arguments. What is measured and tested on
these holds for code that knows nothing of this package.
"""
