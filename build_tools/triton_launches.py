"""The launches of the package's Triton kernels, recorded from real calls instead of being made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_TOLERANCE = 2.0**-24  # kernels are the same for every one above zero


class Launch(NamedTuple):
    """One kernel with the arguments of one call."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class Case(NamedTuple):
    """A call to be compiled: maps `[batch, channels, size, size]`."""

    batch: int
    channels: int
    size: int
    head_dim: int
    depth: int
    dtype: torch.dtype
    interleaved: bool

    def __str__(self) -> str:
        form = "interleaved" if self.interleaved else "planar"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = [self.batch, self.channels, self.size, self.size]
        return f"T={self.depth} {shape} D={self.head_dim} {dtype} {form}"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records the launches of the package's Triton backend instead of making them."""
    from ela_kernels.backends.triton import (
        attention,
        attention_backward,
        light,
        mix,
        norm,
        position,
        producer,
    )

    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: found.append(Launch(self.kernel, args, options))

    kernels = [
        (module, name, kernel)
        for module in (attention, attention_backward, light, mix, norm, position, producer)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel))
        yield found
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def launches_of(case: Case) -> list[Launch]:
    """Every launch of a layer of this depth: forward, weights, both forms of the backward, whole layer and block.

    And those of a tolerance, and of a light layer, whose shape has no depth.
    """
    from ela_kernels.backends.triton.backend import TritonBackend
    from ela_kernels.backends.types import Saved

    shape = (case.batch, case.channels, case.size, case.size)
    form = torch.channels_last if case.interleaved else torch.contiguous_format
    value = torch.empty(shape, dtype=case.dtype).contiguous(memory_format=form)
    q = torch.empty(shape[:2], dtype=case.dtype)
    heads, scale, T = case.channels // case.head_dim, case.head_dim**-0.5, case.depth
    keys, values = [q] * T, [value] * T
    weights = torch.empty(case.batch, heads, T)
    kl = torch.empty(case.batch, heads)
    saved = Saved(q, keys, values, heads, scale, weights, weights, False)
    kernels = TritonBackend()
    with recorded() as found:
        kernels.attend(q, keys, values, heads, scale, weights, False)
        kernels.weights(q, keys, heads, scale, weights)
        kernels.attend_backward(saved, value, weights, kl, True, True)
        every = [True] * T
        kernels.attend_backward(saved, value, weights, kl, True, True, every, every)
        left = kernels.contribution(q, weights, weights, value, False)
        kernels.gather([left] * T, 0, heads, False, True, True)
        _call_layer(kernels, saved, [left] * (T - 1))
        _call_leaving_out(kernels, saved, value)
        _call_light_layer(kernels, value, q, heads, scale)
        call_position(kernels, value)
    return found


