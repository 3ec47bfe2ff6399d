"""Outputs and all gradients of layer attention against a float64 oracle: layouts, sizes, depths, and their pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import WITH_KERNELS, Backend, over, words
from support.cases import Case, make_case
from support.cuda_on_cpu import off_by
from support.factors import (
    FORMS,
    one_is_usual,
    over_depths,
    over_sizes,
    over_sizes_beyond_all_pieces,
    over_sizes_of_tokens,
)
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
)
from support.oracle import assert_matches, oracle
from support.pairs import pairs

import ela_kernels as ek


def check(backend: Backend, case: Case) -> dict[str, torch.Tensor]:
    found = backend.evaluate(case)
    assert_matches(found, case)
    return found


def map_layouts(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "layout": MAP_LAYOUTS,
        "dout": MAP_LAYOUTS,
        "dtype": backend.dtypes,
        "size": [((3, 12, 5, 7), 3), ((2, 16, 4, 8), 2), ((2, 6, 4, 5), 2)],
        "depth": [2, 3],
    }
    return pairs(factors, one_is_usual)


@over("pair", map_layouts, ids=words)
def test_layouts_of_maps(backend, pair):
    shape, heads = pair["size"]
    makers, dout = pair["layout"], pair["dout"]
    check(backend, make_case(shape, pair["depth"], heads, pair["dtype"], makers, dout=dout))


def token_layouts(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "layout": TOKEN_LAYOUTS,
        "dout": TOKEN_LAYOUTS,
        "dtype": backend.dtypes,
        "size": [((2, 9, 12), 2), ((2, 5, 32), 2), ((2, 5, 6), 2)],
        "depth": [2, 3],
    }
    return pairs(factors, one_is_usual)


@over("pair", token_layouts, ids=words)
def test_layouts_of_tokens(backend, pair):
    (shape, heads), dtype = pair["size"], pair["dtype"]
    makers, dout = pair["layout"], pair["dout"]
    case = make_case(shape, pair["depth"], heads, dtype, makers, dout=dout, channels_last=True)
    check(backend, case)


@pytest.mark.parametrize("turn", range(4))
def test_each_value_laid_out_otherwise(backend, turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    check(backend, make_case((2, 6, 4, 5), 4, 2, makers=mixed[turn:] + mixed[:turn]))


@over_sizes
def test_sizes(backend, pair):
    shape, heads = pair["size"]
    check(backend, make_case(shape, 3, heads, pair["dtype"], pair["layout"]))


@over_sizes_of_tokens
def test_sizes_of_tokens(backend, pair):
    shape, heads = pair["size"]
    check(backend, make_case(shape, 3, heads, pair["dtype"], channels_last=True))


@over_depths
def test_depths(backend, pair):
    if pair["depth"] > (backend.max_depth or pair["depth"]):
        pytest.skip(f"{backend} serves fewer layers, and refuses more")
    check(backend, make_case((2, 16, 3, 5), pair["depth"], 2, pair["dtype"], pair["layout"]))


@over_sizes_beyond_all_pieces
def test_beyond_all_pieces(backend, pair):
    shape, heads = pair["size"]
    check(backend, make_case(shape, 3, heads, pair["dtype"], pair["layout"]))


# Of the inputs that gradients are asked for, and what is done to the rows and to one tensor, by name.
WANTED = {
    "all": lambda case: case.wanted,
    "nothing": lambda case: [],
    "the query": lambda case: ["q"],
    "one key": lambda case: [f"keys[{len(case.keys) // 2}]"],
    "keys": lambda case: [n for n in case.wanted if "keys" in n],
    "one value": lambda case: [f"values[{len(case.keys) - 1}]"],
    "values": lambda case: [n for n in case.wanted if "values" in n],
    "previous weights": lambda case: [n for n in case.wanted if "prev" in n],
    "query and first value": lambda case: ["q", "values[0]"],
    "first key and previous weights": lambda case: [
        n for n in case.wanted if n == "keys[0]" or "prev" in n
    ],
}


def _strided(case: Case) -> None:
    batch, channels = case.q.shape
    dtype = case.q.dtype
    case.q = torch.randn(channels, batch).to(dtype).t()
    ways = (
        lambda: torch.randn(batch, 2 * channels)[:, ::2],
        lambda: torch.randn(1, channels).expand(batch, channels),
        lambda: torch.randn(2 * batch, channels)[::2],
    )
    case.keys = [ways[j % 3]().to(dtype) for j in range(len(case.keys))]
    if case.prev_weights is not None:
        case.prev_weights = case.prev_weights.transpose(0, 1).contiguous().transpose(0, 1)
    if case.dweights is not None:
        case.dweights = case.dweights.transpose(1, 2).contiguous().transpose(1, 2)
    if case.dkl is not None:
        case.dkl = case.dkl[:1, :1].expand(case.dkl.shape)


def _one_batch_stride(case: Case) -> None:
    memory = torch.stack(case.keys, 1)
    case.keys = [memory[:, j] for j in range(len(case.keys))]


def _one_key_for_all(case: Case) -> None:
    case.keys = [case.keys[0]] * len(case.keys)
    case.values = [case.values[0]] * len(case.values)


ROWS = {
    "plain": lambda case: None,
    "strided": _strided,
    "keys in one tensor": _one_batch_stride,
    "one pair for all": _one_key_for_all,
}
NEGATED = ["", "q", "keys", "values", "prev_weights", "dout", "dweights", "dkl"]


def _negate(case: Case, which: str) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the opposite sign."""
    x = getattr(case, which) if which else None
    if isinstance(x, list):
        setattr(case, which, [torch._neg_view(-y) for y in x])
    elif x is not None:
        setattr(case, which, torch._neg_view(-x))


