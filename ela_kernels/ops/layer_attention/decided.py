"""Retrieval where it is data, not structure, which layers retrieve: in compiled graphs, which must not depend on it.

A decision that a graph was specialised for would cost a compilation each time that it changes, and the number of sets
of decisions is that of all subsets of the layers. So a compiled graph works out what a skipped layer would retrieve,
and discards it, where no operator reads the decision when the graph runs; :func:`ela_kernels.prune` makes the
decisions part of the structure, and then nothing is worked out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.ops.layer_attention.interface import retrieve
from ela_kernels.ops.layer_attention.reference import (
    aggregate_reference,
    divergence_reference,
    log_weights_reference,
)


class Decided(NamedTuple):
    """What is known only when a graph runs; all tensors are boolean, of no dimension.

    Attributes:
        given: for each pair held whether it is there; None for one that always is.
        retrieved: whether any layer has retrieved so far; None where the graph itself says so.
        has_divergence: whether the last layer's divergence is one; None where it is as in eager PyTorch.
    """

    given: tuple[Tensor | None, ...]
    retrieved: Tensor | None = None
    has_divergence: Tensor | None = None


def attend_decided(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    decided: Decided,
    active: Tensor | None,
    tolerance: float,
    caller: Any = None,
) -> tuple[Tensor, Tensor, Tensor | None, Decided]:
    """`(out, weights, kl)` and what is decided after this layer, whose own pair is the last.

    The weights are those of the last layer that retrieved, this one or an earlier one, over all pairs held: zero where
    it did not retrieve.

    Args:
        active: whether this layer retrieves; None for one that always does. Where it is false, `out` means nothing.
    """
    # Its own pair is there for the layer itself: without any, what is discarded would be NaN, and so its gradients.
    given = (*decided.given[:-1], None)
    if all(is_given is None for is_given in given):
        out, weights, kl = retrieve(
            q, keys, values, heads, scale, prev_weights, channels_last, tolerance, caller
        )
    else:
        # No kernel takes pairs that may be missing.
        log_weights = log_weights_reference(q, keys, heads, scale, given)
        kl = None if prev_weights is None else divergence_reference(prev_weights, log_weights)
        weights = log_weights.exp()
        out = aggregate_reference(weights, values, channels_last, tolerance)
    kl, after = decided_after(decided, active, prev_weights, kl)
    if active is not None:
        if prev_weights is None:
            before = torch.zeros_like(weights)
        else:
            before = F.pad(prev_weights, (0, weights.shape[-1] - prev_weights.shape[-1]))
        weights = torch.where(active, weights, before.to(accumulate_dtype(q.dtype)))
    return out, weights, kl, after


def decided_after(
    decided: Decided, active: Tensor | None, prev_weights: Tensor | None, kl: Tensor | None
) -> tuple[Tensor | None, Decided]:
    """The divergence, NaN where it is none, and what is decided after a layer; arguments as above."""
    retrieved, has_divergence = decided.retrieved, None
    if kl is not None and retrieved is not None:
        has_divergence = retrieved
        kl = torch.where(retrieved, kl, torch.nan)
    if active is None:
        retrieved = None
    elif prev_weights is None:
        retrieved = active
    elif retrieved is not None:
        retrieved = retrieved | active
    return kl, Decided(decided.given, retrieved, has_divergence)
