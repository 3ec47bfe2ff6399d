"""The glue to the compiled CUDA kernels: layouts, allocation and calls. Arguments are checked already.

Every call takes the current stream of the tensors' device, allocates before its launches and waits for nothing, so a
step can be captured into a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.extension import extension
from ela_kernels.backends.gpu_tables import (
    GpuContribution,
    Sizes,
    alike_maps,
    alike_rows,
    check_inputs,
    check_saved,
    compact_strides,
    map_view,
    new_divergence,
    new_gradients,
    new_weights,
)
from ela_kernels.backends.layout import (
    MapView,
    dense,
    empty_map,
    is_interleaved,
    kernel_sizes,
    new_row,
    resolved,
)
from ela_kernels.backends.memory import address, addresses, check_list_readable
from ela_kernels.backends.types import Gradients, Saved
from ela_kernels.torch_internals import cuda_stream

__all__ = ["attend", "attend_backward", "gather", "weights"]

_DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_MAP: MapView = (0, 0, 0)


def _kernels() -> Any:
    module = extension()
    if module is None or not module.has_cuda:
        raise RuntimeError("the CUDA kernels are not available: see `python -m ela_kernels info`")
    return module


def _device(tensor: Tensor) -> tuple[int, int]:
    """Index of a tensor's device, and the handle of its current stream."""
    index = tensor.device.index
    assert cuda_stream is not None
    return index, cuda_stream(index)


def _launched(code: int) -> None:
    if code != 0:
        raise RuntimeError(
            f"ela_kernels: a CUDA kernel was not launched, {_kernels().cuda_error(code)}. "
            "ela_kernels.use_backend('eager') does without; `python -m ela_kernels info` says what is here"
        )


@functools.lru_cache(maxsize=1024)
def _backward_workspace(dtype: int, sizes: Sizes, depth: int) -> int:
    return int(_kernels().cuda_backward_workspace(dtype, sizes=sizes, depth=depth))