def calls(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "through": [
            "out weights kl",
            "out",
            "weights",
            "kl",
            "out weights",
            "out kl",
            "weights kl",
            "",
        ],
        "wanted": list(WANTED),
        "depth": [1, 2, 3, 4, 5],
        "dtype": backend.dtypes,
        "layout": FORMS,
        "prev": ["all but one", "none", "one", "two", "all"],
        "scale": [None, 0.0, 1, -0.7, 3.5, 40.0],
        "rows": list(ROWS),
        "negated": NEGATED,
        "size": [((2, 12, 5, 3), 3), ((2, 8, 3, 5), 2), ((2, 16, 4, 4), 4)],
        "tokens": [False, True],
    }
    return pairs(factors)


@over("pair", calls, ids=words)
def test_calls(backend, pair):
    """What is given, what arrives, and what is asked for."""
    depth, (shape, heads) = pair["depth"], pair["size"]
    previous = {"all but one": -1, "none": None, "one": 1, "two": min(2, depth), "all": depth}
    if pair["tokens"]:
        shape = (shape[0], *shape[2:], shape[1])
    case = make_case(
        shape,
        depth,
        heads,
        pair["dtype"],
        pair["layout"],
        scale=pair["scale"],
        prev_depth=previous[pair["prev"]],
        channels_last=pair["tokens"],
        through=pair["through"],
    )
    ROWS[pair["rows"]](case)
    _negate(case, pair["negated"])
    case.wanted = WANTED[pair["wanted"]](case)
    found = check(backend, case)
    there = backend.case(case)
    only = ek.layer_attention_weights(
        there.q, there.keys, heads, scale=case.scale, prev_weights=there.prev_weights
    )
    assert (only.kl is None) == (case.prev_weights is None)
    weights = {n: x.cpu() for n, x in only._asdict().items() if x is not None}
    assert_matches(weights, case, {n: x for n, x in oracle(case).items() if n in weights})
    # A test of zeros against zeros would prove nothing.
    arrives = case.dweights is not None or (
        case.dout is not None and pair["rows"] != "one pair for all"
    )
    softened = pair["scale"] in (None, 1, -0.7)
    if "q" in case.wanted and arrives and depth > 1 and softened and pair["rows"] == "plain":
        assert found["d q"].abs().max() > 1e-3
    for j in range(depth):
        gradient = found.get(f"d values[{j}]")
        if gradient is not None and case.dout is None:
            assert not gradient.any()


def addresses(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "which": ["values", "dout", "rows", "all", "one value"],
        "elements": [1, 2, 3, 4, 5, 6, 7],
        "layout": FORMS,
        "dtype": [torch.float32, torch.bfloat16],
    }
    return pairs(factors)


@over("pair", addresses, WITH_KERNELS, ids=words)
def test_addresses_off_the_vectors_boundary(backend, pair):
    """Addresses that 16-byte accesses do not divide, on maps that are otherwise made for them."""
    layout, dtype, which = pair["layout"], pair["dtype"], pair["which"]
    maker, row = off_by(pair["elements"], layout), off_by(pair["elements"], contiguous)
    makers = {"values": maker, "all": maker, "one value": [layout, maker]}.get(which, layout)
    dout = maker if which in ("dout", "all") else layout
    case = make_case((2, 16, 4, 4), 3, 2, dtype, makers, dout=dout)
    if which in ("rows", "all"):
        case.q, *case.keys = (row((2, 16), dtype) for _ in range(4))
    check(backend, case)
