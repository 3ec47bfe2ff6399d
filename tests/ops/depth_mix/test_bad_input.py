"""Calls of depth_mix that cannot be served are refused, and the message says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.refusals import assert_refused

import ela_kernels as ek


def good(channels_last: bool = False) -> dict[str, Any]:
    shape = (2, 5, 7, 12) if channels_last else (2, 12, 5, 7)
    return {"weights": torch.randn(2, 3, 3), "values": [torch.randn(shape) for _ in range(3)]}


def second(value: Any) -> dict[str, Any]:
    return {"values": [good()["values"][0], value, good()["values"][2]]}


BAD = {
    "weights None": ({"weights": None}, TypeError, "weights", "NoneType", "torch.Tensor"),
    "weights a list": ({"weights": [1.0] * 3}, TypeError, "weights", "list", "torch.Tensor"),
    "weights integer": (
        {"weights": torch.ones(3, dtype=torch.int64)},
        TypeError,
        "weights",
        "int64",
    ),
    "weights complex": ({"weights": torch.ones(3).cfloat()}, TypeError, "weights", "complex64"),
    "weights sparse": ({"weights": torch.eye(3).to_sparse()}, TypeError, "weights", "to_dense"),
    "weights narrower": (
        {"weights": torch.ones(3).half()},
        TypeError,
        "weights",
        "torch.float16",
        "torch.float32",
    ),
    "weights wider": (
        {"weights": torch.ones(3).double()},
        TypeError,
        "weights",
        "torch.float64",
        "torch.float32",
    ),
    "weights a number": ({"weights": torch.ones(())}, ValueError, "weights", "[]", "[T]"),
    "weights of rank 4": (
        {"weights": torch.ones(2, 3, 1, 3)},
        ValueError,
        "weights",
        "[2, 3, 1, 3]",
        "[B, G, T]",
    ),
    "weights too few": ({"weights": torch.ones(2)}, ValueError, "weights", "[2]", "T = 3"),
    "weights too many": (
        {"weights": torch.ones(2, 3, 4)},
        ValueError,
        "weights",
        "[2, 3, 4]",
        "T = 3",
    ),
    "weights of other batch": (
        {"weights": torch.ones(1, 3, 3)},
        ValueError,
        "weights",
        "[1, 3, 3]",
        "B = 2",
    ),
    "weights of heads that do not divide": (
        {"weights": torch.ones(5, 3)},
        ValueError,
        "weights",
        "[5, 3]",
        "divisor of the 12",
    ),
    "weights of no head": (
        {"weights": torch.ones(2, 0, 3)},
        ValueError,
        "weights",
        "[2, 0, 3]",
        "divisor",
    ),
    "weights on meta": (
        {"weights": torch.ones(3, device="meta")},
        ValueError,
        "weights",
        "meta",
        "one device",
    ),
    "values None": ({"values": None}, TypeError, "values", "NoneType", "tuple or list"),
    "values empty": ({"values": []}, ValueError, "values", "empty", "T >= 1"),
    "values one, of rank 3": (
        {"values": torch.ones(2, 3, 12)},
        ValueError,
        "values",
        "[2, 3, 12]",
        "[B, T, ...]",
    ),
    "value None": (second(None), TypeError, "values[1]", "NoneType", "torch.Tensor"),
    "value integer": (
        second(torch.ones(2, 12, 5, 7, dtype=torch.int32)),
        TypeError,
        "values[1]",
        "int32",
    ),
    "value sparse": (second(torch.eye(12)[:2].to_sparse()), TypeError, "values[1]", "to_dense"),
    "value of other dtype": (
        second(torch.ones(2, 12, 5, 7).double()),
        TypeError,
        "values[1]",
        "float64",
        "values[0]",
    ),
    "value of other shape": (
        second(torch.ones(2, 12, 5, 8)),
        ValueError,
        "values[1]",
        "[2, 12, 5, 8]",
        "[2, 12, 5, 7]",
    ),
    "value on meta": (
        second(torch.ones(2, 12, 5, 7, device="meta")),
        ValueError,
        "values[1]",
        "meta",
        "one device",
    ),
    "values of rank 1": (
        {"values": [torch.ones(12)] * 3},
        ValueError,
        "values[0]",
        "[12]",
        "[B, C, *spatial]",
    ),
    "tokens of rank 2": (
        {"values": [torch.ones(2, 12)] * 3, "channels_last": True},
        ValueError,
        "values[0]",
        "[2, 12]",
        "[B, *spatial, C]",
    ),
    "values without a channel": (
        {"values": [torch.ones(2, 0, 5)] * 3},
        ValueError,
        "values[0]",
        "[2, 0, 5]",
        "one channel",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, name, *expected = BAD[case]
    assert_refused(ek.depth_mix, good() | changed, error, name, *expected)


def test_good_input_is_served():
    assert ek.depth_mix(**good()).shape == (2, 12, 5, 7)
    assert ek.depth_mix(**good(True), channels_last=True).shape == (2, 5, 7, 12)
    with pytest.raises(TypeError, match="positional"):
        ek.depth_mix(*good(True).values(), True)  # type: ignore[misc]