def _new_map(like: Tensor, sizes: Sizes, channels_last: bool) -> tuple[Tensor, MapView]:
    new = empty_map(like, channels_last, bool(sizes[4]))
    return new, (address(new), *compact_strides(sizes))


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)` in one launch."""
    check_inputs(q, keys, values, prev_weights)
    last = values[-1]
    interleaved = is_interleaved(last, channels_last)
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    if not last.numel():
        return empty_map(last, channels_last, interleaved), *weights(
            q, keys, heads, scale, prev_weights
        )
    (q,), query_stride = alike_rows((q,))
    keys, key_stride = alike_rows(keys)
    values, value_strides = alike_maps(values, channels_last, interleaved)
    out, out_view = _new_map(last, sizes, channels_last)
    weights_out = new_weights(q, heads, len(values))
    prev_weights = dense(prev_weights)
    kl = new_divergence(q, heads, prev_weights)
    _launched(
        _kernels().cuda_forward(
            _device(q),
            _DTYPE_CODES[q.dtype],
            sizes=sizes,
            attention=_kernels().cuda_attention(
                scale=scale,
                tolerance=tolerance,
                query=address(q),
                query_stride=query_stride,
                keys=addresses(keys),
                key_stride=key_stride,
                values=addresses(values),
                value_strides=value_strides,
                prev=address(prev_weights),
                prev_depth=0 if prev_weights is None else prev_weights.shape[2],
                weights=address(weights_out),
            ),
            kl=address(kl),
            out=out_view,
        )
    )
    return out, weights_out, kl


def weights(
    q: Tensor, keys: Sequence[Tensor], heads: int, scale: float, prev_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(weights, kl)` in one launch; no value is read."""
    check_inputs(q, keys, (), prev_weights)
    (q,), query_stride = alike_rows((resolved(q),))
    keys, key_stride = alike_rows([resolved(k) for k in keys])
    weights_out = new_weights(q, heads, len(keys))
    prev_weights = dense(prev_weights)
    kl = new_divergence(q, heads, prev_weights)
    if weights_out.numel():
        _launched(
            _kernels().cuda_weights(
                _device(q),
                _DTYPE_CODES[q.dtype],
                sizes=(*q.shape, heads, 1, 0),
                attention=_kernels().cuda_attention(
                    scale=scale,
                    tolerance=0.0,
                    query=address(q),
                    query_stride=query_stride,
                    keys=addresses(keys),
                    key_stride=key_stride,
                    values=[],
                    value_strides=(0, 0),
                    prev=address(prev_weights),
                    prev_depth=0 if prev_weights is None else prev_weights.shape[2],
                    weights=address(weights_out),
                ),
                kl=address(kl),
            )
        )
    return weights_out, kl


def attend_backward(
    saved: Saved,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    need_q: bool,
    need_prev: bool,
    need_keys: Sequence[bool] = (),
    need_values: Sequence[bool] = (),
    into: Tensor | None = None,
) -> Gradients:
    """Gradients of scores, query and previous weights, and in the push form of every key and value.

    `into`: where the gradient of the scores is to be written, `[B, G, depth]`.
    """
    check_saved(saved, dout, dweights, dkl)
    q, keys, values, heads, scale, prev_weights, weights, channels_last, tolerance = saved
    last = values[-1]
    depth = len(values)
    interleaved = is_interleaved(last, channels_last)
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    if not last.numel():  # there is nothing to read; what is small has a gradient all the same
        sizes = (*q.shape, heads, 1, 0)
    (q,), query_stride = alike_rows((q,))
    keys, key_stride = alike_rows(keys)
    new = new_gradients(
        saved, dout is not None, dkl is not None, need_q, need_prev, need_keys, need_values
    )
    if into is not None:
        new = new._replace(dscores=into)
    dweights, dkl, prev_weights = dense(dweights), dense(dkl), dense(prev_weights)
    dout_view, value_strides, dvalue_strides = _NO_MAP, (0, 0), (0, 0)
    dvalue_addresses: list[int] = []
    workspace = None
    if dout is not None and last.numel():
        dout, dout_view = map_view(resolved(dout), channels_last, interleaved)
        values, value_strides = alike_maps(values, channels_last, interleaved)
        if any(need_values):
            dvalue_addresses = [address(d) for d in new.dvalues]
            dvalue_strides = compact_strides(sizes)
        elements = _backward_workspace(_DTYPE_CODES[q.dtype], sizes, depth)
        workspace = torch.empty(elements, dtype=torch.float32, device=q.device)
    if new.dscores.numel():
        _launched(
            _kernels().cuda_backward(
                _device(q),
                _DTYPE_CODES[q.dtype],
                sizes=sizes,
                attention=_kernels().cuda_attention(
                    scale=scale,
                    tolerance=tolerance,
                    query=address(q),
                    query_stride=query_stride,
                    keys=addresses(keys),
                    key_stride=key_stride,
                    values=addresses(values) if dout_view[0] else [],
                    value_strides=value_strides,
                    prev=address(prev_weights),
                    prev_depth=0 if prev_weights is None else prev_weights.shape[2],
                    weights=address(weights),
                ),
                dout=dout_view,
                dweights=address(dweights),
                dkl=address(dkl),
                dscores=address(new.dscores),
                dquery=address(new.dq),
                dkeys=[address(d) for d in new.dkeys] if any(need_keys) else [],
                dprev=address(new.dprev),
                dvalues=dvalue_addresses,
                dvalue_strides=dvalue_strides,
                workspace=address(workspace),
            )
        )
    return new


def gather(
    contributions: Sequence[GpuContribution],
    index: int,
    heads: int,
    channels_last: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`(dk, dv)` of the layer at `index` in one launch, each a sum over the layers that retrieved it."""
    with_dout = [r for r in contributions if r.dout is not None]
    need_value = need_value and bool(with_dout)
    if not need_key and not need_value:
        return None, None
    check_list_readable(
        contributions[0].q.get_device(),
        "what a layer's backward left",
        [t for r in contributions for t in (r.dscores, r.weights)],
    )
    queries, query_stride = alike_rows([r.q for r in contributions])
    q = queries[0]
    dkey = new_row(q) if need_key else None
    sizes: Sizes = (q.shape[0], q.shape[1], heads, 1, 0)
    douts: Sequence[Tensor] = ()
    dvalue, dvalue_view, dout_strides = None, _NO_MAP, (0, 0)
    if need_value:
        douts = [r.dout for r in with_dout if r.dout is not None]
        interleaved = is_interleaved(douts[0], channels_last)
        sizes = kernel_sizes(douts[0], heads, channels_last, interleaved)
        dvalue, dvalue_view = _new_map(douts[0], sizes, channels_last)
        if not dvalue.numel():
            douts, dvalue_view, sizes = (), _NO_MAP, (q.shape[0], q.shape[1], heads, 1, 0)
        else:
            douts, dout_strides = alike_maps(douts, channels_last, interleaved)
    if q.shape[0] and (dkey is not None or douts):
        offset = index * 4  # bytes of a float32
        with_value = with_dout if douts else []
        _launched(
            _kernels().cuda_gather(
                _device(q),
                _DTYPE_CODES[q.dtype],
                sizes=sizes,
                queries=addresses(queries),
                query_stride=query_stride,
                score_columns=[address(r.dscores) + offset for r in contributions],
                score_strides=[r.dscores.shape[2] for r in contributions],
                dkey=address(dkey),
                douts=addresses(douts),
                dout_strides=dout_strides,
                weight_columns=[address(r.weights) + offset for r in with_value],
                weight_strides=[r.weights.shape[2] for r in with_value],
                tolerances=[r.tolerance for r in with_value],
                dvalue=dvalue_view,
            )
        )
    return dkey, dvalue
