"""A layer's rows, and the attention that makes them itself, on the CPU by the stand-in runtime, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from support import cuda_on_cpu
from support.cases import Case, Maker
from support.cuda_on_cpu import DTYPES, FORMS, UNIT, launched, name_of, off_by
from support.layouts import (
    batch_slice,
    channel_slice,
    channels_last,
    channels_last_batch_slice,
    channels_last_slice,
    contiguous,
)
from support.left_out import bits
from support.oracle import oracle, tolerances
from torch import Tensor
from torch.nn.functional import conv1d

from ela_kernels.backends.cuda import layer_attention
from ela_kernels.backends.cuda import norm as cuda_norm
from ela_kernels.backends.types import Filters

pytestmark = pytest.mark.usefixtures("kernels")


class Call(NamedTuple):
    """What one attention is called with."""

    sums: Tensor
    filters: Filters
    keys: list[Tensor]
    values: list[Tensor]
    heads: int
    scale: float
    prev: Tensor | None
    residual: Tensor | None


class Found(NamedTuple):
    mean: Tensor
    q: Tensor
    k: Tensor
    out: Tensor
    weights: Tensor
    kl: Tensor | None
    statistics: Tensor | None


def make_call(
    shape: Sequence[int],
    depth: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
    layout: Maker = contiguous,
    *,
    residual: Maker | None = contiguous,
    groups: int = 3,
    size: int = 3,
    filter_dtype: torch.dtype | None = None,
) -> Call:
    batch, channels, height, width = shape
    # Sums of as many numbers as the mean is then divided by, so that it is of no special size.
    sums = torch.randn(batch, groups, channels) * height * width
    wq, wk = (torch.randn(1, 1, size).to(filter_dtype or dtype) for _ in range(2))
    prev = torch.randn(batch, heads, depth - 1).softmax(-1) if depth > 1 else None
    return Call(
        sums,
        Filters(wq, wk, torch.zeros(channels, 1, 3, 3, dtype=dtype)),
        [torch.randn(batch, channels).to(dtype) for _ in range(depth - 1)],
        [layout(shape, dtype) for _ in range(depth)],
        heads,
        (channels // heads) ** -0.5,
        prev,
        None if residual is None else residual(shape, dtype),
    )


def run(call: Call, wants_statistics: bool = True) -> Found:
    positions = call.values[0][0, 0].numel()
    *found, moments = layer_attention.attend_produced(
        call.sums, positions, *call[1:], wants_statistics=wants_statistics, tolerance=0.0
    )
    assert (moments is None) != wants_statistics
    return Found(*found, None if moments is None else cuda_norm.statistics_of(moments))


def filtered(mean: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in float64, and the sum of the absolute values of their terms."""
    pair = [
        conv1d(m[:, None], f, padding=w.shape[-1] // 2)[:, 0]
        for m, f in ((mean.double(), w.double()), (mean.double().abs(), w.double().abs()))
    ]
    return pair[0], pair[1]


def assert_rows(found: Found | tuple, sums: Tensor, filters: Filters, positions: int) -> None:
    """Each is a sum rounded to float32 at every step, and to its type once; from the mean as it is stored."""
    mean, q, k = found[:3]
    eps = torch.finfo(mean.dtype).eps
    of_sums = sums.double().abs().sum(1) / positions
    error = (mean.double() - sums.double().sum(1) / positions).abs()
    tiny = torch.finfo(mean.dtype).smallest_normal
    assert (error <= eps * mean.double().abs() + (sums.shape[1] + 2) * UNIT * of_sums + tiny).all()
    for row, w in ((q, filters.wq), (k, filters.wk)):
        if w is None:
            assert row is None
            continue
        expected, terms = filtered(mean, w)
        error = (row.double() - expected).abs()
        assert (error <= eps * expected.abs() + (w.shape[-1] + 2) * UNIT * terms + tiny).all()


def assert_right(found: Found, call: Call) -> None:
    """The rows, then the attention from the rows as they are stored, then the statistics of what was written."""
    values, residual = call.values, call.residual
    shape, dtype = values[0].shape, values[0].dtype
    positions = shape[2] * shape[3]
    assert_rows(found, call.sums, call.filters, positions)
    case = Case(found.q, [*call.keys, found.k], values, call.heads, call.scale, call.prev)
    expected, allowed = oracle(case), tolerances(case)
    if residual is not None:
        expected["out"] = expected["out"] + residual.double()
        allowed["out"] += 2 * UNIT * expected["out"].abs().max().item()
    info = torch.finfo(dtype)
    for name in ("out", "weights", *(["kl"] if call.prev is not None else [])):
        x = getattr(found, name)
        rtol = torch.finfo(x.dtype).eps
        subnormal = info.smallest_normal * info.eps if x.dtype == torch.float16 else 0.0
        torch.testing.assert_close(
            x.double(), expected[name], rtol=rtol, atol=allowed[name] + subnormal, msg=name
        )
    assert found.out.dtype == dtype
    if call.prev is None:
        assert found.kl is None
    if found.statistics is not None:
        out = found.out.double()
        mean, variance = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
        # A mean takes a few roundings of the largest number. A thread's sum of squares is of 128 numbers at most, which
        # is what it can lose (see moments.cuh); a distance from a mean as exact as it is moves the variance by no more.
        largest = out.abs().max().item()
        torch.testing.assert_close(
            found.statistics[0].double(), mean, rtol=0, atol=16 * UNIT * largest
        )
        torch.testing.assert_close(
            found.statistics[1].double(), variance, rtol=256 * UNIT, atol=1e-30
        )


SIZES = [
    ((1, 1, 1, 1), 1),
    ((2, 1, 3, 5), 1),
    ((1, 37, 7, 7), 1),
    ((2, 37, 7, 7), 37),  # channel-wise heads
    ((3, 8, 1, 1), 8),
    ((2, 24, 9, 33), 3),
    ((2, 24, 4, 4), 4),  # six channels to a head: vectors that span heads
    ((2, 40, 4, 4), 8),
    ((1, 6, 56, 56), 2),
    ((1, 66, 1, 3), 2),
    ((1, 192, 2, 4), 3),
    ((1, 272, 3, 3), 2),
    ((7, 32, 2, 2), 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(("shape", "heads"), SIZES, ids=str)
def test_sizes(shape, heads, layout, dtype, kernels):
    call = make_call(shape, 3, heads, dtype, layout, residual=layout)
    assert_right(run(call), call)
    assert launched(kernels) == ["layer_attend_fwd", "layer_norm_statistics"]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 32, 33, 255, 256])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_depths(depth, layout, dtype):
    call = make_call((2, 16, 3, 8), depth, 2, dtype, layout, residual=layout)
    assert_right(run(call), call)


@pytest.mark.parametrize("wants_statistics", [False, True])
@pytest.mark.parametrize("residual", [None, contiguous, channels_last, channel_slice], ids=name_of)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_with_and_without_a_residual_and_statistics(layout, residual, wants_statistics):
    call = make_call((2, 12, 5, 4), 3, 3, layout=layout, residual=residual)
    assert_right(run(call, wants_statistics), call)


LAYOUTS = (batch_slice, channel_slice, channels_last_slice, channels_last_batch_slice)


@pytest.mark.parametrize("layout", [*LAYOUTS, off_by(1, contiguous), off_by(3, channels_last)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout, dtype):
    call = make_call((2, 16, 4, 4), 3, 2, dtype, layout, residual=layout)
    assert_right(run(call), call)


@pytest.mark.parametrize("size", [1, 3, 5, 9, 41])
@pytest.mark.parametrize("groups", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_groups_of_sums_and_sizes_of_filters(layout, groups, size):
    """The filters reach beyond the block's heads, and beyond the first and the last channel."""
    call = make_call((2, 36, 2, 4), 2, 6, layout=layout, groups=groups, size=size)
    assert_right(run(call), call)


@pytest.mark.parametrize("filter_dtype", [*DTYPES, torch.float64], ids=str)
def test_filters_of_another_dtype(filter_dtype):
    call = make_call((2, 16, 4, 4), 2, 2, torch.bfloat16, filter_dtype=filter_dtype)
    assert_right(run(call), call)


def test_keys_that_do_not_lie_alike():
    call = make_call((3, 12, 4, 2), 3, 2)
    call.keys[0] = torch.randn(3, 24)[:, ::2]
    call.keys[1] = torch.randn(1, 12).expand(3, 12)
    assert_right(run(call), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_query", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    [(1, 1, 1), (7, 5, 3), (64, 4, 5), (65, 33, 9), (300, 2, 301), (130, 3, 5001)],
    ids=str,
)
def test_rows_alone(channels, groups, size, has_query, dtype, kernels):
    """Also filters with more taps than there are channels, or than means are held at a time."""
    sums = torch.randn(3, groups, channels) * 35
    wq, wk = (torch.randn(1, 1, size).to(dtype) for _ in range(2))
    filters = Filters(wq if has_query else None, wk, torch.zeros(channels, 1, 3, 3, dtype=dtype))
    found = layer_attention.rows_of(sums, 35, filters)
    assert found[0].dtype == dtype
    assert_rows(found, sums, filters, 35)
    assert launched(kernels) == ["layer_rows_fwd"]


# What makes the rows, and the weights, in a launch of its own; see layer_attention_plan.h.
APART = {
    "rows, for their room": ((1, 2048, 1, 8), 1, contiguous, 2, 3, False, ["layer_rows_fwd"]),
    "rows, for their filters": ((1, 8, 2, 4), 2, contiguous, 2, 3001, True, ["layer_rows_fwd"]),
    "rows, for their sums": ((8, 64, 2, 4), 8, channels_last, 3000, 3, True, ["layer_rows_fwd"]),
    "weights": (
        (8, 1024, 1, 8),
        1,
        contiguous,
        2,
        3,
        True,
        ["layer_rows_fwd", "layer_attention_fwd_weights"],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", APART)
def test_what_is_made_apart(name, dtype, kernels):
    shape, heads, layout, groups, size, wants_statistics, before = APART[name]
    for depth in (3, 33):
        call = make_call(shape, depth, heads, dtype, layout, groups=groups, size=size)
        kernels.take_launches()
        found = run(call, wants_statistics)
        assert launched(kernels) == [
            *before,
            "layer_attend_fwd",
            *["layer_norm_statistics"] * wants_statistics,
        ]
        assert_right(found, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_rows_are_the_same_bits_in_either_launch(layout, dtype):
    call = make_call((3, 40, 4, 2), 2, 5, dtype, layout, groups=13, size=5)
    found = run(call)
    alone = layer_attention.rows_of(call.sums, 8, call.filters, dtype)
    for x, y in zip(found[:3], alone, strict=True):
        assert torch.equal(x, y)


def test_statistics_far_from_zero():
    """A difference of large sums would leave nothing of such a variance.

    A partial mean is exact to a few roundings of itself: here at most 1e-2 of the spread, which the variance of the
    partial means, itself a small part of the whole, takes twice.
    """
    center = torch.tensor([0.0, 10, -1000, 3e4, 1e5]).view(5, 1, 1)
    spread = torch.tensor([0.01, 0.01, 0.02, 1, 10]).view(5, 1, 1)
    for layout in FORMS:
        call = make_call((3, 5, 31, 17), 1, 1, layout=layout, residual=None)
        call.values[0].mul_(spread).add_(center)
        found = run(call)
        variance = found.out.double().var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(found.statistics[1].double(), variance, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_in_its_channel_and_sample(number, layout):
    call = make_call((2, 8, 3, 5), 2, 2, layout=layout, residual=layout)
    call.residual[1, 3, 2, 2] = number
    found = run(call)
    assert (~found.out.isfinite()).sum() == 1
    assert not found.statistics[:, 3].isfinite().any()
    rest = [c for c in range(8) if c != 3]
    assert found.statistics[:, rest].isfinite().all()
    call.residual[1, 3, 2, 2] = 0
    call.sums[1, 0, 7] = (
        number  # reaches the rows of channels 6 and 7, which are of the second head
    )
    found = run(call)
    assert found.out[0].isfinite().all()
    assert found.out[1, :4].isfinite().all()
    assert found.weights[1, 1].isnan().all()


# Several blocks to a head, heads that a block's boundary cuts, several chunks to a channel, and idle threads.
PLANS = {
    "rows": ((2, 12, 5, 7), 5, 3, contiguous),
    "chunks": ((1, 6, 37, 41), 5, 2, contiguous),
    "vectors": ((1, 12, 16, 40), 3, 3, contiguous),
    "wide": ((1, 96, 1, 16), 3, 1, contiguous),
    "strips": ((1, 272, 9, 5), 3, 2, channels_last),
    "positions": ((1, 16, 33, 31), 4, 1, channels_last),
    "channel-wise": ((2, 40, 9, 9), 3, 40, channels_last),
    "spanning": ((2, 36, 17, 9), 3, 6, channels_last),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_bits_depend_on_no_order_and_no_grid(name, dtype, kernels):
    shape, depth, heads, layout = PLANS[name]
    call = make_call(shape, depth, heads, dtype, layout, residual=layout, groups=9)
    first = run(call)
    assert_right(first, call)
    for order, limit in ((1, 0), (2, 0), (3, 0), (1, 2), (4, 2)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        for key, x, y in zip(Found._fields, first, run(call), strict=True):
            assert torch.equal(bits(x), bits(y)), f"{key} in order {order} with a limit of {limit}"


def test_bad_calls_are_refused(kernels):
    call = make_call((1, 2, 1, 3), 257, 1)
    with pytest.raises(ValueError, match="greatest depth"):
        run(call)
    call = make_call((1, 2, 1, 3), 2, 1)
    with pytest.raises(ValueError, match="values: one for each key"):
        run(call._replace(values=call.values[:1]))


SHAPES_OF_INSTANCES = [
    ((1, 16, 4, 4), 2, contiguous),
    ((1, 16, 4, 4), 16, channels_last),
    ((1, 9, 3, 3), 3, contiguous),
]


def test_every_instance_runs_and_is_right(kernels):
    for dtype, depth, (shape, heads, layout), wants in itertools.product(
        DTYPES, (3, 33), SHAPES_OF_INSTANCES, (False, True)
    ):
        call = make_call(shape, depth, heads, dtype, layout)
        assert_right(run(call, wants), call)
        assert_rows(layer_attention.rows_of(call.sums, 9, call.filters), call.sums, call.filters, 9)
    ran = {launch[0] for launch in kernels.take_launches()}
    built = cuda_on_cpu.instances("layer_(?:attend|rows)_")
    built -= cuda_on_cpu.leaving_out(built)
    assert len(built) == len(DTYPES) * (4 * 2 + 1)
    assert built - ran == set()
