"""Launches of attention over depth at every position on Triton.

Nothing waits and nothing is copied from the host, so that a call can be captured into a CUDA graph: the table of
addresses is written by a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.gpu_tables import Strides, alike_maps, compact_strides
from ela_kernels.backends.layout import dense, empty_map, is_interleaved, kernel_sizes
from ela_kernels.backends.memory import check_readable
from ela_kernels.backends.position import (
    PositionCall,
    PositionGradients,
    PositionLeft,
    PositionNeeds,
)
from ela_kernels.backends.triton.attention import guard, padded
from ela_kernels.backends.triton.kernels.position import (
    position_fwd_kernel,
    position_numbers_kernel,
    position_table_kernel,
    position_weights_kernel,
)
from ela_kernels.backends.triton.kernels.position_backward import (
    position_bwd_coefficients_kernel,
    position_bwd_maps_kernel,
    position_bwd_sums_kernel,
    position_gather_kernel,
)
from ela_kernels.backends.triton.plan import encoded, power_of_two

_TABLE = 32  # addresses of one launch
_TILE = 2048  # elements of a program's tile, where a position has no more
_LEAST_RUN = 16  # positions of a planar tile, as long as its channels leave room
_MOST = 8192  # elements that have room in registers, several times
_BLOCK = 256  # positions of a program that works on planes


class _Shape(NamedTuple):
    """How maps are cut: a program takes P positions and all channels."""

    batch: int
    channels: int
    positions: int
    interleaved: bool
    P: int
    C: int

    @property
    def blocks(self) -> int:
        return -(-self.positions // self.P)

    @property
    def programs(self) -> int:
        return self.batch * self.blocks

    @property
    def places(self) -> int:
        return self.batch * self.positions

    def warps(self, aligned: bool) -> int:
        """16 elements a thread; half as many where each of them has an address of its own, as far as a block goes."""
        each = 512 if aligned else 256
        return min(max(self.P * self.C // each, 4), 16)


def _shape(value: Tensor, channels_last: bool) -> _Shape:
    interleaved = is_interleaved(value, channels_last)
    batch, channels, _, positions, _ = kernel_sizes(value, 1, channels_last, interleaved)
    wide = power_of_two(channels)
    run = max(_TILE // wide, 1)
    if not interleaved:
        run = max(run, min(_LEAST_RUN, max(_MOST // wide, 1)))
    return _Shape(
        batch, channels, positions, interleaved, min(run, power_of_two(max(positions, 1))), wide
    )


class _Maps:
    """Maps of one call: alike within each list, read by 16 bytes where all of them allow it."""

    def __init__(self, channels_last: bool, shape: _Shape, dtype: torch.dtype) -> None:
        self._form = channels_last, shape.interleaved
        self._unit = 16 // dtype.itemsize
        self._lane = shape.channels if shape.interleaved else shape.positions
        self.aligned = self._lane % self._unit == 0

    def taken(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Strides]:
        tensors, strides = alike_maps(tensors, *self._form)
        self.see(tensors, strides)
        return tensors, strides

    def see(self, tensors: Sequence[Tensor], strides: Strides) -> None:
        if any(s % self._unit for s in strides) or any(t.data_ptr() % 16 for t in tensors):
            self.aligned = False

    @property
    def unit(self) -> int:
        return self._unit if self.aligned else 1

    @property
    def lane_units(self) -> int:
        return self._lane // self.unit

    def units(self, strides: Strides) -> tuple[int, int]:
        return strides[0] // self.unit, strides[1] // self.unit


def _table(device: torch.device, *lists: Sequence[Any]) -> Tensor:
    """The addresses of tensors, or numbers, of several lists one after the other, in memory of the device."""
    length = sum(len(items) for items in lists)
    # What a launch writes beyond its list, the next one writes over.
    table = torch.empty(length + _TABLE, dtype=torch.int64, device=device)
    first = 0
    for items in lists:
        for start in range(0, len(items), _TABLE):
            part = items[start : start + _TABLE]
            if isinstance(part[0], Tensor):
                position_table_kernel[(1,)](table, first, padded(part, _TABLE), num_warps=1)
            else:
                codes = padded([encoded(number) for number in part], _TABLE)
                position_numbers_kernel[(1,)](table, first, codes, num_warps=1)
            first += len(part)
    return table


def position_attend(call: PositionCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)`: one launch that reads the values, and one that makes weights of scores."""
    call.check_readable()
    last, channels_last, depth = call.values[-1], call.channels_last, len(call.values)
    s = _shape(last, channels_last)
    out = empty_map(last, channels_last, s.interleaved)
    batch, *places = call.places
    weights = torch.empty((batch, depth, *places), dtype=torch.float32, device=last.device)
    prev = dense(call.prev_weights)
    kl = None if prev is None else weights.new_empty((batch, *places))
    if not last.numel():
        return out, weights, kl
    maps = _Maps(channels_last, s, last.dtype)
    values, value_strides = maps.taken(call.values)
    keys, key_strides = maps.taken(call.keys) if call.keys else ((), value_strides)
    (query,), query_strides = maps.taken([values[-1] if call.query is None else call.query])
    compact = compact_strides((s.batch, s.channels, 1, s.positions, int(s.interleaved)))
    maps.see((out,), compact)
    norm = weights.new_empty((2, s.places))
    with guard(last.device):
        table = _table(last.device, values, keys)
        position_fwd_kernel[(s.programs,)](
            table,
            values[-1],
            dense(call.row),
            query,
            out,
            weights,
            norm,
            s.batch,
            s.channels,
            s.positions,
            maps.lane_units,
            s.blocks,
            depth,
            *maps.units(value_strides),
            *maps.units(key_strides),
            *maps.units(query_strides),
            *maps.units(compact),
            call.eps,
            NORMED=call.normed,
            HAS_KEYS=bool(keys),
            HAS_QUERY=call.query is not None,
            INTERLEAVED=s.interleaved,
            ALIGNED=maps.aligned,
            UNIT=maps.unit,
            P=s.P,
            C=s.C,
            num_warps=s.warps(maps.aligned),
        )
        position_weights_kernel[(-(-s.places // _BLOCK),)](
            weights,
            norm,
            weights if prev is None else prev,
            norm if kl is None else kl,
            s.places,
            s.positions,
            depth,
            0 if prev is None else prev.shape[1],
            HAS_PREV=prev is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out, weights, kl


def _some(wanted: Sequence[bool], maps: list[Tensor]) -> list[Tensor | None]:
    return [maps[i] if is_wanted else None for i, is_wanted in enumerate(wanted)]


def position_attend_backward(
    call: PositionCall,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    needs: PositionNeeds,
) -> PositionGradients:
    """All gradients: a launch for the sums, one for the coefficients, one for the gradients of maps.

    Where one value's gradient is wanted, all are written.
    """
    call.check_readable(
        ("weights", weights),
        ("gradient of the output", dout),
        ("gradient of the weights", dweights),
        ("gradient of kl", dkl),
    )
    last, channels_last, depth = call.values[-1], call.channels_last, len(call.values)
    s = _shape(last, channels_last)
    planes = weights.new_empty((3, *weights.shape))
    dvalues = (
        [empty_map(last, channels_last, s.interleaved) for _ in range(depth)]
        if any(needs.values)
        else []
    )
    dkeys = (
        [empty_map(last, channels_last, s.interleaved) for _ in range(depth)]
        if any(needs.keys)
        else []
    )
    dquery = None
    if needs.query and call.query is not None:
        dquery = empty_map(last, channels_last, s.interleaved)
    prev = dense(call.prev_weights)
    dprev = None
    if needs.prev and dkl is not None and prev is not None:
        dprev = torch.empty_like(prev)
    of_values, of_keys = _some(needs.values, dvalues), _some(needs.keys, dkeys)
    if not last.numel():
        drow = call.row.new_zeros(call.row.shape) if needs.row else None
        return PositionGradients(planes, drow, dquery, dprev, of_values, of_keys)
    maps = _Maps(channels_last, s, last.dtype)
    values, value_strides = maps.taken(call.values)
    keys, key_strides = maps.taken(call.keys) if call.keys else ((), value_strides)
    (query,), query_strides = maps.taken([values[-1] if call.query is None else call.query])
    (arrived,), dout_strides = maps.taken([values[-1] if dout is None else dout])
    compact = compact_strides((s.batch, s.channels, 1, s.positions, int(s.interleaved)))
    maps.see((*dvalues, *dkeys, *(() if dquery is None else (dquery,))), compact)
    weights, row = weights.contiguous(), dense(call.row)
    dweights, dkl = dense(dweights), dense(dkl)
    writes_maps = bool(needs.row or dquery is not None or dvalues or dkeys)
    partial = weights.new_empty((s.programs if writes_maps else 0, s.channels))
    form = {
        "HAS_KEYS": bool(keys),
        "HAS_QUERY": call.query is not None,
        "HAS_DOUT": dout is not None,
        "INTERLEAVED": s.interleaved,
        "ALIGNED": maps.aligned,
        "UNIT": maps.unit,
        "P": s.P,
        "C": s.C,
        "num_warps": s.warps(maps.aligned),
    }
    strides = [
        *maps.units(value_strides),
        *maps.units(key_strides),
        *maps.units(query_strides),
        *maps.units(dout_strides),
    ]
    sizes = (s.batch, s.channels, s.positions, maps.lane_units, s.blocks, depth)
    with guard(last.device):
        # Of values that are their own keys, no list of keys; gradients are looked for behind it all the same.
        table = _table(last.device, values, keys or values, dvalues or values, dkeys or values)
        position_bwd_sums_kernel[(s.programs,)](
            *(table, values[-1], row, query, arrived, planes),
            *sizes,
            *strides,
            call.eps,
            NORMED=call.normed,
            **form,
        )
        position_bwd_coefficients_kernel[(-(-s.places // _BLOCK),)](
            planes,
            weights,
            weights if dweights is None else dweights,
            weights if dkl is None else dkl,
            weights if prev is None else prev,
            planes if dprev is None else dprev,
            s.places,
            s.positions,
            depth,
            0 if prev is None else prev.shape[1],
            s.channels,
            NORMED=call.normed,
            HAS_DOUT=dout is not None,
            HAS_DWEIGHTS=dweights is not None,
            HAS_DKL=dkl is not None,
            HAS_DPREV=dprev is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
        if writes_maps:
            position_bwd_maps_kernel[(s.programs,)](
                *(table, values[-1], row, query, arrived, weights, planes),
                planes if dquery is None else dquery,
                partial,
                *sizes,
                *strides,
                *maps.units(compact),
                HAS_DQUERY=dquery is not None,
                DVALUES=bool(dvalues),
                DKEYS=bool(dkeys),
                **form,
            )
    # In the same order every time: a sum of PyTorch's over the first dimension uses no atomics.
    drow = partial.sum(0) if needs.row else None
    return PositionGradients(planes, drow, dquery, dprev, of_values, of_keys)


def position_gather(
    value: Tensor, left: Sequence[PositionLeft], index: int, channels_last: bool
) -> Tensor:
    """The gradient of the value at `index`, of what the layers that retrieved it left."""
    s = _shape(value, channels_last)
    dvalue = empty_map(value, channels_last, s.interleaved)
    if not value.numel():
        return dvalue
    device = value.get_device()
    check_readable(device, ("value",), (value,))
    maps = _Maps(channels_last, s, value.dtype)
    (value,), value_strides = maps.taken([value])
    none = None
    if any(m.dout is None for m in left):
        none = torch.zeros_like(value)
    douts, dout_strides = maps.taken([none if m.dout is None else m.dout for m in left])  # type: ignore[misc]
    has_query = any(m.query is not None for m in left)
    queries: Sequence[Tensor] = [value] * len(left)
    if has_query:
        ones = torch.ones_like(value) if any(m.query is None for m in left) else value
        queries = [ones if m.query is None else m.query for m in left]
    queries, query_strides = maps.taken(queries)
    compact = compact_strides((s.batch, s.channels, 1, s.positions, int(s.interleaved)))
    maps.see((dvalue,), compact)
    with guard(value.device):
        table = _table(
            value.device,
            douts,
            queries,
            [m.weights for m in left],
            [m.coefficients for m in left],
            [m.row for m in left],
            [m.weights.shape[1] for m in left],
        )
        position_gather_kernel[(s.programs,)](
            *(table, value, left[0].weights, value, dvalue),
            *(s.batch, s.channels, s.positions, maps.lane_units, s.blocks, len(left), index),
            *maps.units(value_strides),
            *maps.units(dout_strides),
            *maps.units(query_strides),
            *maps.units(compact),
            HAS_QUERY=has_query,
            INTERLEAVED=s.interleaved,
            ALIGNED=maps.aligned,
            UNIT=maps.unit,
            P=s.P,
            C=s.C,
            num_warps=s.warps(maps.aligned),
        )
    return dvalue
