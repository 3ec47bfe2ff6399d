"""Which kernels serve a whole light layer, or why none do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ela_kernels.backends.contract import KernelBackend, Request
from ela_kernels.backends.dispatch import Refusal, plan
from ela_kernels.backends.tracing import OTHER_SHAPE, is_transformed, needs_dispatcher
from ela_kernels.backends.types import LightFilters
from ela_kernels.ops.autocast import layer_dtype
from ela_kernels.ops.layer_attention.plan import all_fit, filter_obstacles, unseen_obstacles


class LightPlan(NamedTuple):
    """What serves a whole light layer: whose kernels, and the layer's parameters, not cast yet."""

    backend: KernelBackend
    filters: LightFilters


def plan_light_layer(
    x: Tensor,
    filters: Sequence[Tensor],
    prev: Tensor,
    op: str = "light_layer",
    obstacles: tuple[str, ...] = (),
) -> KernelBackend | Refusal:
    """The backend whose kernels serve a whole light layer, or every reason why none does.

    Args:
        x, prev: feature map and previous output, `[B, C, H, W]`.
        filters: the parameters; none where they are not known yet.
        op: `"light_layer"`, or `"light_block"` with the residual block around it.
        obstacles: what else stands between the layer and its kernels.
    """
    dtype = layer_dtype(x)
    others = (prev, *filters)
    if (
        obstacles
        or needs_dispatcher(x)
        or not x.numel()
        or prev.shape != x.shape
        or not all_fit(others, x, dtype)
    ):
        found = unseen_obstacles(x)
        if prev.shape != x.shape:
            found.append(OTHER_SHAPE)
        obstacles = (*obstacles, *found, *filter_obstacles(others, x, dtype))
    return plan(Request(op, x.device, dtype, 1, False, is_transformed(), obstacles))
