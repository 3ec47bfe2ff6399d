"""The CUDA kernels, run on the CPU by the stand-in runtime: outputs and all gradients against a float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from support.cases import HALF_TYPES, evaluate, make_case
from support.cuda_on_cpu import launched, off_by
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
)
from support.oracle import assert_matches, oracle

import ela_kernels as ek

DTYPES = (torch.float32, *HALF_TYPES)
FORMS = (contiguous, channels_last)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    with cuda_on_cpu.kernels_on_cpu() as module:
        yield module


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
def test_layouts_of_maps(layout, dtype):
    for shape, heads in (((3, 12, 5, 7), 3), ((2, 16, 4, 8), 2)):
        case = make_case(shape, 3, heads, dtype, layout)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=name_of)
def test_layouts_of_tokens(layout, dtype):
    for shape, heads in (((2, 9, 12), 2), ((2, 5, 32), 2)):
        case = make_case(shape, 3, heads, dtype, layout, channels_last=True)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("values", FORMS, ids=name_of)
def test_layouts_of_the_output_gradient(values, layout):
    case = make_case((2, 8, 4, 6), 2, 2, makers=values, dout=layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=name_of)
def test_layouts_of_the_output_gradient_of_tokens(layout):
    case = make_case((2, 5, 8), 2, 2, dout=layout, channels_last=True)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("turn", range(4))
def test_each_value_laid_out_otherwise(turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    case = make_case((2, 6, 4, 5), 4, 2, makers=mixed[turn:] + mixed[:turn])
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8, 31, 32, 33, 65, 255, 256])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_depths(depth, layout):
    for dtype in DTYPES if depth in (3, 33) else DTYPES[:1]:
        case = make_case((2, 16, 3, 5), depth, 2, dtype, layout)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("prev_depth", [None, 1, 2, 5])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_depths_of_the_previous_weights(prev_depth, layout):
    case = make_case(depth=5, prev_depth=prev_depth, makers=layout)
    assert_matches(evaluate(case), case)


def test_previous_weights_that_are_zero():
    case = make_case((2, 12, 5, 3), 4, 3)
    case.prev_weights[:, 0, 1] = 0
    case.prev_weights[1, 2] = 0
    found = evaluate(case)
    assert_matches(found, case)
    assert (found["d prev_weights"][:, 0, 1] == 0).all()
    assert found["kl"][1, 2] == 0


SIZES = [
    ((1, 1, 1, 1), 1),
    ((2, 1, 3, 5), 1),
    ((1, 37, 7, 7), 1),
    ((2, 37, 7, 7), 37),  # channel-wise heads
    ((3, 8, 1, 1), 8),
    ((2, 16, 4, 4), 16),
    ((2, 24, 9, 33), 3),
    ((2, 24, 4, 4), 4),  # six channels to a head: vectors that span heads
    ((2, 40, 4, 4), 8),
    ((2, 10, 1), 5),
    ((2, 4, 123), 2),
    ((2, 6, 2, 3, 5), 3),
    ((1, 66, 1, 3), 2),
    ((1, 192, 2, 4), 3),  # more vectors than a strip is wide
    ((1, 272, 3, 3), 2),
    ((1, 1030, 2, 4), 5),
    ((7, 32, 2, 2), 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(("shape", "heads"), SIZES, ids=str)
def test_sizes(shape, heads, layout, dtype):
    case = make_case(shape, 3, heads, dtype, layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 6), (2, 123, 1), (1, 1, 1), (2, 3, 5, 8), (2, 2, 3, 2, 8), (2, 50, 64)],
    ids=str,
)
def test_sizes_of_tokens(shape, dtype):
    case = make_case(shape, 3, 1, dtype, channels_last=True)
    assert_matches(evaluate(case), case)


def test_values_without_spatial_dimensions():
    case = make_case((3, 8), 3, 2)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5)], ids=str)
def test_nothing_in_a_batch_or_a_map(shape, layout):
    case = make_case(shape, 3, 2, makers=layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("elements", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("which", ["values", "dout", "rows", "all"])
def test_addresses_off_the_vectors_boundary(which, elements, layout, dtype):
    maker, row = off_by(elements, layout), off_by(elements, contiguous)
    case = make_case(
        (2, 16, 4, 4),
        3,
        2,
        dtype,
        maker if which in ("values", "all") else layout,
        dout=maker if which in ("dout", "all") else layout,
    )
    if which in ("rows", "all"):
        case.q, *case.keys = (row((2, 16), dtype) for _ in range(4))
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_one_address_of_many_off_the_boundary(layout):
    for odd in range(3):
        makers = [off_by(1, layout) if j == odd else layout for j in range(3)]
        case = make_case((2, 16, 4, 4), 3, 2, makers=makers)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("scale", [0.0, 1, -0.7, 3.5])
def test_scales(scale):
    case = make_case(scale=scale)
    assert_matches(evaluate(case), case)


def test_strided_queries_keys_and_previous_weights():
    case = make_case((3, 12, 4), 3, 2)
    case.q = torch.randn(12, 3).t()
    case.keys = [
        torch.randn(3, 24)[:, ::2],
        torch.randn(1, 12).expand(3, 12),
        torch.randn(6, 12)[::2],
    ]
    case.prev_weights = torch.randn(2, 3, 2).softmax(-1).transpose(0, 1)
    case.dweights = torch.randn(3, 3, 2).transpose(1, 2)
    case.dkl = torch.tensor(0.7).expand(3, 2)
    assert_matches(evaluate(case), case)


def test_keys_with_one_batch_stride_of_their_own():
    case = make_case((3, 12, 4), 3, 2)
    memory = torch.randn(3, 3, 12)
    case.keys = [memory[:, j] for j in range(3)]
    assert_matches(evaluate(case), case)


THROUGH = ["", "out", "weights", "kl", "out weights", "out kl", "weights kl", "out weights kl"]


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gradients_that_do_not_arrive(through, layout, kernels):
    case = make_case((2, 12, 5, 4), 4, 3, makers=layout, through=through)
    assert_matches(evaluate(case), case)
    # No value is read where no gradient arrives through `out`.
    backward = ["layer_attention_bwd_dots"] * ("out" in through) + ["layer_attention_bwd_tail"]
    assert launched(kernels) == ["layer_attention_fwd"] + (backward if through else [])


WANTED = [
    ["q"],
    ["keys[1]"],
    ["values[1]"],
    ["prev_weights"],
    ["q", "values[0]", "values[2]"],
    ["keys[0]", "keys[2]", "prev_weights"],
    [f"values[{j}]" for j in range(3)],
]


@pytest.mark.parametrize("wanted", WANTED, ids=" ".join)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gradients_that_nobody_wants(wanted, layout):
    case = make_case((2, 12, 5, 4), 3, 3, makers=layout)
    case.wanted = wanted
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("depth", [1, 3, 33, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "heads"), [(12, 3), (7, 7), (300, 1), (37, 1), (1100, 2)], ids=str
)
def test_weights_only_pass(depth, dtype, channels, heads, kernels):
    case = make_case((2, channels, 3), depth, heads, dtype, through="")
    case.wanted = []
    only = ek.layer_attention_weights(case.q, case.keys, heads, prev_weights=case.prev_weights)
    assert launched(kernels) == ["layer_attention_fwd_weights"]
    found = {"weights": only.weights} | ({} if depth == 1 else {"kl": only.kl})
    assert (only.kl is None) == (depth == 1)
    expected = oracle(case)
    del expected["out"]
    assert_matches(found, case, expected)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_widening_and_narrowing_back(dtype):
    """A history of one layer has weight 1 and gives its value back: all 65 536 patterns, in vectors and singly."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    ones = torch.ones(1, 8, dtype=dtype)
    for value in (patterns.view(1, 8, -1), off_by(1, contiguous)((1, 8, 2**13), dtype)):
        value.copy_(patterns.view(1, 8, -1))
        out = ek.layer_attention(ones, [ones], [value], 1).out.view(-1)
        assert torch.equal(out.isnan(), patterns.isnan())
        # A sum that starts at +0 makes -0 a +0.
        assert torch.equal(out[~out.isnan()], patterns[~out.isnan()])


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["q", "keys[1]", "values[0]", "prev_weights", "dout", "dkl"])
def test_what_is_not_finite_goes_through(where, number, layout):
    case = make_case((2, 8, 3, 5), 3, 2, makers=layout)
    target = case.inputs().get(where)
    target = getattr(case, where) if target is None else target
    target[(1, 1, 1)[: target.dim()] if "d" in where else (1,)] = number
    found, expected = evaluate(case), oracle(case)
    assert not all(x.isfinite().all() for x in found.values())
    for name, x in found.items():
        if name == "d prev_weights":
            continue  # dkl (log p + 1 - log a): autograd's product rule makes inf - inf of it, the kernel a factor inf
        assert torch.equal(x.isnan(), expected[name].isnan()), name
        assert torch.equal(x.isinf(), expected[name].isinf()), name
        # What is finite is untouched by it: the other sample and the other head.
        rest = x.isfinite()
        rtol = 64 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(
            x[rest].double(), expected[name][rest], rtol=rtol, atol=64 * rtol
        )
