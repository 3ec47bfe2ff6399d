"""What a history keeps of the last retrieval, for blocks that take it over instead of retrieving themselves."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend, Request
from ela_kernels.backends.dispatch import Refusal, plan
from ela_kernels.backends.layout import accumulate_dtype, is_interleaved, resolved
from ela_kernels.backends.memory import PLAIN_TENSORS
from ela_kernels.backends.tracing import is_transformed, needs_dispatcher
from ela_kernels.backends.types import NormAct, Retrieved
from ela_kernels.ops.autocast import as_autocast, layer_dtype
from ela_kernels.ops.layer_attention.plan import LayerPlan, unseen_obstacles
from ela_kernels.ops.layer_attention.reference import aggregate_reference
from ela_kernels.ops.layer_attention.reuse_node import reuse_and_provide_pull, reuse_pull
from ela_kernels.ops.layer_attention.snapshot import Kept, Snapshot
from ela_kernels.ops.layer_attention.whole_layer import WholeLayers


class ReusedRetrievals(WholeLayers):
    """The last retrieval, and whole blocks around it."""

    def last_retrieved(self, caller: Any = None) -> Kept | None:
        """What the last layer that retrieved got; None where none has.

        Where nobody kept it, it is worked out anew, from the weights and values: the same up to rounding, with its
        gradients.

        Args:
            caller: the module that asks; needed under `torch.utils.checkpoint`.
        """
        # Those that wait to be made come after what was retrieved.
        found = self._place_of(caller, self.recomputing, reads=False)
        kept = found.kept
        if kept is None or not kept.is_as_it_was():
            if found.weights is None:
                return None
            exists = None if self._decided is None else self._decided.retrieved
            kept = Kept.of(_retrieved_again(found), exists=exists)
        return kept

    def keep(self, o: Tensor, exists: Tensor | None = None) -> None:
        """Keep `o`, what the last layer got (or passed on), for those after it.

        Args:
            exists: whether any layer has retrieved so far, where that is data.
        """
        kept = Kept.of(o, exists=exists)
        self._latest = self._latest.with_kept(kept)
        if not self.recomputing:
            self._now = self._latest

    def plan_reuse(self, x: Tensor, obstacles: tuple[str, ...] = ()) -> KernelBackend | Refusal:
        """The kernels that serve a block of `x` around :meth:`last_retrieved` that gives no pair, or why none does."""
        obstacles = (*obstacles, *unseen_obstacles(x))
        request = Request("reuse", x.device, layer_dtype(x), 1, False, is_transformed(), obstacles)
        return plan(request)

    def reuse(
        self, x: Tensor, kept: Kept, epilogue: NormAct, backend: KernelBackend, caller: Any = None
    ) -> Tensor:
        """`x + mask * act(norm(o))` of what was kept, of a layer that gives no pair."""
        self.pass_by(caller)
        return reuse_pull(resolved(x), _normed_with(kept, epilogue), epilogue, backend)

    def reuse_and_provide(
        self,
        x: Tensor,
        kept: Kept,
        epilogue: NormAct,
        plan: LayerPlan,
        *,
        heads: int,
        caller: Any = None,
    ) -> Tensor:
        """The same of a layer that gives its pair, in one call; arguments as of :meth:`attend_layer`."""
        x, filters = as_autocast(x, plan.filters._replace(wq=None))
        snapshot, heads, link = self._layer_link(x, filters, heads, caller, plan)
        out, token, k, v, stand_in = reuse_and_provide_pull(
            resolved(x), filters, _normed_with(kept, epilogue), epilogue, snapshot.token, link
        )
        pairs = snapshot.pairs.extended(k, v, link.path, stand_in=stand_in)
        self._leave(snapshot.moved_on(pairs, heads, token), plan.recomputing, caller)
        return out

    def pass_by(self, caller: Any = None) -> None:
        """Count a layer that neither retrieves nor provides."""
        recomputing = self.recomputing
        found = self._enter(caller, (), recomputing, reads=False)
        after = found.moved_on(found.pairs, found.heads, found.token)
        self._leave(after, recomputing, caller)


def _retrieved_again(snapshot: Snapshot) -> Tensor:
    assert snapshot.weights is not None
    values = snapshot.pairs.widened().values[: snapshot.weights.shape[-1]]
    dtype = functools.reduce(torch.promote_types, [v.dtype for v in values])
    weights = snapshot.weights.to(accumulate_dtype(dtype))
    return aggregate_reference(weights, [v.to(dtype) for v in values], False, snapshot.tolerance)


def _normed_with(kept: Kept, epilogue: NormAct) -> Retrieved:
    statistics = kept.statistics if epilogue.statistics is None else epilogue.statistics
    assert statistics is not None
    return Retrieved(resolved(kept.o), statistics)


def reuse_obstacles(x: Tensor, kept: Kept, takes_batch: bool) -> list[str]:
    """Why no kernel may norm what was kept and add it to `x`."""
    o, found = kept.o, []
    if o.dtype != x.dtype or o.device != x.device or type(o) not in PLAIN_TENSORS:
        found.append("what was retrieved differs from x in dtype, device or class")
    elif needs_dispatcher(o):
        found.append("what was retrieved is traced, or inside a transform")
    elif is_interleaved(o, False) != is_interleaved(x, False):
        found.append("what was retrieved has another memory format than x")
    if takes_batch and kept.statistics is None:
        found.append("no kernel has taken the statistics of what was retrieved")
    return found
