"""The glue to the CUDA kernels of attention over depth at every position; one launch for each call.

As in `attention.py`, every call takes the current stream, allocates before its launches and waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.gpu_tables import Sizes, Strides, alike_maps, compact_strides, map_view
from ela_kernels.backends.layout import (
    MapView,
    dense,
    empty_map,
    is_interleaved,
    kernel_sizes,
    resolved,
)
from ela_kernels.backends.memory import (
    address,
    addresses,
    check_list_readable,
    check_readable,
)
from ela_kernels.backends.position import (
    PositionCall,
    PositionGradients,
    PositionLeft,
    PositionNeeds,
)

_SOURCES = 256  # layers that one launch gathers from


def _sizes(value: Tensor, channels_last: bool) -> Sizes:
    return kernel_sizes(value, 1, channels_last, is_interleaved(value, channels_last))


def _optional(
    tensor: Tensor | None, channels_last: bool, interleaved: bool
) -> tuple[Tensor | None, MapView]:
    if tensor is None:
        return None, cuda._NO_MAP
    return map_view(resolved(tensor), channels_last, interleaved)


def _prepared(call: PositionCall, weights: Tensor, sizes: Sizes) -> tuple[Any, list[Any]]:
    """The call as the extension takes it, and what must live until it is launched."""
    form = call.channels_last, bool(sizes[4])
    row, prev = dense(call.row), dense(call.prev_weights)
    query, query_view = _optional(call.query, *form)
    values, value_strides = alike_maps(call.values, *form)
    keys: Sequence[Tensor] = ()
    key_strides: Strides = (0, 0)
    if call.keys:
        keys, key_strides = alike_maps(call.keys, *form)
    made = cuda._kernels().cuda_position(
        sizes=sizes,
        normed=call.normed,
        eps=call.eps,
        row=address(row, "query"),
        query=query_view,
        values=addresses(values, "values"),
        value_strides=value_strides,
        keys=addresses(keys, "keys"),
        key_strides=key_strides,
        prev=address(prev, "prev_weights"),
        prev_depth=0 if prev is None else prev.shape[1],
        weights=address(weights, "weights"),
    )
    return made, [row, prev, query, values, keys]


def position_attend(call: PositionCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)`."""
    call.check_readable()
    last, channels_last, depth = call.values[-1], call.channels_last, len(call.values)
    sizes = _sizes(last, channels_last)
    batch, *positions = call.places
    out = empty_map(last, channels_last, bool(sizes[4]))
    weights = torch.empty((batch, depth, *positions), dtype=torch.float32, device=last.device)
    kl = None if call.prev_weights is None else weights.new_empty((batch, *positions))
    if last.numel():
        made, keeps = _prepared(call, weights, sizes)
        cuda._launched(
            cuda._kernels().cuda_position_forward(
                cuda._device(last),
                cuda._DTYPE_CODES[last.dtype],
                call=made,
                out=(address(out), *compact_strides(sizes)),
                kl=address(kl),
            )
        )
        del keeps
    return out, weights, kl


@functools.lru_cache(maxsize=1024)
def _row_parts(dtype: int, sizes: Sizes) -> int:
    return int(cuda._kernels().cuda_position_parts(dtype, sizes=sizes))


