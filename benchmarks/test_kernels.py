"""Microbenchmarks of the kernels by dtype, layout and shape: `pytest benchmarks --benchmark-only`.

Each result is compared with the reference before its time is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.types import Saved
from ela_kernels.ops.depth_mix.reference import depth_mix_backward_reference
from ela_kernels.ops.layer_attention.reference import aggregate_reference, layer_attention_reference

CPP = KERNELS["cpp"]

# Depth, batch, channels, height = width, heads.
SHAPES = {
    "deep": (12, 4, 256, 14, 16),
    "wide": (3, 4, 64, 56, 4),
    "channel-wise": (6, 4, 256, 14, 256),
}
LAYOUTS = ("contiguous", "channels_last", "tokens")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Inputs are exact in their type and sums are float32 (float64): what is left is one rounding of the result.
TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


class Inputs(NamedTuple):
    """One layer's inputs, at the last depth of its stage."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    douts: list[Tensor]
    heads: int
    scale: float
    channels_last: bool
    prev_weights: Tensor

    @property
    def depth(self) -> int:
        return len(self.values)

    def wide(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.double() for t in tensors]


def _map(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    batch, channels, rows, columns = shape
    if layout == "tokens":
        return torch.randn(batch, rows * columns, channels).to(dtype)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


@pytest.fixture(params=SHAPES)
def sizes(request: pytest.FixtureRequest) -> tuple[int, int, int, int, int]:
    return SHAPES[request.param]


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def inputs(sizes: tuple[int, int, int, int, int], layout: str, dtype: torch.dtype) -> Inputs:
    status = ek.backend_status()["cpp"]
    if status != "available":
        pytest.skip(f"cpp backend: {status}")
    torch.manual_seed(0)
    depth, batch, channels, size, heads = sizes
    shape = (batch, channels, size, size)
    prev = torch.randn(batch, heads, depth - 1, dtype=accumulate_dtype(dtype)).softmax(-1)
    return Inputs(
        torch.randn(shape[:2]).to(dtype),
        [torch.randn(shape[:2]).to(dtype) for _ in range(depth)],
        [_map(shape, layout, dtype) for _ in range(depth)],
        [_map(shape, layout, dtype) for _ in range(depth)],
        heads,
        (channels // heads) ** -0.5,
        layout == "tokens",
        prev,
    )


def _assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    distance = float((got.double() - want).norm() / want.norm())
    assert distance <= TOLERANCES[dtype]


def _time(
    benchmark: Callable[..., object], run: Callable[[], object], maps: int, one: Tensor
) -> None:
    benchmark.extra_info["least_bytes"] = maps * one.numel() * one.element_size()  # type: ignore[attr-defined]
    benchmark(run)


def test_forward(benchmark: Callable[..., object], inputs: Inputs, dtype: torch.dtype) -> None:
    i = inputs
    run = partial(
        CPP.attend,
        i.q,
        i.keys,
        i.values,
        i.heads,
        i.scale,
        i.prev_weights,
        i.channels_last,
    )
    out, weights, kl = run()
    want_out, want_weights, want_kl = layer_attention_reference(
        i.q.double(),
        i.wide(i.keys),
        i.wide(i.values),
        i.heads,
        i.scale,
        i.prev_weights.double(),
        i.channels_last,
    )
    assert kl is not None
    assert want_kl is not None
    _assert_close(out, want_out, dtype)
    _assert_close(weights, want_weights, torch.float32)
    _assert_close(kl, want_kl, torch.float32)
    _time(benchmark, run, i.depth + 1, i.values[0])


@pytest.mark.parametrize("form", ["pull", "push"])
def test_backward(
    benchmark: Callable[..., object], inputs: Inputs, dtype: torch.dtype, form: str
) -> None:
    i = inputs
    _, weights, _ = CPP.attend(i.q, i.keys, i.values, i.heads, i.scale, None, i.channels_last)
    saved = Saved(i.q, i.keys, i.values, i.heads, i.scale, None, weights, i.channels_last)
    every = [form == "push"] * i.depth
    dout = i.douts[-1]
    run = partial(CPP.attend_backward, saved, dout, None, None, True, False, every, every)
    got = run()
    leaves = [t.double().requires_grad_() for t in (i.q, *i.keys, *i.values)]
    keys, values = leaves[1 : 1 + i.depth], leaves[1 + i.depth :]
    out, _, _ = layer_attention_reference(
        leaves[0], keys, values, i.heads, i.scale, None, i.channels_last
    )
    wanted = torch.autograd.grad(out, leaves, dout.double())
    found = [got.dq, *got.dkeys, *got.dvalues]
    for g, w in zip(found if form == "push" else found[:1], wanted, strict=False):
        assert g is not None
        # Weights come rounded to the accumulation type, and a difference of dot products cancels a digit or two.
        distance = float((g.double() - w).norm() / w.norm())
        assert distance <= TOLERANCES[dtype] + (1e-12 if dtype == torch.float64 else 1e-5)
    _time(benchmark, run, (2 * i.depth if form == "push" else i.depth) + 1, i.values[0])


def test_gather(benchmark: Callable[..., object], inputs: Inputs, dtype: torch.dtype) -> None:
    i = inputs
    weights = [
        torch.rand(i.q.shape[0], i.heads, j + 1, dtype=accumulate_dtype(dtype))
        for j in range(i.depth)
    ]
    left = [
        CPP.contribution(i.q, w, w, dout, i.channels_last)
        for w, dout in zip(weights, i.douts, strict=True)
    ]

    def run() -> Tensor:
        _, dv = CPP.gather(left, 0, i.heads, i.channels_last, False, True)
        assert dv is not None
        return dv

    first = torch.stack([w[..., 0] for w in weights], dim=-1).double()
    want = aggregate_reference(first, i.wide(i.douts), i.channels_last)
    _assert_close(run(), want, dtype)
    _time(benchmark, run, i.depth + 1, i.values[0])


def _mix_weights(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    sizes = inputs.q.shape[0], inputs.heads, inputs.depth
    return torch.randn(sizes, dtype=accumulate_dtype(dtype))  # of either sign


def test_mix(benchmark: Callable[..., object], inputs: Inputs, dtype: torch.dtype) -> None:
    i, weights = inputs, _mix_weights(inputs, dtype)
    run = partial(CPP.mix, weights, i.values, i.channels_last)
    want = aggregate_reference(weights.double(), i.wide(i.values), i.channels_last)
    _assert_close(run(), want, dtype)
    _time(benchmark, run, i.depth + 1, i.values[0])


def test_mix_backward(benchmark: Callable[..., object], inputs: Inputs, dtype: torch.dtype) -> None:
    i, weights, dout = inputs, _mix_weights(inputs, dtype), inputs.douts[-1]
    rest = i.channels_last, True, [True] * i.depth
    run = partial(CPP.mix_backward, weights, i.values, dout, *rest)
    found = run()
    want, dvalues = depth_mix_backward_reference(
        weights.double(), i.wide(i.values), dout.double(), *rest
    )
    assert found.weights is not None
    assert want is not None
    # A sum of up to 50 000 products of either sign cancels a digit or two.
    distance = float((found.weights.double() - want).norm() / want.norm())
    assert distance <= (1e-12 if dtype == torch.float64 else 1e-5)
    for got, wanted in zip(found.values, dvalues, strict=True):
        assert got is not None
        assert wanted is not None
        _assert_close(got, wanted, dtype)
    _time(benchmark, run, 2 * i.depth + 1, i.values[0])


def test_weights_only(
    benchmark: Callable[..., object], sizes: tuple[int, int, int, int, int]
) -> None:
    if ek.backend_status()["cpp"] != "available":
        pytest.skip("no cpp backend")
    torch.manual_seed(0)
    depth, batch, channels, _, heads = sizes
    q, *keys = (torch.randn(batch, channels) for _ in range(depth + 1))
    prev = torch.randn(batch, heads, depth - 1).softmax(-1)
    scale = (channels // heads) ** -0.5
    run = partial(CPP.weights, q, keys, heads, scale, prev)
    weights, _ = run()
    no_values = [torch.zeros(batch, channels, 1).double() for _ in keys]
    _, want, _ = layer_attention_reference(
        q.double(), [k.double() for k in keys], no_values, heads, scale
    )
    _assert_close(weights, want, torch.float32)
    benchmark(run)
