"""Outputs and all gradients of the Triton kernels against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from support.cases import HALF_TYPES, Case, evaluate, make_case
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
    one_number,
)
from support.oracle import assert_matches

import ela_kernels as ek

DTYPES = (torch.float32, *HALF_TYPES)
FORMS = (contiguous, channels_last)

pytestmark = pytest.mark.usefixtures("few_programs")


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


def check(case: Case) -> dict[str, torch.Tensor]:
    found = evaluate(case)
    assert_matches(found, case)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
def test_layouts_of_maps(layout, dtype):
    check(make_case((3, 12, 5, 7), 3, 3, dtype, layout))


@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=name_of)
def test_layouts_of_tokens(layout):
    check(make_case((2, 9, 12), 3, 2, makers=layout, channels_last=True))


@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("values", FORMS, ids=name_of)
def test_layouts_of_the_output_gradient(values, layout):
    check(make_case((2, 6, 4, 5), 2, 2, makers=values, dout=layout))


@pytest.mark.parametrize("turn", range(4))
def test_each_value_laid_out_otherwise(turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    check(make_case((2, 6, 4, 5), 4, 2, makers=mixed[turn:] + mixed[:turn]))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 31, 33, 65])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_depths(depth, layout):
    check(make_case((2, 6, 3, 5), depth, 2, makers=layout))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [127, 128])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_great_depths(depth, layout):
    check(make_case((1, 4, 3, 5), depth, 2, makers=layout))


@pytest.mark.parametrize("prev_depth", [None, 1, 2, 5])
def test_depths_of_the_previous_weights(prev_depth):
    check(make_case(depth=5, prev_depth=prev_depth))


def test_previous_weights_that_are_zero():
    case = make_case((2, 12, 5, 3), 4, 3)
    assert case.prev_weights is not None
    case.prev_weights[:, 0, 1] = 0
    case.prev_weights[1, 2] = 0
    found = check(case)
    assert (found["d prev_weights"][:, 0, 1] == 0).all()
    assert found["kl"][1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((1, 1, 1, 1), 1),
        ((2, 1, 3, 5), 1),
        ((1, 37, 7, 7), 1),
        ((1, 37, 7, 7), 37),  # channel-wise heads
        ((3, 8, 1, 1), 8),
        ((1, 24, 9, 33), 3),
        ((2, 24, 4, 4), 4),  # six channels to a head: strips that cut heads
        ((1, 4, 123), 2),
        ((2, 6, 2, 3, 5), 3),
        ((1, 66, 1, 3), 2),
        ((1, 160, 3, 3), 1),  # wide heads: scores in a launch of their own
        ((1, 288, 3, 4), 3),
        ((1, 8, 40, 40), 2),  # more than one segment or tile to a head
    ],
    ids=str,
)
def test_sizes(shape, heads, layout, dtype):
    check(make_case(shape, 3, heads, dtype, layout))


@pytest.mark.parametrize("shape", [(2, 1, 6), (2, 123, 1), (2, 3, 5, 8)], ids=str)
def test_sizes_of_tokens(shape):
    check(make_case(shape, 3, 1, channels_last=True))


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5)], ids=str)
def test_nothing_in_a_batch_or_a_map(shape, layout):
    check(make_case(shape, 3, 2, makers=layout))


@pytest.mark.parametrize("through", ["out", "weights", "kl", "out weights", "weights kl"])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gradients_that_do_not_arrive(through, layout):
    check(make_case(depth=3, makers=layout, through=through))


@pytest.mark.parametrize(
    "wanted",
    [["q"], ["keys[1]"], ["values[0]"], ["prev_weights"], ["q", "values[2]", "keys[0]"]],
    ids=" ".join,
)
def test_gradients_that_are_not_wanted(wanted):
    case = make_case(depth=3)
    case.wanted = wanted
    check(case)


def test_the_gradient_of_a_sum():
    check(make_case(depth=3, dout=one_number))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_pytorch(bad):
    case = make_case((2, 6, 2, 3), 3, 2, through="")
    case.q[0, 1] = bad
    case.values[1][1, 2, 0, 1] = bad
    found = evaluate(case)
    with ek.use_backend("eager"):
        expected = evaluate(case)
    for name in ("out", "weights", "kl"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name
        assert torch.equal(found[name].isinf(), expected[name].isinf()), name


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_the_same_call_gives_the_same_bits(layout):
    case = make_case((2, 12, 9, 7), 5, 3, makers=layout)
    first, again = evaluate(case), evaluate(case)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


def test_weights_only():
    case = make_case(depth=4, through="")
    found = ek.layer_attention_weights(case.q, case.keys, 3, prev_weights=case.prev_weights)
    full = ek.layer_attention(case.q, case.keys, case.values, 3, prev_weights=case.prev_weights)
    torch.testing.assert_close(found.weights, full.weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.kl, full.kl, rtol=1e-5, atol=1e-6)


def test_what_it_does_not_serve_is_refused():
    case = make_case(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"it serves bfloat16, float16, float32"):
        evaluate(case)
    case = make_case((1, 2, 1, 1), 129, 1)
    with pytest.raises(ValueError, match="it serves up to 128 layers"):
        evaluate(case)
