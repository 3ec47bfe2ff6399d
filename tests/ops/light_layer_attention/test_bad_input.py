"""Calls of the light form that cannot be served are refused, and the message says why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.refusals import assert_refused

import ela_kernels as ek


def light() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 12),
        "k": torch.randn(2, 12),
        "v": torch.randn(2, 12, 5, 7),
        "prev_out": torch.randn(2, 12, 5, 7),
        "decay": torch.randn(12, 1, 1),
        "heads": 3,
    }


LIGHT = {
    "q of rank 3": ({"q": torch.randn(2, 3, 4)}, ValueError, "q", "[2, 3, 4]", "[B, C]"),
    "q integer": ({"q": torch.ones(2, 12).int()}, TypeError, "q", "int32", "float32"),
    "q None": ({"q": None}, TypeError, "q", "NoneType", "torch.Tensor"),
    "k of other shape": ({"k": torch.randn(2, 11)}, ValueError, "k", "[2, 11]", "[2, 12]"),
    "k of other dtype": ({"k": torch.randn(2, 12).half()}, TypeError, "k", "float16", "float32"),
    "k None": ({"k": None}, TypeError, "k", "NoneType", "torch.Tensor"),
    "v of other batch": (
        {"v": torch.randn(1, 12, 5, 7)},
        ValueError,
        "v",
        "[1, 12, 5, 7]",
        "B = 2",
    ),
    "v of other channels": (
        {"v": torch.randn(2, 13, 5, 7)},
        ValueError,
        "v",
        "[2, 13, 5, 7]",
        "C = 12",
    ),
    "v sparse": ({"v": torch.ones(2, 12, 5, 7).to_sparse()}, TypeError, "v", "sparse", "to_dense"),
    "v elsewhere": ({"v": torch.ones(2, 12, 5, 7, device="meta")}, ValueError, "v", "meta", "cpu"),
    "prev_out of other size": (
        {"prev_out": torch.randn(2, 12, 5, 8)},
        ValueError,
        "prev_out",
        "[2, 12, 5, 8]",
        "[2, 12, 5, 7]",
    ),
    "prev_out of other dtype": (
        {"prev_out": torch.randn(2, 12, 5, 7).double()},
        TypeError,
        "prev_out",
        "float64",
        "float32",
    ),
    "prev_out None": ({"prev_out": None}, TypeError, "prev_out", "NoneType", "torch.Tensor"),
    "decay too long": ({"decay": torch.randn(13, 1, 1)}, ValueError, "decay", "[13, 1, 1]", "[12]"),
    "decay turned": ({"decay": torch.randn(1, 12, 1)}, ValueError, "decay", "[1, 12, 1]", "[12]"),
    "decay one number": ({"decay": torch.tensor(0.5)}, ValueError, "decay", "[]", "[12]"),
    "decay integer": (
        {"decay": torch.ones(12, 1, 1).int()},
        TypeError,
        "decay",
        "int32",
        "float32",
    ),
    "decay elsewhere": (
        {"decay": torch.ones(12, 1, 1, device="meta")},
        ValueError,
        "decay",
        "meta",
        "cpu",
    ),
    "decay a number": ({"decay": 0.5}, TypeError, "decay", "float", "torch.Tensor"),
    "heads 5": ({"heads": 5}, ValueError, "heads", "5", "divisor"),
    "heads True": ({"heads": True}, TypeError, "heads", "bool", "int"),
    "scale True": ({"scale": True}, TypeError, "scale", "bool", "float or None"),
    "scale NaN": ({"scale": math.nan}, ValueError, "scale", "nan", "finite number or None"),
    "scale infinite": ({"scale": math.inf}, ValueError, "scale", "inf", "finite number or None"),
}


@pytest.mark.parametrize("what", LIGHT)
def test_light_form(what):
    assert ek.light_layer_attention(**light()).shape == (2, 12, 5, 7)
    change, *expected = LIGHT[what]
    assert_refused(ek.light_layer_attention, light() | change, *expected)
