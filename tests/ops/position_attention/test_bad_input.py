"""Calls of position_attention that cannot be served are refused, and the message says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.freed import empty, free, shorten
from support.refusals import assert_refused

import ela_kernels as ek

SPARSE = torch.eye(12).to_sparse()


def good() -> dict[str, Any]:
    return {
        "query": torch.randn(12),
        "values": [torch.randn(2, 12, 5, 7) for _ in range(3)],
        "keys": [torch.randn(2, 12, 5, 7) for _ in range(3)],
        "norm_weight": torch.randn(12),
        "prev_weights": torch.full((2, 2, 5, 7), 0.5),
    }


def second(name: str, tensor: Any) -> dict[str, Any]:
    return {name: [good()[name][0], tensor, good()[name][2]]}


def odd(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **options)


HALF = torch.bfloat16
BAD = {
    "values stacked": (
        {"values": odd(3, 2, 12, 5, 7)},
        TypeError,
        "values",
        "one tensor",
        "unbind",
    ),
    "values a dict": ({"values": {}}, TypeError, "values", "dict", "list"),
    "values None": ({"values": None}, TypeError, "values", "NoneType", "list"),
    "values empty": ({"values": []}, ValueError, "values", "empty", "T >= 1"),
    "values numbers": ({"values": [1.0]}, TypeError, "values[0]", "float", "torch.Tensor"),
    "value integer": (second("values", odd(2, 12, 5, 7).long()), TypeError, "values[1]", "int64"),
    "value sparse": (second("values", SPARSE), TypeError, "values[1]", "sparse", "to_dense"),
    "value of other shape": (
        second("values", odd(2, 12, 5, 6)),
        ValueError,
        "values[1]",
        "[2, 12, 5, 6]",
    ),
    "value of other dtype": (
        second("values", odd(2, 12, 5, 7, dtype=HALF)),
        TypeError,
        "values[1]",
        "bfloat16",
    ),
    "value elsewhere": (
        second("values", odd(2, 12, 5, 7, device="meta")),
        ValueError,
        "values[1]",
        "meta",
    ),
    "values of one dimension": (
        {"values": [odd(12)], "keys": None},
        ValueError,
        "values[0]",
        "[12]",
    ),
    "values without channels": (
        {"values": [odd(2, 0, 5, 7)], "keys": None},
        ValueError,
        "values[0]",
        "no channel",
    ),
    "keys too few": ({"keys": good()["keys"][:2]}, ValueError, "keys", "2 tensors", "3 values"),
    "keys of other shape": (
        {"keys": [odd(2, 12, 5, 6)] * 3},
        ValueError,
        "keys[0]",
        "[2, 12, 5, 6]",
    ),
    "keys of other dtype": (
        {"keys": [odd(2, 12, 5, 7).double()] * 3},
        TypeError,
        "keys[0]",
        "float64",
    ),
    "key of other shape": (
        second("keys", odd(2, 12, 5, 6)),
        ValueError,
        "keys[1]",
        "[2, 12, 5, 6]",
    ),
    "keys stacked": ({"keys": odd(3, 2, 12, 5, 7)}, TypeError, "keys", "one tensor", "unbind"),
    "query None": ({"query": None}, TypeError, "query", "NoneType", "torch.Tensor"),
    "query of other size": ({"query": odd(11)}, ValueError, "query", "[11]", "[12]"),
    "query of rank 2": ({"query": odd(2, 12)}, ValueError, "query", "[2, 12]", "[12]"),
    "query map of other shape": ({"query": odd(2, 12, 5, 6)}, ValueError, "query", "[2, 12, 5, 6]"),
    "query map of other dtype": (
        {"query": odd(2, 12, 5, 7, dtype=HALF)},
        TypeError,
        "query",
        "bfloat16",
    ),
    "query of other dtype": ({"query": odd(12, dtype=HALF)}, TypeError, "query", "bfloat16"),
    "query elsewhere": ({"query": odd(12, device="meta")}, ValueError, "query", "meta"),
    "query integer": ({"query": odd(12).long()}, TypeError, "query", "int64"),
    "norm_weight a number": ({"norm_weight": 1.0}, TypeError, "norm_weight", "float"),
    "norm_weight of other size": (
        {"norm_weight": odd(1)},
        ValueError,
        "norm_weight",
        "[1]",
        "[12]",
    ),
    "norm_weight of other dtype": (
        {"norm_weight": odd(12).double()},
        TypeError,
        "norm_weight",
        "float64",
    ),
    "eps negative": ({"eps": -1e-6}, ValueError, "eps", "-1e-06"),
    "eps infinite": ({"eps": float("inf")}, ValueError, "eps", "inf"),
    "eps NaN": ({"eps": float("nan")}, ValueError, "eps", "nan"),
    "eps a word": ({"eps": "1e-6"}, TypeError, "eps", "str"),
    "eps a bool": ({"eps": True}, TypeError, "eps", "bool"),
    "scale a word": ({"scale": "1"}, TypeError, "scale", "str"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "scale", "inf", "finite number"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale", "nan", "finite number"),
    "prev_weights a list": ({"prev_weights": [1.0]}, TypeError, "prev_weights", "list"),
    "prev_weights of other dtype": (
        {"prev_weights": odd(2, 2, 5, 7, dtype=HALF)},
        TypeError,
        "prev_weights",
        "bfloat16",
        "float32",
    ),
    "prev_weights too deep": (
        {"prev_weights": odd(2, 4, 5, 7)},
        ValueError,
        "prev_weights",
        "[2, 4, 5, 7]",
        "3",
    ),
    "prev_weights with depth last": (
        {"prev_weights": odd(2, 5, 7, 2)},
        ValueError,
        "prev_weights",
        "[B, t",
    ),
    "prev_weights elsewhere": (
        {"prev_weights": odd(2, 2, 5, 7, device="meta")},
        ValueError,
        "prev_weights",
        "meta",
    ),
    "channels_last a word": ({"channels_last": "yes"}, TypeError, "channels_last", "str"),
    "channels_last of maps": ({"channels_last": True}, ValueError, "query", "[12]", "[7]"),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_refused(case):
    changed, error, name, *words = case
    assert_refused(ek.position_attention, good() | changed, error, name, *words)


@pytest.mark.usefixtures("backend")
def test_the_good_call_is_served():
    r = ek.position_attention(**good())
    assert r.weights.shape == (2, 3, 5, 7)
    assert r.kl.shape == (2, 5, 7)
    assert r.kl_mean.shape == (2,)


@pytest.mark.parametrize("how", [free, empty, shorten])
@pytest.mark.parametrize(
    "name", ["query", "query map", "values", "keys", "norm_weight", "prev_weights"]
)
def test_freed_storages_are_refused(backend, how, name):
    arguments = good()
    if name == "query map":
        arguments["query"] = torch.randn(2, 12, 5, 7)
    argument = name.removesuffix(" map")
    found = arguments[argument]
    how(found[1] if isinstance(found, list) else found)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        ek.position_attention(**arguments)
    assert argument in str(caught.value)
