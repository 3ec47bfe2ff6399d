"""The glue to the compiled CPU kernels of a residual block's end: `x + mask * act(norm(o))`, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.addresses import maps
from ela_kernels.ops.layer_attention.cpp import DTYPE_CODES, NO_MAP, new_map, thread_count
from ela_kernels.ops.layer_attention.cpp import kernels as compiled
from ela_kernels.ops.layer_attention.cpp_layer import ImageSizes
from ela_kernels.ops.layer_attention.kernels import address
from ela_kernels.ops.layer_attention.layout import MapView, is_interleaved, kernel_sizes
from ela_kernels.ops.layer_attention.reference import accumulate_dtype


class Epilogue(NamedTuple):
    """What follows the retrieval in a residual block.

    `gamma` and `beta` `[C]` of the norm, None where it has none. `statistics`: mean and variance `[2, C]` to norm
    with, None where those of the batch are to be taken. `mask`: a factor for each sample `[B]`, or None.
    """

    gamma: Tensor | None
    beta: Tensor | None
    statistics: Tensor | None
    mask: Tensor | None
    eps: float
    relu: bool


def _view(tensor: Tensor, interleaved: bool) -> tuple[MapView, list[Tensor]]:
    (where,), strides, copies = maps((tensor,), False, interleaved)
    return (where, strides[0], strides[1]), copies


def _sizes(o: Tensor, interleaved: bool) -> ImageSizes:
    batch, channels, height, width = o.shape
    return batch, channels, height, width, int(interleaved)


def _workspace(sizes: ImageSizes, dtype: torch.dtype) -> Tensor:
    return torch.empty(compiled().norm_workspace(sizes), dtype=dtype)


def _vector(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def norm_forward(o: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
    """`x + mask * act(norm(o))` in one pass."""
    interleaved = is_interleaved(o, False)
    sizes, accumulate = _sizes(o, interleaved), accumulate_dtype(o.dtype)
    o_view, copies = _view(o, interleaved)
    x_view, x_copies = _view(x, interleaved)
    out, out_view = new_map(o, kernel_sizes(o, 1, False, interleaved), False)
    gamma, beta, mask = (
        _vector(t, accumulate) for t in (epilogue.gamma, epilogue.beta, epilogue.mask)
    )
    workspace = _workspace(sizes, accumulate)
    compiled().norm(
        DTYPE_CODES[o.dtype],
        sizes,
        o_view,
        x_view,
        out_view,
        statistics.data_ptr(),
        statistics[1].data_ptr(),
        address(gamma),
        address(beta),
        address(mask),
        epilogue.eps,
        epilogue.relu,
        workspace.data_ptr(),
        thread_count(3 * o.numel()),
    )
    del copies, x_copies
    return out


def norm_backward(
    o: Tensor, dout: Tensor, statistics: Tensor, epilogue: Epilogue, also: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(do, dgamma, dbeta)`; the last two None where the norm has no such parameter. `also` is added to `do`."""
    interleaved = is_interleaved(o, False)
    sizes, accumulate = _sizes(o, interleaved), accumulate_dtype(o.dtype)
    o_view, copies = _view(o, interleaved)
    dout_view, dout_copies = _view(dout, interleaved)
    also_view, also_copies = (NO_MAP, []) if also is None else _view(also, interleaved)
    do, do_view = new_map(o, kernel_sizes(o, 1, False, interleaved), False)
    gamma, beta, mask = (
        _vector(t, accumulate) for t in (epilogue.gamma, epilogue.beta, epilogue.mask)
    )
    dgamma = None if gamma is None else torch.empty_like(gamma)
    dbeta = None if beta is None else torch.empty_like(beta)
    workspace = _workspace(sizes, accumulate)
    compiled().norm_backward(
        DTYPE_CODES[o.dtype],
        sizes,
        o_view,
        dout_view,
        also_view,
        do_view,
        statistics.data_ptr(),
        statistics[1].data_ptr(),
        address(gamma),
        address(beta),
        address(mask),
        epilogue.eps,
        epilogue.relu,
        epilogue.statistics is None,
        address(dgamma),
        address(dbeta),
        workspace.data_ptr(),
        thread_count(5 * o.numel()),
    )
    del copies, dout_copies, also_copies
    if dgamma is not None and epilogue.gamma is not None:
        dgamma = dgamma.to(epilogue.gamma.dtype)
    if dbeta is not None and epilogue.beta is not None:
        dbeta = dbeta.to(epilogue.beta.dtype)
    return do, dgamma, dbeta
