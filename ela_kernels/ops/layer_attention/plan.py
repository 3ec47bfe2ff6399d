"""What stands between a whole layer and its kernels, and the plan for one that they serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.memory import PLAIN_TENSORS
from ela_kernels.backends.tracing import EMPTY, TRACED, UNGATHERED, needs_dispatcher
from ela_kernels.backends.types import Filters
from ela_kernels.ops.autocast import fits_layer_dtype
from ela_kernels.ops.layer_attention.snapshot import Pairs


class LayerPlan(NamedTuple):
    """What serves a whole layer.

    Attributes:
        backend: whose kernels.
        filters: the layer's parameters, not cast yet.
        dtype: in which it is computed.
        recomputing: whether a checkpoint recomputes the layer.
        held: in which its value is held, where that is not `dtype`.
        tolerance: retrievals of a smaller weight are left out.
    """

    backend: KernelBackend
    filters: Filters
    dtype: torch.dtype
    recomputing: bool
    held: torch.dtype | None = None
    tolerance: float = 0.0


def all_fit(filters: Sequence[Tensor | None], x: Tensor, dtype: torch.dtype) -> bool:
    """Whether each of `filters` can be read beside `x`, in `dtype` or cast to it."""
    device = x.device
    for w in filters:
        # Of what needs a dispatcher only a class of its own can differ from x.
        if w is not None and (
            w.device != device
            or type(w) not in PLAIN_TENSORS
            or (w.dtype is not dtype and not fits_layer_dtype(w, x))
        ):
            return False
    return True


def unseen_obstacles(x: Tensor) -> list[str]:
    """Why no kernel may read `x` itself."""
    found = []
    if needs_dispatcher(x):
        found.append(TRACED)
    if not x.numel():
        found.append(EMPTY)
    return found


def filter_obstacles(filters: Sequence[Tensor | None], x: Tensor, dtype: torch.dtype) -> list[str]:
    """Why a kernel may not read `filters` beside `x`; empty where :func:`all_fit`."""
    found = []
    for w in filters:
        if w is None:
            continue
        if w.device != x.device:
            found.append(f"a tensor is on {w.device}, and x on {x.device}")
        elif type(w) not in PLAIN_TENSORS:
            found.append(f"a tensor is a {type(w).__name__}, a class with rules of its own")
        elif w.dtype is not dtype and not fits_layer_dtype(w, x):
            found.append(f"a tensor is {w.dtype}, and the layer is computed in {dtype}")
    return list(dict.fromkeys(found))


def pair_obstacles(pairs: Pairs, dtype: torch.dtype, held: torch.dtype | None = None) -> list[str]:
    """Why no kernel may retrieve from these pairs and gather their gradients.

    `held`: the dtype that their values are held in, None for that of the layers.
    """
    found = []
    if not pairs.gathering.serves:
        found.append(UNGATHERED)
    if not pairs.are_all(dtype, held):
        of = "" if held is None else f", with values held in {held}"
        found.append(f"the layers before it in the history are not all in {dtype}{of}")
    return found
