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
    dtype = torch.get_autocast_dtype(q.device.type)
    return (
        as_autocast_dtype(q, dtype, "q"),
        as_autocast_dtype(keys, dtype, "keys"),
        as_autocast_dtype(values, dtype, "values"),
    )


def as_autocast_dtype(x: Any, dtype: torch.dtype, name: str) -> Any:
    """A tensor, or a sequence of tensors, in `dtype`; float64 and foreign types stay."""
    if isinstance(x, Tensor):
        if not x.is_floating_point() or x.dtype in (torch.float64, dtype):
            return x
        check_not_freed(name, x)
        return x.to(dtype)
    if isinstance(x, (tuple, list)):
        return tuple(as_autocast_dtype(y, dtype, name) for y in x)
    return x
