"""The glue to the CUDA kernels that make a layer's value from a feature map, and their backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.cuda.norm import parameter, parameter_view
from ela_kernels.backends.gpu_tables import ProducerGradients, check_produced, map_view
from ela_kernels.backends.layout import (
    MapView,
    dense,
    empty_map,
    is_interleaved,
    new_row,
    view_in_form,
)
from ela_kernels.backends.memory import address
from ela_kernels.backends.types import Filters

ImageSizes = tuple[int, int, int, int, int]
"""B, C, H, W, interleaved."""

_NO_MAP: MapView = (0, 0, 0)


@functools.lru_cache(maxsize=4096)
def _groups(dtype: int, sizes: ImageSizes) -> int:
    return int(cuda._kernels().cuda_producer_groups(dtype, sizes=sizes))


@functools.lru_cache(maxsize=4096)
def _workspace(dtype: int, sizes: ImageSizes, filter_size: int) -> int:
    return int(cuda._kernels().cuda_producer_workspace(dtype, sizes=sizes, filter_size=filter_size))


def _image_sizes(x: Tensor) -> ImageSizes:
    batch, channels, height, width = x.shape
    return batch, channels, height, width, int(is_interleaved(x, False))


def _new_map(x: Tensor, interleaved: bool) -> tuple[Tensor, MapView]:
    new = empty_map(x, False, interleaved)
    view = view_in_form(new, False, interleaved)
    assert view is not None  # empty_map made it so
    return new, view


def _readable(filter_: Tensor) -> Tensor:
    found = parameter(filter_)
    assert found is not None
    return found


def _view(tensor: Tensor | None, interleaved: bool) -> tuple[Tensor | None, MapView]:
    return (None, _NO_MAP) if tensor is None else map_view(tensor, False, interleaved)


def produce(x: Tensor, wv: Tensor) -> tuple[Tensor, Tensor]:
    """`(v, sums)` in one launch: the value of a feature map, and partial sums over its space `[B, groups, C]`."""
    sizes = _image_sizes(x)
    interleaved = bool(sizes[4])
    dtype = cuda._DTYPE_CODES[x.dtype]
    x, x_view = map_view(x, False, interleaved)
    wv = _readable(wv)
    v, v_view = _new_map(x, interleaved)
    sums = torch.empty(
        (sizes[0], _groups(dtype, sizes), sizes[1]), dtype=torch.float32, device=x.device
    )
    cuda._launched(
        cuda._kernels().cuda_producer_forward(
            cuda._device(x),
            dtype,
            sizes=sizes,
            x=x_view,
            wv=parameter_view(wv),
            v=v_view,
            sums=address(sums),
        )
    )
    return v, sums


def produce_backward(
    x: Tensor,
    filters: Filters,
    mean: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    residual: Tensor | None,
    needs: Sequence[bool],
) -> ProducerGradients:
    """What query, key and value send back to `x` and to the filters, in at most two launches.

    Args:
        dq, dk, dv: their gradients, None where none arrives.
        residual: added to the gradient of `x`.
        needs: of x, wq, wk, wv.
    """
    check_produced(x, filters, mean, dq, dk, dv, residual)
    need_x, need_wq, need_wk, need_wv = needs
    sizes = _image_sizes(x)
    interleaved = bool(sizes[4])
    dtype = cuda._DTYPE_CODES[x.dtype]
    wq, wk, wv = parameter(filters.wq), _readable(filters.wk), _readable(filters.wv)
    dq, dk = dense(dq), dense(dk)
    x, x_view = map_view(x, False, interleaved)
    dv, dv_view = _view(dv, interleaved)
    residual, residual_view = _view(residual, interleaved)
    dx, dx_view = _new_map(x, interleaved) if need_x else (None, _NO_MAP)
    dwq = new_row(wq) if need_wq and wq is not None else None
    dwk = new_row(wk) if need_wk else None
    dwv = new_row(wv) if need_wv else None
    # A parameter that no gradient reaches.
    for gradient, source in ((dwq, dq), (dwk, dk), (dwv, dv)):
        if gradient is not None and source is None:
            gradient.zero_()
    taken_wq, taken_wk, taken_wv = (
        d if source is not None else None for d, source in ((dwq, dq), (dwk, dk), (dwv, dv))
    )
    workspace = None
    if taken_wq is not None or taken_wk is not None or taken_wv is not None:
        elements = _workspace(dtype, sizes, wk.numel())
        workspace = torch.empty(elements, dtype=torch.float32, device=x.device)
    if dx is not None or workspace is not None:
        cuda._launched(
            cuda._kernels().cuda_producer_backward(
                cuda._device(x),
                dtype,
                sizes=sizes,
                filter_size=wk.numel(),
                dv=dv_view,
                x=x_view,
                residual=residual_view,
                wq=parameter_view(wq),
                wk=parameter_view(wk),
                wv=parameter_view(wv),
                dquery=address(dq),
                dkey=address(dk),
                mean=address(mean),
                gradients=cuda._kernels().cuda_producer_gradients(
                    dx=dx_view,
                    dwq=address(taken_wq),
                    dwk=address(taken_wk),
                    dwv=address(taken_wv),
                ),
                workspace=address(workspace),
            )
        )
    return ProducerGradients(dx, dwq, dwk, dwv)
