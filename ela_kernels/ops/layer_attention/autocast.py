"""What autocast means for the kernels of a whole layer: the dtypes that PyTorch's own pieces would compute in."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.interface import is_autocast_on
from ela_kernels.ops.layer_attention.layer_kernels import Filters
from ela_kernels.ops.layer_attention.memory import cast


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
