"""What autocast means for the kernels of a whole layer: the dtypes that PyTorch's own pieces would compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.memory import cast, check_not_freed
from ela_kernels.backends.types import Filters


def may_be_cast(x: Tensor) -> bool:
    """Whether autocast casts a tensor like this one; float64 it leaves alone, and formats of eight bits are refused."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def layer_dtype(x: Tensor) -> torch.dtype:
    """The dtype of query, key, value and what a layer retrieves: under autocast that of its convolutions.

    The norm, the activation and the sum with `x` come after, and are in no list of autocast: they keep their inputs'
    dtypes. So a residual block's output is of this dtype where `x` is, and of the wider of the two where it is not.
    """
    if may_be_cast(x) and is_autocast_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def fits_layer_dtype(w: Tensor, x: Tensor) -> bool:
    """Whether a filter has, or is cast to, the dtype of a layer of `x`."""
    if w.dtype == layer_dtype(x):
        return True
    return may_be_cast(x) and may_be_cast(w) and is_autocast_on(x)


def as_autocast(x: Tensor, filters: Filters) -> tuple[Tensor, Filters]:
    """`x` and its filters in one dtype; their gradients come back in their own."""
    if not is_autocast_on(x):
        return x, filters
    dtype = layer_dtype(x)
    wq, wk, wv = filters
    return cast(x, dtype, "x"), Filters(
        None if wq is None else cast(wq, dtype, "Wq"), cast(wk, dtype, "Wk"), cast(wv, dtype, "Wv")
    )


def is_autocast_on(q: Tensor) -> bool:
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def autocast_inputs(q: Tensor, keys: Any, values: Any) -> tuple[Tensor, Any, Any]:
    """Cast as PyTorch's own matrix products are under autocast; float64 and foreign types stay."""
    device_type = q.device.type
    return (
        in_autocast_dtype(q, "q", device_type),
        in_autocast_dtype(keys, "keys", device_type),
        in_autocast_dtype(values, "values", device_type),
    )


def in_autocast_dtype(x: Any, name: str, device_type: str) -> Any:
    """A tensor, or those of a sequence, as autocast casts what a matrix product on a device of this type is given."""
    if isinstance(x, Tensor):
        dtype = torch.get_autocast_dtype(device_type)
        if not x.is_floating_point() or x.dtype in (torch.float64, dtype):
            return x
        check_not_freed(name, x)
        return x.to(dtype)
    if isinstance(x, (tuple, list)):
        return tuple(in_autocast_dtype(y, name, device_type) for y in x)
    return x
