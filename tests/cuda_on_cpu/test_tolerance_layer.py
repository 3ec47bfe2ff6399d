"""What the CUDA kernels of a whole layer's attention leave out by a tolerance, on the CPU by the stand-in runtime.

As in test_tolerance.py, expected is what the formulas give in float64 for the weights that the kernels
gave, and whatever is left out holds NaN or an infinity.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from support import cuda_on_cpu
from support.cases import Maker
from support.cuda_on_cpu import DTYPES, SHAPES_OF_INSTANCES, UNIT, launched, off_by
from support.layouts import channels_last, contiguous
from support.left_out import NUMBERS, assert_near, assert_same_bits, bits, middle, poison
from support.oracle import largest
from torch import Tensor

from ela_kernels.backends.cuda import layer_attention
from ela_kernels.backends.cuda import norm as cuda_norm
from ela_kernels.backends.types import Filters
from ela_kernels.ops.layer_attention.reference import aggregate_reference

pytestmark = pytest.mark.usefixtures("kernels")


class Layer(NamedTuple):
    """What the attention of a whole layer is called with, but for the tolerance."""

    sums: Tensor
    filters: Filters
    keys: list[Tensor]
    values: list[Tensor]
    heads: int
    scale: float
    prev: Tensor | None
    residual: Tensor | None
    wants_statistics: bool


def make_layer(
    shape: Sequence[int],
    depth: int,
    heads: int,
    dtype: torch.dtype,
    layout: Maker,
    residual: bool,
    wants_statistics: bool,
    groups: int = 3,
) -> Layer:
    batch, channels, height, width = shape
    wq, wk = (torch.randn(1, 1, 3).to(dtype) for _ in range(2))
    return Layer(
        torch.randn(batch, groups, channels) * height * width / groups**0.5,
        Filters(wq, wk, torch.zeros(channels, 1, 3, 3, dtype=dtype)),
        [torch.randn(batch, channels).to(dtype) for _ in range(depth - 1)],
        [layout(shape, dtype) for _ in range(depth)],
        heads,
        (channels // heads) ** -0.5,
        torch.randn(batch, heads, depth - 1).softmax(-1) if depth > 1 else None,
        layout(shape, dtype) if residual else None,
        wants_statistics,
    )


def run_layer(layer: Layer, tolerance: float) -> dict[str, Tensor]:
    positions = layer.values[0][0, 0].numel()
    *found, moments = layer_attention.attend_produced(
        layer.sums, positions, *layer[1:], tolerance=tolerance
    )
    statistics = None if moments is None else cuda_norm.statistics_of(moments)
    names = ("mean", "q", "k", "out", "weights", "kl", "statistics")
    return {n: x for n, x in zip(names, [*found, statistics], strict=True) if x is not None}


def check_layer(layer: Layer, share: float = 0.5) -> None:
    every = run_layer(layer, 0.0)
    weights = every["weights"]
    tolerance = middle(weights, share)
    clean = run_layer(layer, tolerance)
    small = {n: x for n, x in clean.items() if n not in ("out", "statistics")}
    assert_same_bits(small, {n: every[n] for n in small}, "knows no tolerance")
    values = [v.double() for v in layer.values]
    expected = aggregate_reference(weights.double(), values, False, tolerance)
    # A sum over weights that sum to 1 at most, rounded at each term, and the residual after them.
    depth, of_values = len(values), largest(layer.values)
    allowed = (depth + 2) * UNIT * of_values
    if layer.residual is not None:
        expected += layer.residual.double()
        allowed += 2 * UNIT * expected.abs().max().item()
    assert_near("out", clean["out"], expected, allowed)
    if layer.wants_statistics:
        out = clean["out"].double()
        mean, variance = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
        atol = 16 * UNIT * out.abs().max().item()
        torch.testing.assert_close(clean["statistics"][0].double(), mean, rtol=0, atol=atol)
        torch.testing.assert_close(
            clean["statistics"][1].double(), variance, rtol=256 * UNIT, atol=1e-30
        )
    for j, value in enumerate(layer.values):
        poison(value, weights[..., j] < tolerance, False, NUMBERS[j % len(NUMBERS)])
    assert_same_bits(run_layer(layer, tolerance), clean, "with something else where it is not read")


LAYERS = {
    "rows": ((2, 12, 5, 7), 5, 3, contiguous),
    "chunks": ((1, 6, 37, 41), 5, 2, contiguous),
    "vectors": ((1, 12, 16, 40), 3, 3, contiguous),
    "wide": ((1, 96, 1, 16), 3, 1, contiguous),
    "strips": ((1, 272, 9, 5), 3, 2, channels_last),
    "channel-wise": ((2, 40, 9, 9), 7, 40, channels_last),
    "spanning": ((2, 36, 17, 9), 7, 6, channels_last),
    "spanning, narrow": ((2, 24, 3, 3), 34, 12, channels_last),
    "off": ((2, 16, 4, 5), 6, 4, off_by(1, contiguous)),
    "deep": ((2, 16, 4, 4), 40, 4, contiguous),
    "deepest": ((1, 8, 2, 4), 256, 2, channels_last),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wants_statistics", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_whole_layers(name, residual, wants_statistics, dtype, kernels):
    layer = make_layer(*LAYERS[name][:3], dtype, LAYERS[name][3], residual, wants_statistics)
    check_layer(layer)
    names = ["layer_attend_fwd", *["layer_norm_statistics"] * wants_statistics]
    assert launched(kernels) == names * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_layers_in_several_launches(dtype, kernels):
    check_layer(make_layer((8, 1024, 1, 8), 5, 1, dtype, contiguous, True, True))
    assert "layer_attention_fwd_weights" in launched(kernels)
    check_layer(make_layer((8, 64, 2, 4), 5, 8, dtype, channels_last, True, True, groups=3000))
    names = launched(kernels)
    assert "layer_rows_fwd" in names
    assert "layer_attention_fwd_weights" not in names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_residual_is_never_left_out(name, dtype):
    shape, depth, heads, layout = LAYERS[name]
    layer = make_layer(shape, depth, heads, dtype, layout, True, True)
    layer.filters.wq.zero_()  # every weight is 1 / depth
    for value in layer.values:
        value.fill_(torch.nan)
    for tolerance in (0.75, 1 - 2.0**-40):  # the latter is 1 in float32
        found = run_layer(layer, tolerance)
        assert layer.residual is not None
        assert torch.equal(found["out"], layer.residual)
        assert found["statistics"].isfinite().all()
    nothing = run_layer(layer._replace(residual=None, wants_statistics=False), 0.75)
    assert not bits(nothing["out"]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_same_bits_where_nothing_is_below(name, dtype):
    shape, depth, heads, layout = LAYERS[name]
    layer = make_layer(shape, depth, heads, dtype, layout, True, True)
    every = run_layer(layer, 0.0)
    assert every["weights"].min() > 2.0**-120
    assert_same_bits(run_layer(layer, 2.0**-120), every)


@pytest.mark.parametrize("name", ["rows", "strips", "spanning", "channel-wise", "deep"])
def test_bits_of_layers_depend_on_no_order_and_no_grid(name, kernels):
    shape, depth, heads, layout = LAYERS[name]
    layer = make_layer(shape, depth, heads, torch.float32, layout, True, True)
    tolerance = middle(run_layer(layer, 0.0)["weights"])
    first = run_layer(layer, tolerance)
    for order, limit in ((1, 0), (2, 0), (3, 0), (1, 2), (4, 2)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        note = f"in order {order} with a limit of {limit}"
        assert_same_bits(run_layer(layer, tolerance), first, note)


def test_every_instance_runs_and_is_right(kernels):
    for dtype, depth, (shape, heads, layout), wants_statistics in itertools.product(
        DTYPES, (3, 33), SHAPES_OF_INSTANCES, (False, True)
    ):
        check_layer(make_layer(shape, depth, heads, dtype, layout, True, wants_statistics))
    ran = {launch[0] for launch in kernels.take_launches()}
    built = cuda_on_cpu.leaving_out(cuda_on_cpu.instances("layer_attend_"))
    assert len(built) == len(DTYPES) * 3 * 2
    assert built - ran == set()
