"""How a feature map lies in memory, as the kernels see it: B x C x N with two strides and one of two forms."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.memory import address, with_memory

MapView = tuple[int, int, int]
"""Address, batch stride, and channel stride (planar) or position stride (interleaved), in elements."""


def is_interleaved(value: Tensor, channels_last: bool) -> bool:
    """True when the channels of a position lie together, False when the positions of a channel do.

    A map in neither form (a spatial slice, say) gets the form of its shape; :func:`in_form` then copies it. So does one
    of a single channel, whatever its strides: a compact map made like it has that form too.
    """
    if value.shape[-1 if channels_last else 1] == 1:
        return channels_last
    if value.is_contiguous() or _inner_stride(value, channels_last, channels_last) is not None:
        return channels_last
    return (_inner_stride(value, channels_last, not channels_last) is not None) != channels_last


def _inner_stride(value: Tensor, channels_last: bool, interleaved: bool) -> int | None:
    """Channel stride (planar) or position stride (interleaved); None when the map is not in that form."""
    shape, strides = value.shape, value.stride()
    try:
        return _cached_inner_stride(shape, strides, channels_last, interleaved)
    except TypeError:  # symbolic sizes cannot be looked up
        return _inner_stride_of(shape, strides, channels_last, interleaved)


def _inner_stride_of(
    shape: Sequence[int], strides: Sequence[int], channels_last: bool, interleaved: bool
) -> int | None:
    channel = len(shape) - 1 if channels_last else 1
    position_stride = None
    expected = None
    for i in range(len(shape) - 1, 0, -1):
        if i == channel or shape[i] == 1:
            continue
        if position_stride is None:
            position_stride = strides[i]
        elif strides[i] != expected:
            return None
        expected = strides[i] * shape[i]
    if interleaved:
        if strides[channel] != 1 and shape[channel] != 1:
            return None
        return shape[channel] if position_stride is None else position_stride
    if position_stride not in (None, 1):
        return None
    return strides[channel] if shape[channel] != 1 else (expected or 1)


# Asked for several maps of every layer and step; a process meets few shapes.
_cached_inner_stride = functools.lru_cache(maxsize=4096)(_inner_stride_of)


def view_in_form(value: Tensor, channels_last: bool, interleaved: bool) -> MapView | None:
    """The kernel's view of `value`, or None when it is not in that form.

    Its address is as PyTorch gives it, for a tensor without memory too; :func:`readable_view` looks at it.
    """
    inner = _inner_stride(value, channels_last, interleaved)
    return None if inner is None else (value.data_ptr(), value.stride(0), inner)


def readable_view(
    value: Tensor, channels_last: bool, interleaved: bool, name: str = "a tensor"
) -> MapView | None:
    """The view of a tensor that a kernel reads or writes, or None when it is not in that form.

    Raises:
        ValueError: it has no memory.
    """
    inner = _inner_stride(value, channels_last, interleaved)
    return None if inner is None else (address(value, name), value.stride(0), inner)


def in_form(value: Tensor, channels_last: bool, interleaved: bool) -> Tensor:
    """`value` itself when the kernels can read it in that form, else a compact copy that they can read."""
    if _inner_stride(value, channels_last, interleaved) is not None:
        return value
    return empty_map(value, channels_last, interleaved).copy_(with_memory(value))


def readable(x: Tensor) -> Tensor:
    """A feature map `[B, C, ...]` itself where the kernels can read it, else a compact copy."""
    return in_form(x, False, is_interleaved(x, False))


def empty_map(
    like: Tensor, channels_last: bool, interleaved: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """A new compact map of `like`'s shape in the given form, and of its dtype unless given."""
    if interleaved == channels_last:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    shape = list(like.shape)
    if channels_last:
        shape.insert(1, shape.pop())
        return like.new_empty(shape, dtype=dtype).movedim(1, -1)
    shape.append(shape.pop(1))
    return like.new_empty(shape, dtype=dtype).movedim(-1, 1)


def made_like(x: Tensor) -> Tensor:
    """A new feature map as kernels make one beside `x` `[B, C, ...]`: its strides where it is dense, else compact."""
    interleaved = is_interleaved(x, False)
    if _inner_stride(x, False, interleaved) is not None:
        new = torch.empty_like(x)
        if new.stride() == x.stride():
            return new
    return empty_map(x, False, interleaved)


def kernel_sizes(
    value: Tensor, heads: int, channels_last: bool, interleaved: bool
) -> tuple[int, int, int, int, int]:
    """`(B, C, G, N, interleaved)` as the extension takes it."""
    shape = value.shape
    batch, channels = shape[0], shape[-1 if channels_last else 1]
    if value.numel():
        return batch, channels, heads, value.numel() // (batch * channels), int(interleaved)
    positions = 1
    for i, size in enumerate(shape[1:], start=1):
        if i != (value.dim() - 1 if channels_last else 1):
            positions *= size
    return batch, channels, heads, positions, int(interleaved)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights, divergence and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolved(tensor: Tensor) -> Tensor:
    """`tensor` with its signs in memory: PyTorch may hold a negation back as a flag, which a kernel cannot see."""
    return with_memory(tensor).resolve_neg() if tensor.is_neg() else tensor


def contiguous(tensor: Tensor) -> Tensor:
    """`tensor` contiguous and with its signs in memory."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return with_memory(tensor).resolve_neg().contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """:func:`contiguous`, of what may be None."""
    return None if tensor is None else contiguous(tensor)


def new_row(like: Tensor) -> Tensor:
    """A new contiguous tensor for the gradient of a query or key."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def as_read_beside(x: Tensor, other: Tensor) -> Tensor:
    """`other` as the kernels read it beside `x`: itself, or a copy."""
    return in_form(resolved(other), False, is_interleaved(x, False))


class SameStrides(tuple[Tensor, ...]):
    """Tensors that have one set of strides, which then need not be asked of each at every layer."""

    __slots__ = ()


def with_one_more(tensors: Sequence[Tensor], tensor: Tensor) -> tuple[Tensor, ...]:
    """`tensors` and `tensor`, :class:`SameStrides` where all of them are known to be."""
    is_alike = not tensors or (
        type(tensors) is SameStrides and tensors[0].stride() == tensor.stride()
    )
    return SameStrides((*tensors, tensor)) if is_alike else (*tensors, tensor)
