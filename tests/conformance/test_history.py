"""The pull form, of layers whose queries, keys and values are given: held to the oracle, in every dtype."""

from __future__ import annotations

from typing import Any

import torch
from support.backends import WITH_KERNELS, Backend, on, over, words
from support.layouts import (
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
    one_number,
    transposed,
)
from support.on_gpu import same_bits
from support.pairs import pairs
from support.pull_stages import Stage, check_stage

FORMS = (contiguous, channels_last)
MAKERS = {
    "planar": contiguous,
    "interleaved": channels_last,
    "sliced": channel_slice,
    "in neither form": transposed,
    "in turns": [contiguous, channels_last, channel_slice, last_slice],
}
DOUTS = {
    "as the values": None,
    "of a sum": one_number,
    "transposed": transposed,
    "in turns": [channels_last, last_slice, contiguous],
}
WANTED = {
    "all": lambda kind, layer: True,
    "queries": lambda kind, layer: kind == "q",
    "keys": lambda kind, layer: kind == "k",
    "values": lambda kind, layer: kind == "v",
    "first layer": lambda kind, layer: layer == 0,
    "last layer": lambda kind, layer: layer == 4,
    "some": lambda kind, layer: (kind, layer) in (("q", 1), ("k", 0), ("v", 2), ("q", 4)),
}


def dtypes(backend: Backend) -> list[torch.dtype]:
    """Eager PyTorch rounds every partial sum of a gradient: it is exact where that rounding is the kernels' own."""
    return [d for d in backend.dtypes if backend.has_kernels or d.itemsize >= 4]


def stages(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "provide": [(), (0,), (1,), (2,), (3, 4), (0, 1, 2), (4,)],
        "through": ["out weights kl", "out", "weights", "kl", "out kl", "weights kl"],
        "dtype": dtypes(backend),
        "layout": list(MAKERS),
        "dout": list(DOUTS),
        "used": [None, (0,), (4,), (1, 3), (0, 2, 4)],
        "wanted": list(WANTED),
        "size": [((2, 16, 4, 5), 2), ((2, 12, 5, 3), 3), ((3, 6, 2, 3), 6), ((2, 37, 3, 4), 1)],
        "tokens": [False, True],
    }
    if backend.is_slow:
        factors |= {
            "provide": [(), (0,), (2,), (3, 4)],
            "through": ["out weights kl", "out", "kl", "out kl", "weights kl"],
            "wanted": ["all", "queries", "keys", "values", "some"],
        }
    return pairs(factors)


@over("pair", stages, ids=words)
def test_stages(backend, pair):
    shape, heads = pair["size"]
    if pair["tokens"]:
        shape = (shape[0], *shape[2:], shape[1])
    stage = Stage(
        shape,
        heads,
        5,
        pair["dtype"],
        MAKERS[pair["layout"]],
        pair["tokens"],
        pair["provide"],
        pair["through"],
        DOUTS[pair["dout"]],
        pair["used"],
        WANTED[pair["wanted"]],
    )
    check_stage(stage, backend.put)


@over(
    "pair",
    lambda backend: pairs(
        {
            "size": [((3, 12, 5, 7), 3), ((1, 21, 5, 8), 21), ((1, 32, 7, 14), 2)]
            if backend.is_slow
            else [((3, 12, 5, 7), 3), ((2, 37, 9, 8), 37), ((2, 32, 14, 14), 2)],
            "layout": FORMS,
            "dtype": dtypes(backend),
        }
    ),
    ids=words,
)
def test_sizes(backend, pair):
    shape, heads = pair["size"]
    check_stage(Stage(shape, heads, 2, pair["dtype"], pair["layout"]), backend.put)


@over(
    "depth", lambda backend: [d for d in (1, 2, 3, 9, 31, 33, 40) if d <= 9 or not backend.is_slow]
)
def test_depths(backend, depth):
    check_stage(Stage((1, 8, 2, 2), 2, depth, torch.float32), backend.put)


@over("dtype", lambda backend: backend.dtypes)
def test_the_same_stage_gives_the_same_bits(backend, dtype):
    shape = (2, 8, 3, 5) if backend.is_slow else (4, 32, 14, 14)
    stage = Stage(shape, 2, 6, dtype)
    (outs, first), (more, again) = stage.run(backend.put), stage.run(backend.put)
    assert all(same_bits(a, b) for a, b in zip(outs, more, strict=True))
    for kind, gradients in first.items():
        for a, b in zip(gradients, again[kind], strict=True):
            assert same_bits(a, b), kind


@on(WITH_KERNELS)
def test_each_layer_runs_once_in_each_direction(backend, made):
    Stage((2, 12, 5, 3), 3, 3, torch.float32).run(backend.put)
    assert made == ["attend"] * 3 + ["attend_backward", "gather"] * 3
