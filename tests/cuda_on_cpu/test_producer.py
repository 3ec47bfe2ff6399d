"""The CUDA kernels that make a layer's value from its input, and their backward, run on the CPU.

Against float64. What is allowed is derived: an output is rounded once, and each sum of products in float32 errs by a
few roundings of the sum of their magnitudes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.cuda_on_cpu import DTYPES, FORMS, launched, name_of, off_by
from support.layouts import (
    channel_slice,
    channels_last,
    channels_last_slice,
    contiguous,
    last_slice,
    one_batch,
)
from support.left_out import bits
from torch import Tensor

from ela_kernels.backends.cuda.producer import ProducerGradients, produce, produce_backward
from ela_kernels.backends.types import Filters

ROUNDINGS = 64 * 2.0**-24

pytestmark = pytest.mark.usefixtures("kernels")


class Case(NamedTuple):
    x: Tensor
    filters: Filters
    mean: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    residual: Tensor | None


def make(shape, dtype=torch.float32, layout=contiguous, size=3, dlayout=None) -> Case:
    batch, channels = shape[:2]
    row = contiguous
    filters = Filters(
        row((1, 1, size), dtype), row((1, 1, size), dtype), row((channels, 1, 3, 3), dtype)
    )
    x = layout(shape, dtype)
    mean = x.double().mean((2, 3)).to(dtype)
    maps = [(dlayout or layout)(shape, dtype) for _ in range(2)]
    return Case(
        x, filters, mean, row((batch, channels), dtype), row((batch, channels), dtype), *maps
    )


def of(case: Case, change) -> Case:
    """`change` made to every tensor of a case, in float64."""

    def each(x):
        if isinstance(x, Filters):
            return Filters(*map(each, x))
        return None if x is None else change(x.double())

    return Case(*map(each, case))


def forward_in_float64(case: Case) -> tuple[Tensor, Tensor]:
    v = F.conv2d(case.x, case.filters.wv, padding=1, groups=case.x.shape[1])
    return v, case.x.sum((2, 3))


def backward_in_float64(case: Case) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (case.mean, *case.filters, case.x)]
    mean, wq, wk, wv, x = leaves
    outs, grads = [], []
    for w, d in ((wq, case.dq), (wk, case.dk)):
        if d is not None:
            outs.append(F.conv1d(mean.unsqueeze(1), w, padding=w.shape[-1] // 2).squeeze(1))
            grads.append(d)
    if case.dv is not None:
        outs.append(F.conv2d(x, wv, padding=1, groups=x.shape[1]))
        grads.append(case.dv)
    found = (None,) * len(leaves)
    if outs:
        found = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    dmean, dwq, dwk, dwv, dx = (
        torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)
    )
    dx = dx + (dmean / (x.shape[2] * x.shape[3]))[..., None, None]
    return [dx if case.residual is None else dx + case.residual, dwq, dwk, dwv]


def assert_near(found: Tensor, truth: Tensor, magnitude: Tensor, what: str) -> None:
    assert found.shape == truth.shape, what
    allowed = torch.finfo(found.dtype).eps * truth.abs() + ROUNDINGS * magnitude
    allowed += torch.finfo(found.dtype).tiny
    wrong = (found.double() - truth).abs() > allowed
    assert not (wrong | ~found.isfinite()).any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} are wrong, by up to "
        f"{float(((found.double() - truth).abs() / allowed).max()):.3g} times what is allowed"
    )


def check_forward(case: Case) -> tuple[Tensor, Tensor]:
    v, sums = produce(case.x, case.filters.wv)
    assert v.dtype == case.x.dtype
    assert sums.dtype == torch.float32
    truth, magnitude = (forward_in_float64(of(case, f)) for f in (lambda t: t, torch.abs))
    assert_near(v, truth[0], magnitude[0], "v")
    assert_near(sums.sum(1), truth[1], magnitude[1], "sums")
    return v, sums


def check_backward(case: Case, needs=(True,) * 4) -> ProducerGradients:
    found = produce_backward(*case, needs)
    truth, magnitude = (backward_in_float64(of(case, f)) for f in (lambda t: t, torch.abs))
    for name, a, b, m, need in zip(
        ProducerGradients._fields, found, truth, magnitude, needs, strict=True
    ):
        assert (a is None) == (not need), name
        if a is not None:
            assert a.dtype == case.x.dtype
            assert_near(a, b, m, name)
    return found


def check(case: Case) -> list[Tensor]:
    return [*check_forward(case), *check_backward(case)]


# One position, less than a vector, whole planes that begin within one, several to a block, bands of rows, and columns
# that a tile does not hold; one channel, odd ones, and more than a strip.
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 3, 5),
    (3, 3, 1, 1),
    (2, 6, 1, 7),
    (2, 6, 9, 1),
    (2, 37, 7, 7),
    (3, 40, 7, 7),
    (2, 24, 14, 14),
    (1, 6, 9, 33),
    (2, 3, 28, 28),
    (1, 8, 56, 56),
    (1, 2, 67, 130),
    (1, 70, 2, 9),
    (2, 136, 5, 3),
    (1, 272, 3, 3),
    (1, 2, 5, 300),
    (1, 1, 3, 1100),
    (1, 8, 2, 1030),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape, layout, dtype):
    check(make(shape, dtype, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        channel_slice,
        last_slice,
        channels_last_slice,
        one_batch,
        *(off_by(n, f) for f in FORMS for n in (1, 4)),
    ],
    ids=["channels", "width", "channels last", "one sample", "1", "4", "1 last", "4 last"],
)
def test_layouts(layout, dtype):
    """Gaps, addresses and strides off 16 bytes, samples that are one, and maps that have to be copied."""
    for shape in ((3, 8, 5, 7), (2, 16, 8, 4)):
        case = make(shape, dtype, layout)
        if layout is not last_slice:  # a layer is given what `readable` makes of it
            check(case)
        for form in FORMS:
            check_backward(make(shape, dtype, form, dlayout=layout))


def test_samples_that_begin_within_a_vector():
    """Batch strides that differ, but by whole vectors; and such that do not."""
    for gap in (3, 4, 5, 8):
        memory = torch.randn(3, 5 * 7 * 3 + gap)
        case = make((3, 5, 7, 3))
        case = case._replace(dv=memory[:, : 5 * 7 * 3].view(3, 5, 7, 3))
        check_backward(case)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_sizes_of_the_filters_over_channels(size):
    check(make((3, 6, 3, 4), size=size))
    check(make((5, 301, 2, 2), torch.bfloat16, channels_last, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filters_of_another_dtype(dtype):
    """Their gradients have it too."""
    for of_filters in DTYPES:
        case = make((2, 12, 5, 4), dtype)
        case = case._replace(filters=Filters(*(w.to(of_filters) for w in case.filters)))
        check_forward(case)
        found = produce_backward(*case, (True,) * 4)
        truth, magnitude = (backward_in_float64(of(case, f)) for f in (lambda t: t, torch.abs))
        for name, a, b, m in zip(found._fields, found, truth, magnitude, strict=True):
            assert a.dtype == (dtype if name == "x" else of_filters)
            assert_near(a, b, m, name)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(
    "missing", ["dq", "dk", "dv", "residual", "dq dk", "dq dk residual", "dv residual"]
)
def test_gradients_that_do_not_arrive(missing, layout):
    case = make((2, 12, 5, 4), layout=layout)
    case = case._replace(**dict.fromkeys(missing.split()))
    found = check_backward(case)
    for name, gradient in (("dq", found.wq), ("dk", found.wk), ("dv", found.wv)):
        assert (name in missing.split()) == (not gradient.any())


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(
    "needs",
    [[i != j for i in range(4)] for j in range(4)] + [[i == j for i in range(4)] for j in range(4)],
    ids=str,
)
def test_gradients_that_nobody_wants(needs, layout, kernels):
    case = make((2, 12, 5, 4), layout=layout)
    check_backward(case, needs)
    filters = ["layer_filters_bwd"] * any(needs[1:])
    assert launched(kernels) == ["layer_producer_bwd", *filters]


def test_nothing_to_do(kernels):
    case = make((2, 12, 5, 4))
    assert produce_backward(*case, [False] * 4) == (None,) * 4
    case = case._replace(dq=None, dk=None, dv=None)
    found = produce_backward(*case, [False, True, True, True])
    assert not any(d.any() for d in found[1:])
    assert launched(kernels) == []


def test_a_layer_without_a_query():
    case = make((2, 12, 5, 4))
    case = case._replace(filters=case.filters._replace(wq=None), dq=None)
    found = produce_backward(*case, [True, False, True, True])
    assert found.wq is None
    truth = backward_in_float64(
        of(case._replace(filters=case.filters._replace(wq=case.filters.wk)), lambda t: t)
    )
    torch.testing.assert_close(found.x.double(), truth[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 3, 2, 5), (1, 7, 4, 5)], ids=str)
def test_what_is_not_finite_stays_where_it_is(where, layout):
    """An infinity reaches its neighbours and the sums of its channel, and nothing across an edge of the map."""
    case = make((2, 8, 5, 6), layout=layout)
    for t in (case.x, case.dv):
        t[where] = torch.inf
    v, sums = produce(case.x, case.filters.wv)
    truth = forward_in_float64(of(case, lambda t: t))
    assert torch.equal(v.isfinite(), truth[0].isfinite())
    assert torch.equal(sums.sum(1).isfinite(), truth[1].isfinite())
    found = produce_backward(*case, (True,) * 4)
    for a, b in zip(found, backward_in_float64(of(case, lambda t: t)), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


# Of each kind of tile, with more than one to a map, a strip or a batch.
PLANS = {
    "planes": ((3, 70, 7, 7), contiguous),
    "bands": ((2, 3, 61, 130), contiguous),
    "columns": ((1, 2, 3, 1100), contiguous),
    "strips": ((2, 136, 9, 11), channels_last),
    "tiles": ((1, 40, 33, 21), channels_last),
    "off": ((2, 9, 13, 5), off_by(1, contiguous)),
    "off, interleaved": ((2, 24, 13, 17), off_by(3, channels_last)),
    # More tiles than are wanted at once: a block of the backward takes several samples.
    "samples": ((2100, 1, 1, 2), contiguous),
    "samples, interleaved": ((2100, 8, 1, 2), channels_last),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    # Thousands of blocks take their time here.
    [(n, t) for n in PLANS for t in (DTYPES[:1] if "samples" in n else DTYPES)],
    ids=str,
)
def test_bits_depend_on_no_order_and_no_grid(name, dtype, kernels):
    shape, layout = PLANS[name]
    case = make(shape, dtype, layout)
    first = check(case)
    orders = (
        ((1, 0), (3, 2)) if "samples" in name else ((0, 0), (1, 0), (2, 0), (3, 0), (1, 2), (4, 2))
    )
    for order, limit in orders:
        kernels.set_order(order)
        kernels.limit_grid(limit)
        again = [*produce(case.x, case.filters.wv), *produce_backward(*case, (True,) * 4)]
        for i, (a, b) in enumerate(zip(first, again, strict=True)):
            assert torch.equal(bits(a), bits(b)), (
                f"output {i} in order {order} with a limit of {limit}"
            )


def test_the_plans_are_what_they_are_called(kernels):
    blocks = {}
    for name, (shape, layout) in PLANS.items():
        case = make(shape, torch.float32, layout)
        kernels.take_launches()
        check(case)
        forward, backward, _filters = kernels.take_launches()
        blocks[name] = forward[1][0], backward[1][0]
    lines = {name: shape[0] * shape[1] for name, (shape, _) in PLANS.items()}
    for name in ("bands", "columns"):
        assert min(blocks[name]) > lines[name], name
    assert max(blocks["planes"]) < lines["planes"] / 2
    assert min(blocks["strips"]) > 2 * 3
    assert min(blocks["tiles"]) > 2 * 3 * 3
    for name in ("samples", "samples, interleaved"):
        assert blocks[name][1] < blocks[name][0] * 0.6, name


def test_one_launch_forward_and_two_backward(kernels):
    case = make((2, 12, 5, 4))
    produce(case.x, case.filters.wv)
    assert launched(kernels) == ["layer_producer_fwd"]
    produce_backward(*case, (True,) * 4)
    assert launched(kernels) == ["layer_producer_bwd", "layer_filters_bwd"]


def test_every_instance_of_the_producer_runs(kernels):
    for dtype in DTYPES:
        for layout in (contiguous, off_by(1, contiguous)):
            check(make((2, 8, 4, 4), dtype, layout))
    ran = {re.sub(r"\(.*", "", launch[0]) for launch in kernels.take_launches()}
    assert len(ran) == len(DTYPES) * 4 + 1, ran


@pytest.mark.parametrize("name", ["x", "wv", "v", "sums"])
def test_calls_without_an_address(name, kernels):
    arguments = {"x": (64, 4, 4), "wv": (64, 1), "v": (64, 4, 4), "sums": 64}
    arguments[name] = {"wv": (0, 1), "sums": 0}.get(name, (0, 0, 0))
    with pytest.raises(ValueError, match="no address"):
        kernels.cuda_producer_forward((0, 0), 1, sizes=(1, 1, 2, 2, 0), **arguments)
    with pytest.raises(ValueError, match="none may be zero"):
        kernels.cuda_producer_groups(1, sizes=(1, 0, 2, 2, 0))