def position_attend_backward(
    call: PositionCall,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    needs: PositionNeeds,
) -> PositionGradients:
    """All gradients; those of the row's channels as one sum for each block, which are then added up."""
    call.check_readable(
        ("weights", weights),
        ("gradient of the output", dout),
        ("gradient of the weights", dweights),
        ("gradient of kl", dkl),
    )
    last, channels_last = call.values[-1], call.channels_last
    sizes = _sizes(last, channels_last)
    interleaved = bool(sizes[4])

    def new_maps(wanted: Sequence[bool]) -> list[Tensor | None]:
        return [empty_map(last, channels_last, interleaved) if w else None for w in wanted]

    planes = weights.new_empty((3, *weights.shape))
    dvalues, dkeys = new_maps(needs.values), new_maps(needs.keys)
    (dquery,) = new_maps([needs.query and call.query is not None])
    dprev = None
    if needs.prev and dkl is not None and call.prev_weights is not None:
        dprev = torch.empty(call.prev_weights.shape, dtype=torch.float32, device=last.device)
    if not last.numel():
        drow = call.row.new_zeros(call.row.shape) if needs.row else None
        return PositionGradients(planes, drow, dquery, dprev, dvalues, dkeys)
    code = cuda._DTYPE_CODES[last.dtype]
    parts = weights.new_empty((_row_parts(code, sizes), sizes[1])) if needs.row else None
    weights, dweights, dkl = weights.contiguous(), dense(dweights), dense(dkl)
    dout, dout_view = _optional(dout, channels_last, interleaved)
    made, keeps = _prepared(call, weights, sizes)
    strides = compact_strides(sizes)
    failed, written = cuda._kernels().cuda_position_backward(
        cuda._device(last),
        code,
        call=made,
        dout=dout_view,
        dweights=address(dweights),
        dkl=0 if call.prev_weights is None else address(dkl),
        planes=address(planes),
        row_parts=address(parts),
        dquery=cuda._NO_MAP if dquery is None else (address(dquery), *strides),
        dprev=address(dprev),
        dvalues=[address(d) for d in dvalues] if any(needs.values) else [],
        dvalue_strides=strides,
        dkeys=[address(d) for d in dkeys] if any(needs.keys) else [],
        dkey_strides=strides,
    )
    cuda._launched(failed)
    del keeps, dout
    # In the same order every time: a sum of PyTorch's over the first dimension uses no atomics.
    drow = None if parts is None else parts[:written].sum(0)
    return PositionGradients(planes, drow, dquery, dprev, dvalues, dkeys)


def position_gather(
    value: Tensor, left: Sequence[PositionLeft], index: int, channels_last: bool
) -> Tensor:
    """The gradient of the value at `index`, of what the layers that retrieved it left."""
    check_readable(value.get_device(), ("value",), (value,))
    check_list_readable(
        value.get_device(),
        "what a retrieval's backward left",
        [t for m in left for t in (m.row, m.weights, m.coefficients)],
    )
    sizes = _sizes(value, channels_last)
    interleaved = bool(sizes[4])
    dvalue = empty_map(value, channels_last, interleaved)
    if not value.numel():
        return dvalue
    value, value_view = map_view(value, channels_last, interleaved)
    strides = compact_strides(sizes)
    carry = None
    if len(left) > _SOURCES:
        carry = torch.empty(value.numel(), dtype=torch.float32, device=value.device)
    for first in range(0, len(left), _SOURCES):
        part = left[first : first + _SOURCES]
        is_last = first + len(part) == len(left)
        douts, dout_strides = _some_alike([m.dout for m in part], channels_last, interleaved)
        queries, query_strides = _some_alike([m.query for m in part], channels_last, interleaved)
        cuda._launched(
            cuda._kernels().cuda_position_gather(
                cuda._device(value),
                cuda._DTYPE_CODES[value.dtype],
                sizes=sizes,
                value=value_view,
                dvalue=(address(dvalue) if is_last else 0, *strides),
                douts=[address(d) for d in douts],
                dout_strides=dout_strides,
                queries=[address(q) for q in queries],
                query_strides=query_strides,
                carried=address(carry) if first else 0,
                carry=0 if is_last else address(carry),
                **_planes_of(part, index, sizes),
            )
        )
    return dvalue


def _some_alike(
    tensors: Sequence[Tensor | None], channels_last: bool, interleaved: bool
) -> tuple[list[Tensor | None], Strides]:
    """Those that are there with one set of strides, in their places."""
    there = [t for t in tensors if t is not None]
    if not there:
        return list(tensors), (0, 0)
    alike, strides = alike_maps(there, channels_last, interleaved)
    found = iter(alike)
    return [None if t is None else next(found) for t in tensors], strides


def _planes_of(left: Sequence[PositionLeft], index: int, sizes: Sizes) -> dict[str, list[int]]:
    """Where the weights and coefficients of one depth begin, and each layer's row."""
    offset = index * sizes[3] * 4  # bytes of float32
    alphas = [address(m.coefficients) + offset for m in left]
    return {
        "weights": [address(m.weights) + offset for m in left],
        "alphas": alphas,
        "betas": [a + m.weights.numel() * 4 for a, m in zip(alphas, left, strict=True)],
        "rows": [address(m.row) for m in left],
        "batches": [m.weights.shape[1] * sizes[3] for m in left],
    }
