"""Argument checks of attention over depth at every position: every refusal names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.ops.checks import check_scale as check_scale_of_heads
from ela_kernels.ops.checks import check_tensor

DEFAULT_EPS = 1e-6


def check_maps(name: str, maps: object) -> tuple[Tensor, ...]:
    """T tensors of one shape, dtype and device, at least one."""
    if isinstance(maps, Tensor):
        raise TypeError(
            f"{name}: got one tensor of shape {list(maps.shape)}; allowed is a tuple or list of T tensors, since "
            f"depth comes first in some libraries and second in others. Give list({name}.unbind(dim))"
        )
    if not isinstance(maps, (tuple, list)):
        raise TypeError(
            f"{name}: got {type(maps).__name__}; allowed is a tuple or list of T tensors"
        )
    if not maps:
        raise ValueError(f"{name}: got an empty sequence; allowed is one tensor or more (T >= 1)")
    first = check_tensor(f"{name}[0]", maps[0])
    for t, value in enumerate(maps):
        check_like(f"{name}[{t}]", check_tensor(f"{name}[{t}]", value), first, f"{name}[0]")
    return tuple(maps)


def check_like(name: str, tensor: Tensor, first: Tensor, of: str) -> None:
    """Shape, dtype and device of `first`."""
    _check_device(name, tensor, first, of)
    if tensor.dtype != first.dtype:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype} while {of} has {first.dtype}; allowed is one dtype. Convert one of them "
            "(under autocast this is done for you)"
        )
    if tensor.shape != first.shape:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}; allowed is that of {of}, {list(first.shape)}"
        )


def _check_device(name: str, tensor: Tensor, first: Tensor, of: str) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{name}: got device {tensor.device} while {of} is on {first.device}; allowed is one device for all "
            "tensors of a call"
        )


def check_channels_last(channels_last: object, value: Tensor) -> bool:
    """Whether the last dimension of a value is the channel: unless said, of tokens `[B, N, C]` and of nothing else."""
    if channels_last is not None and not isinstance(channels_last, bool):
        raise TypeError(
            f"channels_last: got {type(channels_last).__name__}; allowed is a bool or None"
        )
    if value.dim() < 2:
        raise ValueError(
            f"values[0]: got shape {list(value.shape)}; allowed is tokens [B, N, C], a map [B, C, H, W], or with "
            "channels_last=True [B, *positions, C]"
        )
    if value.dim() == 2:
        return False  # [B, C]: one position a sample
    last = value.dim() == 3 if channels_last is None else channels_last
    if value.shape[-1 if last else 1] < 1:
        raise ValueError(
            f"values[0]: got shape {list(value.shape)}, which has no channel; allowed is one or more"
        )
    return last


def check_query(query: object, first: Tensor, channels: int) -> Tensor:
    """A vector `[C]`, or a map like a value."""
    query = check_tensor("query", query)
    if query.dim() == 1:
        return check_vector("query", query, first, channels)
    if query.shape != first.shape:
        raise ValueError(
            f"query: got shape {list(query.shape)}; allowed is [C] = [{channels}], one vector for all positions, or "
            f"the shape of a value, {list(first.shape)}"
        )
    check_like("query", query, first, "values[0]")
    return query


def check_vector(name: str, vector: object, first: Tensor, channels: int) -> Tensor:
    """`[C]`, in the values' dtype, or in float32 beside half precision."""
    vector = check_tensor(name, vector)
    _check_device(name, vector, first, "values[0]")
    if vector.shape != (channels,):
        raise ValueError(
            f"{name}: got shape {list(vector.shape)}; allowed is [C] = [{channels}] for values of shape "
            f"{list(first.shape)}"
        )
    allowed = (first.dtype, accumulate_dtype(first.dtype))
    if vector.dtype not in allowed:
        raise TypeError(
            f"{name}: got dtype {vector.dtype} while values[0] has {first.dtype}; allowed is that dtype, or float32 "
            "beside half precision. Convert it first"
        )
    return vector


def check_eps(eps: object) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {type(eps).__name__}; allowed is a float")
    if not (0.0 <= eps < math.inf):
        raise ValueError(f"eps: got {eps}; allowed is a number from 0 on, as 1e-6")
    return float(eps)


def check_scale(scale: object) -> float:
    """1 unless given: the scores of the paper have no factor."""
    return check_scale_of_heads(scale, head_dim=1)


def check_prev(
    prev_weights: object, first: Tensor, depth: int, positions: Sequence[int]
) -> Tensor | None:
    """`[B, t, *positions]` with 1 <= t <= T, in the accumulation dtype, or None."""
    if prev_weights is None:
        return None
    if not isinstance(prev_weights, Tensor):
        raise TypeError(
            f"prev_weights: got {type(prev_weights).__name__}; allowed is a torch.Tensor or None"
        )
    accumulate = accumulate_dtype(first.dtype)
    if prev_weights.layout != torch.strided or prev_weights.dtype != accumulate:
        raise TypeError(
            f"prev_weights: got dtype {prev_weights.dtype}, layout {prev_weights.layout}; allowed is a dense "
            f"{accumulate} tensor, as `weights` of the layer before is"
        )
    _check_device("prev_weights", prev_weights, first, "values[0]")
    batch, *places = positions
    shape = prev_weights.shape
    fits = len(shape) == len(positions) + 1 and shape[0] == batch and list(shape[2:]) == places
    if not fits or not 1 <= shape[1] <= depth:
        raise ValueError(
            f"prev_weights: got shape {list(shape)}; allowed is [B, t, *positions] = "
            f"{[batch, 't', *places]} with 1 <= t <= {depth}, the number of values".replace("'", "")
        )
    return prev_weights
