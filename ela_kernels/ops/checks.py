"""Argument checks of the operations: every refusal names the argument, what it got and what is allowed."""

from __future__ import annotations

import math
from typing import cast, get_args

import torch
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.types import LEAST_TOLERANCE, ValueAct

ALLOWED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ALLOWED_NAMES = "float64, float32, bfloat16 or float16"


def check_tensor(name: str, tensor: object) -> Tensor:
    """A dense floating-point tensor, or TypeError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; allowed is a torch.Tensor")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name}: got a tensor of layout {tensor.layout}; allowed is torch.strided. "
            "Call .to_dense() first"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name}: got a nested tensor; allowed is one of samples of one size. Call .to_padded_tensor() first"
        )
    if tensor.dtype not in ALLOWED_DTYPES:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}; allowed is {_ALLOWED_NAMES}. Convert it first"
        )
    return tensor


def check_heads(heads: object, channels: int) -> int:
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads: got {type(heads).__name__}; allowed is an int")
    if heads < 1 or channels < 1 or channels % heads:
        raise ValueError(
            f"heads: got {heads} for {channels} channels; allowed is a positive divisor of the "
            "number of channels (channels = heads * head_dim)"
        )
    return heads


def check_scale(scale: object, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}; allowed is a float or None")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: got {scale}; allowed is a finite number or None")
    return float(scale)


def check_tolerance(tolerance: object) -> float:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance: got {type(tolerance).__name__}; allowed is a float")
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(
            f"tolerance: got {tolerance}; allowed is a weight from 0 (nothing is left out) to below 1, as 2**-24"
        )
    return max(float(tolerance), LEAST_TOLERANCE) if tolerance > 0 else 0.0


VALUE_ACTS = (None, *get_args(ValueAct))


def check_value_act(value_act: object) -> ValueAct | None:
    if value_act not in VALUE_ACTS:
        raise ValueError(
            f"value_act: got {value_act!r}; allowed are {', '.join(map(repr, VALUE_ACTS))}"
        )
    return cast("ValueAct | None", value_act)


def check_like(
    name: str, tensor: Tensor, q: Tensor, q_name: str = "q", of: str = "q, keys and values"
) -> None:
    """Same device and dtype as the query, or as another tensor that says what those `of` a call are."""
    _check_device(name, tensor, q, q_name)
    if tensor.dtype != q.dtype:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype} while {q_name} has {q.dtype}; allowed is one dtype for {of}. "
            "Convert one of them (under autocast this is done for you)"
        )


def _check_device(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: got device {tensor.device} while {other_name} is on {other.device}; allowed is one device "
            "for all tensors of a call"
        )


def _sequence(name: str, tensors: object, stacked_from: int) -> tuple[Tensor, ...]:
    """T separate tensors; a stacked one is taken apart into views, without a copy."""
    if isinstance(tensors, Tensor):
        check_tensor(name, tensors)
        if tensors.dim() < stacked_from:
            raise ValueError(
                f"{name}: got one tensor of shape {list(tensors.shape)}; allowed is a sequence of T "
                f"tensors, or one stacked tensor of at least {stacked_from} dimensions [B, T, ...]"
            )
        tensors = tensors.unbind(1)
    if not isinstance(tensors, (tuple, list)):
        raise TypeError(
            f"{name}: got {type(tensors).__name__}; allowed is a tuple or list of tensors, or one "
            "stacked tensor"
        )
    if len(tensors) == 0:
        raise ValueError(f"{name}: got an empty sequence; allowed is one tensor or more (T >= 1)")
    return tuple(tensors)


def check_query(q: object, name: str = "q") -> Tensor:
    q = check_tensor(name, q)
    if q.dim() != 2:
        raise ValueError(f"{name}: got shape {list(q.shape)}; allowed is [B, C]")
    return q


def check_keys(keys: object, q: Tensor) -> tuple[Tensor, ...]:
    checked = _sequence("keys", keys, stacked_from=3)
    shape = q.shape
    for j, key in enumerate(checked):
        check_tensor(f"keys[{j}]", key)
        check_like(f"keys[{j}]", key, q)
        if key.shape != shape:
            raise ValueError(
                f"keys[{j}]: got shape {list(key.shape)}; allowed is q's shape {list(shape)}"
            )
    return checked


def check_map(name: str, value: object, q: Tensor, channels_last: bool) -> Tensor:
    """A feature map that belongs to the query: `[B, C, *spatial]`, or `[B, *spatial, C]`."""
    value = check_tensor(name, value)
    check_like(name, value, q)
    batch, channels = q.shape
    form = "[B, *spatial, C]" if channels_last else "[B, C, *spatial]"
    if value.dim() < 2 or (channels_last and value.dim() < 3):
        raise ValueError(f"{name}: got shape {list(value.shape)}; allowed is {form}")
    found = value.shape[-1] if channels_last else value.shape[1]
    if value.shape[0] != batch or found != channels:
        raise ValueError(
            f"{name}: got shape {list(value.shape)}; allowed is {form} with B = {batch} and "
            f"C = {channels} as in q (channels_last={channels_last})"
        )
    return value


def check_values(values: object, q: Tensor, depth: int, channels_last: bool) -> tuple[Tensor, ...]:
    checked = _sequence("values", values, stacked_from=4)
    if len(checked) != depth:
        raise ValueError(
            f"values: got {len(checked)} tensors for {depth} keys; allowed is one value for each key"
        )
    for j, value in enumerate(checked):
        check_map(f"values[{j}]", value, q, channels_last)
        _check_shape_of_first(j, value, checked[0])
    return checked


def _check_shape_of_first(j: int, value: Tensor, first: Tensor) -> None:
    if value.shape != first.shape:
        raise ValueError(
            f"values[{j}]: got shape {list(value.shape)}; allowed is that of values[0], "
            f"{list(first.shape)}"
        )


def check_maps(values: object, channels_last: bool) -> tuple[Tensor, ...]:
    """Feature maps without a query: the first says what all of them are.

    Their dtypes are compared under autocast too, which casts them alike.
    """
    checked = _sequence("values", values, stacked_from=4)
    first = check_tensor("values[0]", checked[0])
    if first.dim() < (3 if channels_last else 2) or first.shape[-1 if channels_last else 1] == 0:
        form = "[B, *spatial, C]" if channels_last else "[B, C, *spatial]"
        raise ValueError(
            f"values[0]: got shape {list(first.shape)}; allowed is {form} with one channel or more "
            f"(channels_last={channels_last})"
        )
    for j, value in enumerate(checked):
        check_tensor(f"values[{j}]", value)
        check_like(f"values[{j}]", value, first, "values[0]", "all values")
        _check_shape_of_first(j, value, first)
    return checked


def check_mix_weights(weights: object, values: tuple[Tensor, ...], channels_last: bool) -> int:
    """How many heads the weights of a mix are for."""
    weights = check_tensor("weights", weights)
    first, depth = values[0], len(values)
    _check_device("weights", weights, first, "values[0]")
    wide = accumulate_dtype(first.dtype)
    if weights.dtype not in (first.dtype, wide):
        also = "" if wide == first.dtype else f", or {wide}"
        raise TypeError(
            f"weights: got dtype {weights.dtype} for values in {first.dtype}; allowed is that of the values{also}. "
            "Convert them"
        )
    batch, channels = first.shape[0], first.shape[-1 if channels_last else 1]
    shape = list(weights.shape)
    *sample, heads = [1, *shape[:-1]] if len(shape) < 2 else shape[:-1]
    if (
        not 1 <= len(shape) <= 3
        or shape[-1] != depth
        or heads < 1
        or channels % heads
        or (len(shape) == 3 and sample != [batch])
    ):
        raise ValueError(
            f"weights: got shape {shape}; allowed is [T], [G, T] or [B, G, T] with T = {depth} values, B = {batch} and "
            f"G a divisor of the {channels} channels"
        )
    return heads


def check_prev_weights(
    prev_weights: object, q: Tensor, heads: int, depth: int, accumulate: torch.dtype
) -> Tensor | None:
    if prev_weights is None:
        return None
    if not isinstance(prev_weights, Tensor):
        raise TypeError(
            f"prev_weights: got {type(prev_weights).__name__}; allowed is a torch.Tensor or None"
        )
    if prev_weights.layout != torch.strided or prev_weights.dtype != accumulate:
        raise TypeError(
            f"prev_weights: got dtype {prev_weights.dtype}, layout {prev_weights.layout}; allowed "
            f"is a dense {accumulate} tensor, as `weights` of the previous layer is"
        )
    if prev_weights.device != q.device:
        raise ValueError(
            f"prev_weights: got device {prev_weights.device} while q is on {q.device}; allowed is "
            "one device for all tensors of a call"
        )
    shape = prev_weights.shape
    if len(shape) != 3 or shape[0] != q.shape[0] or shape[1] != heads or not 1 <= shape[2] <= depth:
        raise ValueError(
            f"prev_weights: got shape {list(shape)}; allowed is [B, heads, t'] = "
            f"[{q.shape[0]}, {heads}, t'] with 1 <= t' <= {depth}, the depth of the history"
        )
    return prev_weights
