"""The public function: checks, choice of backend, call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.dispatch import kernels_for, why_eager
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.memory import check_not_freed
from ela_kernels.explaining import refused, served, served_without_kernels
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import as_autocast_dtype, is_autocast_on
from ela_kernels.ops.depth_mix.autograd import depth_mix_autograd
from ela_kernels.ops.depth_mix.reference import depth_mix_reference


def depth_mix(
    weights: Tensor, values: Sequence[Tensor] | Tensor, *, channels_last: bool = False
) -> Tensor:
    r"""Add up feature maps over depth by weights that are given: of any sign, and with no softmax.

    Equivalent PyTorch, for weights `[B, G, T]` and values `[B, C, H, W]`::

        v = torch.stack(values, 1).unflatten(2, (G, -1))                  # [B, T, G, D, H, W]
        out = torch.einsum("bgt,btgdhw->bgdhw", weights, v).flatten(1, 2)  # [B, C, H, W]

    One pass over the values, and nothing is concatenated: the forward reads T maps and writes one, the backward reads
    T + 1 and writes T. Factors that belong to a value, sample and channel are multiplied up on the weights instead of
    on the maps: `depth_mix(weights * gates, values)` with `gates` `[B, C, T]` is what
    `depth_mix(weights, [v * g for v, g in ...])` is, and writes no map.

    Args:
        weights: one for each value, `[T]`; for each head and value, `[G, T]`; or for each sample, head and value,
            `[B, G, T]`. G is a divisor of C, and channel c belongs to head c // (C / G): C is one head a channel. In
            the dtype of the values, or in float32 beside half precision, which is what they are computed in.
        values: T feature maps `[B, C, *spatial]` in any memory format, or `[B, *spatial, C]` (tokens: `[B, N, C]`)
            with `channels_last=True`, or one stacked tensor `[B, T, ...]`; float64, float32, bfloat16 or float16.
        channels_last: the last dimension of the values is the channel.

    Returns:
        `out`, shape and dtype of one value, added up in float32 (float64 for float64) and rounded once. It is
        differentiable in weights and values; a second derivative is computed by eager PyTorch. A weight of zero is
        multiplied as any other is: with an infinite value it gives a NaN. Under autocast the values are cast as those
        of a matrix product are.

    Raises:
        TypeError: not a tensor, an integer or sparse tensor, or dtypes that do not go together.
        ValueError: shapes or devices that do not fit, an empty sequence, or a forced backend that cannot serve the
            call.

    Source:
        DenseFormer (arXiv 2402.02622), the depth-weighted average, with weights `[T]`. Dynamic layer attention (DLA,
        arXiv 2406.13392) multiplies what earlier layers left with gates of each sample and channel, which is this sum
        by the attention's weights times the gates.
    """
    return mixed(weights, values, channels_last)


def mixed(
    weights: Tensor,
    values: Sequence[Tensor] | Tensor,
    channels_last: bool,
    caller: Any = None,
) -> Tensor:
    """:func:`depth_mix` for the layer `caller`."""
    value_list = checks.check_maps(values, channels_last)
    last = value_list[-1]
    heads = checks.check_mix_weights(weights, value_list, channels_last)
    if is_autocast_on(last):
        dtype = torch.get_autocast_dtype(last.device.type)
        value_list = as_autocast_dtype(value_list, dtype, "values")
        last = value_list[-1]
    by_head = weights
    if weights.dtype != accumulate_dtype(last.dtype):
        check_not_freed("weights", weights)
        by_head = weights.to(accumulate_dtype(last.dtype))
    if (
        weights.dim() < 3
    ):  # after the cast: gradients of samples are added up before they are rounded
        by_head = by_head.expand(last.shape[0], heads, -1)
    if not torch.compiler.is_compiling():
        depth = len(value_list)
        backend = kernels_for("depth_mix", last, depth)
        if backend is None:
            refused(caller, "mix", why_eager("depth_mix", last, depth))
            served_without_kernels(caller, "eager")
            check_not_freed("weights", by_head)
            check_not_freed("values", *value_list)
            return depth_mix_reference(by_head, value_list, channels_last)
        served(caller, "mix", backend.name)
        return depth_mix_autograd(by_head, value_list, channels_last, backend)
    return depth_mix_autograd(by_head, value_list, channels_last, None)
