"""The glue to the compiled CPU kernels of attention over depth at every position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.cpp.addresses import NO_TABLE, maps, one_map
from ela_kernels.backends.cpp.attention import DTYPE_CODES, NO_MAP, Sizes, new_map, thread_count
from ela_kernels.backends.cpp.attention import kernels as compiled
from ela_kernels.backends.layout import (
    MapView,
    accumulate_dtype,
    dense,
    is_interleaved,
    kernel_sizes,
)
from ela_kernels.backends.memory import address
from ela_kernels.backends.position import (
    PositionCall,
    PositionGradients,
    PositionLeft,
    PositionNeeds,
)


def positions_of(value: Tensor, channels_last: bool) -> tuple[int, ...]:
    """The shape of one number for each position: `[B, *positions]`."""
    shape = list(value.shape)
    del shape[-1 if channels_last else 1]
    return tuple(shape)


def _prepared(call: PositionCall, weights: Tensor, sizes: Sizes) -> tuple[Any, list[Any]]:
    """The call as the extension takes it, and what must live until the kernel has run."""
    _, query, values, keys, normed, eps, prev, channels_last = call
    interleaved = bool(sizes[4])
    row, prev = dense(call.row), dense(prev)
    value_table = maps(values, channels_last, interleaved)
    key_table = NO_TABLE if keys is None else maps(keys, channels_last, interleaved, "keys")
    view, query = _optional(query, channels_last, interleaved, "query")
    made = compiled().position(
        sizes=sizes,
        normed=normed,
        eps=eps,
        row=address(row, "query"),
        query=view,
        values=value_table[0],
        value_strides=value_table[1],
        keys=key_table[0],
        key_strides=key_table[1],
        prev=address(prev, "prev_weights"),
        prev_depth=0 if prev is None else prev.shape[1],
        weights=address(weights, "weights"),
    )
    return made, [row, prev, query, value_table[2], key_table[2]]


def _optional(
    tensor: Tensor | None, channels_last: bool, interleaved: bool, name: str
) -> tuple[MapView, Tensor | None]:
    if tensor is None:
        return NO_MAP, None
    return one_map(tensor, channels_last, interleaved, name)


def _sizes(value: Tensor, channels_last: bool) -> Sizes:
    return kernel_sizes(value, 1, channels_last, is_interleaved(value, channels_last))


def position_attend(call: PositionCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)` in one call of the extension."""
    last, channels_last, depth = call.values[-1], call.channels_last, len(call.values)
    sizes = _sizes(last, channels_last)
    batch, *positions = positions_of(last, channels_last)
    accumulate = accumulate_dtype(last.dtype)
    out, out_view = new_map(last, sizes, channels_last)
    weights = torch.empty((batch, depth, *positions), dtype=accumulate, device="cpu")
    kl = None
    if call.prev_weights is not None:
        kl = torch.empty((batch, *positions), dtype=accumulate, device="cpu")
    if last.numel():
        made, keeps = _prepared(call, weights, sizes)
        compiled().position_forward(
            DTYPE_CODES[last.dtype],
            call=made,
            out=out_view,
            kl=address(kl),
            threads=thread_count(last.numel() * depth),
        )
        del keeps
    return out, weights, kl


def _new_maps(
    like: Tensor, sizes: Sizes, channels_last: bool, wanted: Sequence[bool]
) -> tuple[list[Tensor | None], list[int], list[int]]:
    """New maps where they are wanted, and their addresses and strides; no addresses where none is."""
    if not any(wanted):
        return [None] * len(wanted), [], []
    made = [new_map(like, sizes, channels_last) if needed else None for needed in wanted]
    strides = next(m[1][1:] for m in made if m is not None)
    return (
        [None if m is None else m[0] for m in made],
        [0 if m is None else m[1][0] for m in made],
        [*strides],
    )


def position_attend_backward(
    call: PositionCall,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    needs: PositionNeeds,
) -> PositionGradients:
    """All gradients in one call of the extension."""
    last, channels_last, depth = call.values[-1], call.channels_last, len(call.values)
    sizes = _sizes(last, channels_last)
    accumulate = weights.dtype
    coefficients = torch.empty((3, *weights.shape), dtype=accumulate, device="cpu")
    drow = torch.empty(sizes[1], dtype=accumulate, device="cpu") if needs.row else None
    dquery, dquery_view = None, NO_MAP
    if needs.query and call.query is not None:
        dquery, dquery_view = new_map(last, sizes, channels_last)
    dprev = None
    if needs.prev and dkl is not None and call.prev_weights is not None:
        dprev = torch.empty(call.prev_weights.shape, dtype=accumulate, device="cpu")
    dvalues, value_addresses, value_strides = _new_maps(last, sizes, channels_last, needs.values)
    dkeys, key_addresses, key_strides = _new_maps(last, sizes, channels_last, needs.keys)
    if not last.numel():
        return PositionGradients(
            coefficients, None if drow is None else drow.zero_(), dquery, dprev, dvalues, dkeys
        )
    weights, dweights, dkl = weights.contiguous(), dense(dweights), dense(dkl)
    dout_view, dout = _optional(dout, channels_last, bool(sizes[4]), "gradient of the output")
    workspace = torch.empty(
        compiled().position_workspace(sizes=sizes), dtype=accumulate, device="cpu"
    )
    made, keeps = _prepared(call, weights, sizes)
    compiled().position_backward(
        DTYPE_CODES[last.dtype],
        call=made,
        dout=dout_view,
        dweights=address(dweights, "gradient of the weights"),
        dkl=address(dkl, "gradient of kl"),
        coefficients=address(coefficients),
        drow=address(drow),
        dquery=dquery_view,
        dprev=address(dprev),
        dvalues=value_addresses,
        dvalue_strides=value_strides,
        dkeys=key_addresses,
        dkey_strides=key_strides,
        workspace=address(workspace),
        threads=thread_count(last.numel() * depth),
    )
    del keeps, dout
    return PositionGradients(coefficients, drow, dquery, dprev, dvalues, dkeys)


def position_gather(
    value: Tensor, left: Sequence[PositionLeft], index: int, channels_last: bool
) -> Tensor:
    """The gradient of the value at `index`, of what the layers that retrieved it left."""
    sizes = _sizes(value, channels_last)
    interleaved = bool(sizes[4])
    dvalue, dvalue_view = new_map(value, sizes, channels_last)
    if not value.numel():
        return dvalue
    view, value = one_map(value, channels_last, interleaved, "value")
    keeps, sources = [], []
    extension = compiled()
    planes = value.numel() // (sizes[0] * sizes[1])
    size = left[0].weights.element_size()
    for m in left:
        depth = m.weights.shape[1]
        dout_view, dout = _optional(m.dout, channels_last, interleaved, "gradient of the output")
        query_view, query = _optional(m.query, channels_last, interleaved, "query")
        offset = index * planes * size
        of_score = address(m.coefficients) + offset
        keeps.append((dout, query))
        sources.append(
            extension.position_left(
                dout=dout_view,
                weights=address(m.weights) + offset,
                alpha=of_score,
                beta=of_score + m.weights.numel() * size,
                batch=depth * planes,
                row=address(m.row),
                query=query_view,
            )
        )
    extension.position_gather(
        DTYPE_CODES[value.dtype],
        sizes=sizes,
        value=view,
        sources=sources,
        dvalue=dvalue_view,
        threads=thread_count(value.numel() * len(sources)),
    )
    del keeps
    return dvalue
