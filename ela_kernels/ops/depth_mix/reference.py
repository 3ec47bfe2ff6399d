"""The mix in plain PyTorch, and its gradients by hand, which can be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ela_kernels.ops.layer_attention.reference import aggregate_reference, dots_reference


def depth_mix_reference(weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
    """`sum_t weights[:, g(c), t] * values[t][:, c]`, in the shape, dtype and memory format of the values.

    Args:
        weights: `[B, G, T]` in the accumulation dtype.
    """
    return aggregate_reference(weights, values, channels_last)


def depth_mix_backward_reference(
    weights: Tensor,
    values: Sequence[Tensor],
    dout: Tensor,
    channels_last: bool,
    need_weights: bool,
    need_values: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`(dweights, dvalues)`, None where none is wanted; without `need_weights` no value is read."""
    dweights = None
    if need_weights:
        dweights = dots_reference(dout, values, weights.shape[1], weights.dtype, channels_last)
    return dweights, [
        aggregate_reference(weights[..., t : t + 1], [dout], channels_last) if needed else None
        for t, needed in enumerate(need_values)
    ]