def launches_of_mix(case: Case) -> list[Launch]:
    """Those of a sum by given weights, of the gradients of weights and values, and of the weights alone."""
    from ela_kernels.backends.triton.backend import TritonBackend

    shape = (case.batch, case.channels, case.size, case.size)
    form = torch.channels_last if case.interleaved else torch.contiguous_format
    value = torch.empty(shape, dtype=case.dtype).contiguous(memory_format=form)
    weights = torch.empty(case.batch, case.channels // case.head_dim, case.depth)
    values, kernels = [value] * case.depth, TritonBackend()
    with recorded() as found:
        kernels.mix(weights, values, False)
        for need_values in (True, False):
            every = [need_values] * case.depth
            kernels.mix_backward(weights, values, value, False, True, every)
    return found


def call_position(kernels: Any, value: torch.Tensor) -> None:
    """Attention over depth at every position, which is compiled for no depth: with what is given least and most."""
    from ela_kernels.backends.position import PositionCall, PositionLeft, PositionNeeds

    row, values = torch.empty(value.shape[1]), [value] * 2
    planes = torch.empty(value.shape[0], 2, *value.shape[2:])
    for query, keys in ((None, None), (value, values)):
        prev = None if keys is None else planes
        call = PositionCall(row, query, values, keys, True, 1e-6, prev, False)
        kernels.position_attend(call)
        every = [True] * 2
        needs = PositionNeeds(
            True, query is not None, prev is not None, every, every if keys else ()
        )
        dkl = None if prev is None else planes[:, 0]
        kernels.position_attend_backward(call, planes, value, prev, dkl, needs)
        left = PositionLeft(row, query, planes, torch.empty(3, *planes.shape), value, 0)
        kernels.position_gather(value, [left] * 2, 0, False)


def _call_layer(kernels: Any, saved: Any, left: list[Any]) -> None:
    """A whole layer as the last of a stage, and a whole block, each forward and backward."""
    from ela_kernels.backends.types import (
        RESIDUAL,
        Arrived,
        Filters,
        LayerNeeds,
        NormAct,
        SavedLayer,
    )

    x, q, heads, weights = saved.values[-1], saved.q, saved.heads, saved.weights
    channels, dtype = q.shape[1], q.dtype
    row = torch.empty(1, 1, 5, dtype=dtype)
    filters = Filters(row, row, torch.empty(channels, 1, 3, 3, dtype=dtype))
    before = saved.keys[:-1], saved.values[:-1], heads, saved.scale, weights
    for tolerance in (0.0, _TOLERANCE):
        kernels.retrieve(x, filters, *before, True, False, tolerance)
        kernels.retrieve(x, filters, *before, False, True, tolerance)
    of_layer = SavedLayer(x, filters, q, heads, saved, RESIDUAL, None, None)
    arrived = Arrived(x, None, None, None, None)
    index, every = len(saved.keys) - 1, LayerNeeds(*(True,) * 5)
    kernels.layer_backward(of_layer, arrived, left, index, every)
    gamma, statistics = torch.empty(channels, dtype=dtype), torch.empty(2, channels)
    mask = torch.empty(len(x), dtype=dtype)
    for given in (None, statistics):
        norm = NormAct(gamma, gamma, given, mask, 1e-5, True)
        kernels.norm_forward(x, x, statistics, norm)
        kernels.norm_backward(x, x, statistics, norm)


def _call_leaving_out(kernels: Any, saved: Any, dout: Any) -> None:
    """What a tolerance above zero changes outside of a whole layer."""
    q, keys, values, heads, scale, _, weights, channels_last, _ = saved
    kernels.attend(q, keys, values, heads, scale, weights, channels_last, _TOLERANCE)
    saved = saved._replace(tolerance=_TOLERANCE)
    for every in ([], [True] * len(values)):
        kernels.attend_backward(saved, dout, weights, None, True, False, every, every)
    left = kernels.contribution(q, weights, weights, dout, channels_last, _TOLERANCE)
    kernels.gather([left] * len(values), 0, heads, channels_last, True, True)


def _call_light_layer(kernels: Any, x: Any, q: Any, heads: int, scale: float) -> None:
    """A light layer alone and in a block, forward and backward."""
    from ela_kernels.backends.triton import light
    from ela_kernels.backends.types import LightFilters, LightNeeds, NormAct, SavedLightLayer
    from ela_kernels.ops.checks import VALUE_ACTS

    channels, dtype = q.shape[1], q.dtype
    row, decay = torch.empty(1, 1, 5, dtype=dtype), torch.empty(channels, 1, 1, dtype=dtype)
    filters = LightFilters(row, row, torch.empty(channels, 1, 3, 3, dtype=dtype), decay)
    gates = torch.empty(len(x), heads)
    for act in VALUE_ACTS:
        for norm in (None, NormAct(None, None, None, None, 1e-5, True)):
            light.light_layer(x, filters, x, heads, scale, norm, act)
        saved = SavedLightLayer(
            x, filters, x, heads, scale, act, None, q, q, q, x, gates, None, None
        )
        light.light_layer_backward(saved, x, x, LightNeeds(*(True,) * 6))
    gamma, mask = torch.empty(channels, dtype=dtype), torch.empty(len(x), dtype=dtype)
    norm = NormAct(gamma, gamma, None, mask, 1e-5, True)
    kernels.norm_backward(x, x, torch.empty(2, channels), norm, x)
