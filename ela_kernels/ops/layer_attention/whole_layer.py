"""What a history does for whole layers, which make their own query, key and value: one call of the kernels each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import Request
from ela_kernels.backends.dispatch import Refusal, plan
from ela_kernels.backends.layout import resolved
from ela_kernels.backends.tracing import DECIDED, is_transformed, needs_dispatcher
from ela_kernels.backends.types import Epilogue, Filters, Residual
from ela_kernels.explaining import retrieved as retrieved_by
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import as_autocast, layer_dtype
from ela_kernels.ops.autograd.record import Record
from ela_kernels.ops.layer_attention.decided import Decided
from ela_kernels.ops.layer_attention.in_graph.history import LayersInGraphs
from ela_kernels.ops.layer_attention.layer_node import layer_pull, provider_pull
from ela_kernels.ops.layer_attention.link import Link
from ela_kernels.ops.layer_attention.plan import (
    LayerPlan,
    all_fit,
    filter_obstacles,
    pair_obstacles,
    unseen_obstacles,
)
from ela_kernels.ops.layer_attention.snapshot import Kept, Pairs, Snapshot
from ela_kernels.torch_internals import runs_as_written


class WholeLayers(LayersInGraphs):
    """Whole layers on a history, in the pull form."""

    def __init__(
        self, repeats: bool = False, dtype: torch.dtype | None = None, tolerance: float = 0.0
    ) -> None:
        super().__init__(repeats, dtype, tolerance)
        self._record = Record()
        self._decided: Decided | None = None

    @property
    def origin(self) -> object:
        """What a history and all those that go on from it have in common."""
        return self._record

    def plan_layer(
        self,
        x: Tensor,
        filters: Sequence[Tensor | None],
        op: str = "layer",
        obstacles: tuple[str, ...] = (),
        caller: Any = None,
        tolerance: float | None = None,
    ) -> LayerPlan | Refusal:
        """The kernels that serve a whole layer of `x` here, or every reason why none does.

        Args:
            x: feature map `[B, C, H, W]`.
            filters: as of :meth:`attend_layer`; none where they are not known yet.
            op: `"layer"`, or `"block"` with the residual block around it.
            obstacles: what else stands between the layer and its kernels.
            caller: the module that calls.
            tolerance: as of :meth:`attend`.
        """
        dtype = layer_dtype(x)
        held = None if self._dtype is None else self._held_dtype(dtype)
        recomputing = self.recomputing
        pairs = self._place_of(caller, recomputing).pairs
        if (
            obstacles
            or needs_dispatcher(x)
            or not x.numel()
            or self._decided is not None
            or not pairs.gathering.serves
            or not pairs.are_all(dtype, held)
            or self._retrieves_its_own_way
            or not all_fit(filters, x, dtype)
        ):
            obstacles = (*obstacles, *self._obstacles(x, filters, dtype, held, pairs))
        of_call = op, x.device, dtype, len(pairs.keys) + 1, False, is_transformed()
        request = Request(*of_call, obstacles, held)
        found = plan(request)
        if isinstance(found, Refusal):
            return found
        of_layer = found, filters, dtype, recomputing, held, self.tolerance_of(tolerance)
        return LayerPlan(*of_layer)  # type: ignore[arg-type]

    def _obstacles(
        self,
        x: Tensor,
        filters: Sequence[Tensor | None],
        dtype: torch.dtype,
        held: torch.dtype | None,
        pairs: Pairs,
    ) -> list[str]:
        found = unseen_obstacles(x)
        if self._decided is not None:
            found.append(DECIDED)
        found += pair_obstacles(pairs, dtype, held)
        if self._retrieves_its_own_way:
            found.append(f"{type(self).__name__} has an attend or provide of its own")
        return found + filter_obstacles(filters, x, dtype)

    @runs_as_written
    def attend_layer(
        self,
        x: Tensor,
        plan: LayerPlan,
        *,
        heads: int,
        epilogue: Epilogue | None = None,
        caller: Any = None,
        keeps: bool = False,
    ) -> Tensor:
        """Make query, key and value from `x`, append, retrieve and add what follows, all in one call.

        Equivalent PyTorch::

            y = x.mean((2, 3)).unsqueeze(1)                                       # [B, 1, C]
            q, k = (F.conv1d(y, w, padding=w.shape[-1] // 2).squeeze(1) for w in (wq, wk))
            v = F.conv2d(x, wv, padding=1, groups=C)
            out = history.attend(q, k, v, heads=heads)
            out = x + out                                                         # with RESIDUAL
            out = x + mask * act(norm(out))                                       # with a NormAct

        Under autocast `x` and the filters are cast to its dtype, as a convolution casts them.

        Args:
            x: feature map `[B, C, H, W]`.
            plan: what :meth:`plan_layer` gave for it, with `wq` and `wk` `[1, 1, size]` with an odd size, and `wv`
                `[C, 1, 3, 3]`.
            heads: G, the same for all layers of the history.
            epilogue: what follows. With a norm `x` has autocast's dtype already.
            caller: the module that calls; needed under `torch.utils.checkpoint`.
            keeps: keep what a NormAct was given, for blocks that take it over.

        Returns:
            `out`, like `x`; under autocast in its dtype.

        Raises:
            As :meth:`attend`.

        Source:
            MRLA (arXiv 2302.03985), base form.
        """
        if x.dtype != plan.dtype and type(epilogue) is Residual:
            return x + self.attend_layer(x, plan, heads=heads, caller=caller)
        x, filters = as_autocast(x, plan.filters)
        snapshot, heads, link = self._layer_link(x, filters, heads, caller, plan)
        self._note_read(plan.recomputing)
        out, weights, kl, token, k, v, retrieved, statistics, stand_in = layer_pull(
            resolved(x), filters, epilogue, snapshot.weights, snapshot.token, link, keeps
        )
        retrieved_by(weights, plan.tolerance)
        pairs = snapshot.pairs.extended(k, v, link.path, stand_in=stand_in)
        at = snapshot.position + 1
        kept = None if retrieved is None else Kept.of(retrieved, statistics)
        left = Snapshot(pairs, at, heads, weights, kl, token, kept, plan.tolerance)
        self._leave(left, plan.recomputing, caller)
        return out

    def _layer_link(
        self, x: Tensor, filters: Filters, heads: int, caller: Any, plan: LayerPlan
    ) -> tuple[Snapshot, int, Link]:
        """Where a layer is in the history, its heads, and the pairs before it."""
        snapshot = self._enter(caller, (x, *filters), plan.recomputing)
        pairs = snapshot.pairs
        channels = x.shape[1]
        if type(heads) is not int or heads != snapshot.heads:  # the same number is checked already
            heads = checks.check_heads(heads, channels)
        snapshot.check_fits(x, heads)
        scale = 1.0 / math.sqrt(channels // heads)
        keys, values = pairs.keys, pairs.values
        path = pairs.next_path()
        link = Link(
            *(path, keys, values, heads, scale, False, plan.backend, self._record, pairs),
            plan.held,
            plan.tolerance,
        )
        return snapshot, heads, link

    @runs_as_written
    def provide_layer(self, x: Tensor, plan: LayerPlan, *, heads: int, caller: Any = None) -> None:
        """Make key and value from `x` and append them, without retrieving; arguments as in :meth:`attend_layer`."""
        x, filters = as_autocast(x, plan.filters._replace(wq=None))
        snapshot, heads, link = self._layer_link(x, filters, heads, caller, plan)
        token, k, v, stand_in = provider_pull(resolved(x), filters, snapshot.token, link)
        pairs = snapshot.pairs.extended(k, v, link.path, stand_in=stand_in)
        self._leave(snapshot.moved_on(pairs, heads, token), plan.recomputing, caller)
