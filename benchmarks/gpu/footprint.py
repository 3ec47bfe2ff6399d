"""The least bytes that each operation must move: every input read once, every result written once.

With M the bytes of one map (B * C * N elements), R those of a query or key (B * C elements) and W those of the
weights (B * G * T float32 numbers) of a layer that retrieves from T layers:

    forward      reads T maps, T keys, the query; writes one map and the weights         (T + 1) M + (T + 1) R + W
    dots         reads T maps and the output's gradient, T keys, the query, the weights; writes the gradients of
                 scores and query                                                        (T + 1) M + (T + 2) R + 2 W
    gather       reads T output gradients, T queries, of the weights and of the scores' gradients one column each;
                 writes one value's and one key's gradient                      (T + 1) M + (T + 1) R + 2 T B G * 4
    push         dots, and writes T values' and T keys' gradients                      (2 T + 1) M + (2 T + 2) R + 2 W
    weights      reads T keys and the query; writes the weights                                     (T + 1) R + W

And of a whole layer's pieces, F being the filters:

    producer           reads x and the filters; writes value, key and the spatial mean              2 M + 2 R + F
    producer backward  reads x, the gradients of value and key, the mean and the filters; writes the gradients of x
                       and of the filters                                                         3 M + 2 R + 2 F
    epilogue           reads what was retrieved, x and the norm's vectors; writes the block's output  3 M + 4 C * 4
    epilogue backward  reads what was retrieved and the output's gradient, for the sums that the norm's backward needs
                       first; then both again, and writes the gradient of what was retrieved          5 M + 6 C * 4

Of a retrieval at every position from T values that are their own keys, P being one float32 number for each position
(B * N), V a float32 number for each channel; and of a sum by given weights W:

    position forward   reads T maps and the query; writes one map and the weights                (T + 1) M + T P + V
    position dots      reads T maps, the output's gradient, the query, the weights; writes two coefficients for each
                       value and position, and the query's gradient                            (T + 1) M + 3 T P + 2 V
    position gather    reads T output gradients, the value, T queries, of each retrieval's weights and coefficients
                       one column; writes the value's gradient                                 (T + 2) M + 3 T P + T V
    position push      reads as dots does; writes T values' gradients and the query's            (2 T + 1) M + T P + 2 V
    mix                reads T maps and the weights; writes one map                                     (T + 1) M + W
    mix backward       reads T maps, the output's gradient, the weights; writes T values' gradients and the
                       weights'                                                                      (2 T + 1) M + 2 W

Partial sums that a kernel writes for itself are not in it: they are its own affair.
"""

from __future__ import annotations

from benchmarks.gpu.shapes import Case

OPS = ("forward", "dots", "gather", "push", "weights")


def least_bytes(op: str, case: Case, depth: int) -> int:
    """Bytes that `op` of a layer with `depth` pairs must move."""
    shape = case.shape
    one_map, element = case.map_bytes, case.dtype.itemsize
    row = shape.batch * shape.channels * element
    column = shape.batch * shape.heads * 4
    weights = column * depth
    t = depth
    counts = {
        "forward": (t + 1) * one_map + (t + 1) * row + weights,
        "dots": (t + 1) * one_map + (t + 2) * row + 2 * weights,
        "gather": (t + 1) * one_map + (t + 1) * row + 2 * t * column,
        "push": (2 * t + 1) * one_map + (2 * t + 2) * row + 2 * weights,
        "weights": (t + 1) * row + weights,
    }
    return counts[op]


PIECES = ("producer", "producer backward", "epilogue", "epilogue backward")


def piece_bytes(piece: str, case: Case, filter_size: int) -> int:
    """Bytes that a piece of a whole layer must move; `filter_size` of the convolution over the channels."""
    one_map, element = case.map_bytes, case.dtype.itemsize
    row = case.shape.batch * case.shape.channels * element
    filters = (9 * case.shape.channels + filter_size) * element
    vector = 4 * case.shape.channels
    counts = {
        "producer": 2 * one_map + 2 * row + filters,
        "producer backward": 3 * one_map + 2 * row + 2 * filters,
        "epilogue": 3 * one_map + 4 * vector,
        "epilogue backward": 5 * one_map + 6 * vector,
    }
    return counts[piece]


POSITION_OPS = (
    "position forward",
    "position dots",
    "position gather",
    "position push",
    "mix",
    "mix backward",
)


def position_bytes(op: str, case: Case, depth: int) -> int:
    """Bytes that an operation of attention at every position, or of a mix, must move."""
    shape, one_map, t = case.shape, case.map_bytes, depth
    plane = 4 * shape.batch * shape.size**2
    vector = 4 * shape.channels
    weights = 4 * shape.batch * shape.heads * t
    counts = {
        "position forward": (t + 1) * one_map + t * plane + vector,
        "position dots": (t + 1) * one_map + 3 * t * plane + 2 * vector,
        "position gather": (t + 2) * one_map + 3 * t * plane + t * vector,
        "position push": (2 * t + 1) * one_map + t * plane + 2 * vector,
        "mix": (t + 1) * one_map + weights,
        "mix backward": (2 * t + 1) * one_map + 2 * weights,
    }
    return counts[op]
