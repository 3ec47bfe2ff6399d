"""Every call that cannot be served is refused, and the message names the argument, what it got and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.refusals import assert_refused

import ela_kernels as ek

SPARSE = torch.eye(12)[:2].to_sparse()


def good(channels_last: bool = False) -> dict[str, Any]:
    shape = (2, 5, 7, 12) if channels_last else (2, 12, 5, 7)
    return {
        "q": torch.randn(2, 12),
        "keys": [torch.randn(2, 12) for _ in range(3)],
        "values": [torch.randn(shape) for _ in range(3)],
        "heads": 3,
        "prev_weights": torch.full((2, 3, 2), 0.5),
    }


def second(name: str, tensor: Any) -> dict[str, Any]:
    """The good list with another tensor in second place."""
    return {name: [good()[name][0], tensor, good()[name][2]]}


# What is changed in a good call, the error, the argument in the message, and words that have to stand in it.
QUERY_AND_KEYS = {
    "q of rank 1": ({"q": torch.randn(12)}, ValueError, "q", "[12]", "[B, C]"),
    "q of rank 3": ({"q": torch.randn(2, 3, 4)}, ValueError, "q", "[2, 3, 4]", "[B, C]"),
    "q None": ({"q": None}, TypeError, "q", "NoneType", "torch.Tensor"),
    "q a list": ({"q": [[1.0] * 12] * 2}, TypeError, "q", "list", "torch.Tensor"),
    "q integer": (
        {"q": torch.ones(2, 12, dtype=torch.int64)},
        TypeError,
        "q",
        "torch.int64",
        "float32",
    ),
    "q boolean": (
        {"q": torch.ones(2, 12, dtype=torch.bool)},
        TypeError,
        "q",
        "torch.bool",
        "float32",
    ),
    "q complex": (
        {"q": torch.ones(2, 12, dtype=torch.complex64)},
        TypeError,
        "q",
        "torch.complex64",
        "float32",
    ),
    "q sparse": ({"q": SPARSE}, TypeError, "q", "sparse", "to_dense"),
    "q of other batch": ({"q": torch.randn(4, 12)}, ValueError, "keys[0]", "[2, 12]", "[4, 12]"),
    "keys None": ({"keys": None}, TypeError, "keys", "NoneType", "sequence|tuple or list"),
    "keys a number": ({"keys": 3}, TypeError, "keys", "int", "tuple or list"),
    "keys empty": ({"keys": []}, ValueError, "keys", "empty", "T >= 1"),
    "keys empty stacked": ({"keys": torch.randn(2, 0, 12)}, ValueError, "keys", "empty", "T >= 1"),
    "keys one, of rank 2": (
        {"keys": torch.randn(2, 12)},
        ValueError,
        "keys",
        "[2, 12]",
        "[B, T, ...]",
    ),
    "key None": (second("keys", None), TypeError, "keys[1]", "NoneType", "torch.Tensor"),
    "key of other shape": (
        second("keys", torch.randn(2, 11)),
        ValueError,
        "keys[1]",
        "[2, 11]",
        "[2, 12]",
    ),
    "key of other rank": (
        second("keys", torch.randn(2, 12, 1)),
        ValueError,
        "keys[1]",
        "[2, 12, 1]",
        "[2, 12]",
    ),
    "key of other dtype": (
        second("keys", torch.randn(2, 12).double()),
        TypeError,
        "keys[1]",
        "float64",
        "float32",
    ),
    "key of other half": (
        second("keys", torch.randn(2, 12).bfloat16()),
        TypeError,
        "keys[1]",
        "bfloat16",
        "float32",
    ),
    "key integer": (
        second("keys", torch.ones(2, 12).int()),
        TypeError,
        "keys[1]",
        "int32",
        "float32",
    ),
    "key sparse": (second("keys", SPARSE), TypeError, "keys[1]", "sparse", "to_dense"),
    "key elsewhere": (
        second("keys", torch.ones(2, 12, device="meta")),
        ValueError,
        "keys[1]",
        "meta",
        "cpu",
    ),
    "heads 5": ({"heads": 5}, ValueError, "heads", "5", "divisor"),
    "heads 0": ({"heads": 0}, ValueError, "heads", "0", "divisor"),
    "heads -3": ({"heads": -3}, ValueError, "heads", "-3", "divisor"),
    "heads 24": ({"heads": 24}, ValueError, "heads", "24", "divisor"),
    "heads 3.0": ({"heads": 3.0}, TypeError, "heads", "float", "int"),
    "heads True": ({"heads": True}, TypeError, "heads", "bool", "int"),
    "heads None": ({"heads": None}, TypeError, "heads", "NoneType", "int"),
    "scale True": ({"scale": True}, TypeError, "scale", "bool", "float or None"),
    "scale a string": ({"scale": "1"}, TypeError, "scale", "str", "float or None"),
    "scale NaN": ({"scale": math.nan}, ValueError, "scale", "nan", "finite number or None"),
    "scale infinite": ({"scale": -math.inf}, ValueError, "scale", "-inf", "finite number or None"),
    "scale a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale", "Tensor", "float or None"),
}
PREVIOUS = {
    "longer than the history": (torch.ones(2, 3, 4), ValueError, "[2, 3, 4]", "t' <= 3"),
    "empty": (torch.ones(2, 3, 0), ValueError, "[2, 3, 0]", "1 <= t'"),
    "of other heads": (torch.ones(2, 4, 2), ValueError, "[2, 4, 2]", "[2, 3, t']"),
    "of other batch": (torch.ones(1, 3, 2), ValueError, "[1, 3, 2]", "[2, 3, t']"),
    "of rank 2": (torch.ones(2, 3), ValueError, "[2, 3]", "[2, 3, t']"),
    "integer": (torch.ones(2, 3, 2).int(), TypeError, "int32", "float32"),
    "half": (torch.ones(2, 3, 2).half(), TypeError, "float16", "float32"),
    "double": (torch.ones(2, 3, 2).double(), TypeError, "float64", "float32"),
    "sparse": (torch.ones(2, 3, 2).to_sparse(), TypeError, "sparse", "dense"),
    "elsewhere": (torch.ones(2, 3, 2, device="meta"), ValueError, "meta", "cpu"),
    "a list": ([[[0.5, 0.5]]], TypeError, "list", "torch.Tensor or None"),
}
VALUES = {
    "None": ({"values": None}, TypeError, "values", "NoneType", "tuple or list"),
    "empty": ({"values": []}, ValueError, "values", "empty", "T >= 1"),
    "too few": (
        {"values": [torch.randn(2, 12, 4)] * 2},
        ValueError,
        "values",
        "2",
        "one value for each key",
    ),
    "too many": (
        {"values": torch.randn(2, 4, 12, 5)},
        ValueError,
        "values",
        "4",
        "one value for each key",
    ),
    "one, of rank 3": (
        {"values": torch.randn(2, 12, 4)},
        ValueError,
        "values",
        "[2, 12, 4]",
        "[B, T, ...]",
    ),
    "first of rank 1": (
        {"values": [torch.randn(2)] * 3},
        ValueError,
        "values[0]",
        "[2]",
        "[B, C, *spatial]",
    ),
    "other channels": (
        second("values", torch.randn(2, 11, 5, 7)),
        ValueError,
        "values[1]",
        "[2, 11, 5, 7]",
        "C = 12",
    ),
    "other batch": (
        second("values", torch.randn(1, 12, 5, 7)),
        ValueError,
        "values[1]",
        "[1, 12, 5, 7]",
        "B = 2",
    ),
    "other size": (
        second("values", torch.randn(2, 12, 5, 8)),
        ValueError,
        "values[1]",
        "[2, 12, 5, 8]",
        "[2, 12, 5, 7]",
    ),
    "other rank": (
        second("values", torch.randn(2, 12, 35)),
        ValueError,
        "values[1]",
        "[2, 12, 35]",
        "[2, 12, 5, 7]",
    ),
    "channels last, not said": (
        {"values": [torch.randn(2, 5, 12)] * 3},
        ValueError,
        "values[0]",
        "[2, 5, 12]",
        "C = 12",
    ),
    "other dtype": (
        second("values", torch.randn(2, 12, 5, 7).half()),
        TypeError,
        "values[1]",
        "float16",
        "float32",
    ),
    "integer": (
        second("values", torch.ones(2, 12, 5, 7).long()),
        TypeError,
        "values[1]",
        "int64",
        "float32",
    ),
    "complex": (
        second("values", torch.ones(2, 12, 5, 7).cfloat()),
        TypeError,
        "values[1]",
        "complex64",
        "float32",
    ),
    "sparse": (
        second("values", torch.ones(2, 12, 5, 7).to_sparse()),
        TypeError,
        "values[1]",
        "sparse",
        "to_dense",
    ),
    "elsewhere": (
        second("values", torch.ones(2, 12, 5, 7, device="meta")),
        ValueError,
        "values[1]",
        "meta",
        "cpu",
    ),
    "a member None": (second("values", None), TypeError, "values[1]", "NoneType", "torch.Tensor"),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("what", QUERY_AND_KEYS)
def test_query_keys_heads_and_scale(what):
    change, *expected = QUERY_AND_KEYS[what]
    assert_refused(ek.layer_attention, good() | change, *expected)
    only = {name: x for name, x in (good() | change).items() if name != "values"}
    assert_refused(ek.layer_attention_weights, only, *expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("what", PREVIOUS)
def test_previous_weights(what):
    prev, error, *words = PREVIOUS[what]
    arguments = good() | {"prev_weights": prev}
    assert_refused(ek.layer_attention, arguments, error, "prev_weights", *words)
    del arguments["values"]
    assert_refused(ek.layer_attention_weights, arguments, error, "prev_weights", *words)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("what", VALUES)
def test_values(what):
    change, *expected = VALUES[what]
    assert_refused(ek.layer_attention, good() | change, *expected)


@pytest.mark.usefixtures("backend")
def test_channels_last_values():
    arguments = good(channels_last=True) | {"channels_last": True}
    assert ek.layer_attention(**arguments).out.shape == (2, 5, 7, 12)
    wrong = arguments | {"values": [torch.randn(2, 12, 5)] * 3}
    assert_refused(
        ek.layer_attention, wrong, ValueError, "values[0]", "[2, 12, 5]", "[B, *spatial, C]"
    )
    flat = arguments | {"values": [torch.randn(2, 12)] * 3}
    assert_refused(ek.layer_attention, flat, ValueError, "values[0]", "[2, 12]", "[B, *spatial, C]")


def test_the_good_calls_are_good(backend):
    assert ek.layer_attention(**good()).out.shape == (2, 12, 5, 7)
    only = {name: x for name, x in good().items() if name != "values"}
    assert ek.layer_attention_weights(**only).weights.shape == (2, 3, 3)
    double = {n: [y.double() for y in x] if isinstance(x, list) else x for n, x in good().items()}
    double |= {"q": good()["q"].double(), "prev_weights": good()["prev_weights"].double()}
    assert ek.layer_attention(**double).weights.dtype == torch.float64


@pytest.mark.parametrize("channels_last", [False, True])
def test_meta_tensors_carry_shapes(channels_last):
    meta = {
        name: [y.to("meta") for y in x]
        if isinstance(x, list)
        else x.to("meta")
        if name != "heads"
        else x
        for name, x in good(channels_last).items()
    }
    r = ek.layer_attention(**meta, channels_last=channels_last)
    assert r.out.is_meta
    assert r.out.shape == meta["values"][0].shape
    assert r.weights.shape == (2, 3, 3)
    assert r.kl.shape == (2, 3)
    half = {n: [y.half() for y in x] if isinstance(x, list) else x for n, x in meta.items()}
    r = ek.layer_attention(**(half | {"q": meta["q"].half()}), channels_last=channels_last)
    assert (r.out.dtype, r.weights.dtype, r.kl.dtype) == (
        torch.float16,
        torch.float32,
        torch.float32,
    )
    del meta["values"]
    assert ek.layer_attention_weights(**meta).kl.shape == (2, 3)
