"""Pairs that nobody is expected to read: made when somebody does, and not at all where nobody does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.places import Places
from ela_kernels.ops.layer_attention.snapshot import Snapshot
from ela_kernels.torch_internals import top_saved_tensors_hooks, version_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Provider(Protocol):
    """What makes key and value of a map, and gives them to a history."""

    def provide(self, x: Tensor, history: Any) -> None: ...


class _Deferred(NamedTuple):
    """A pair to be made of `x` as it was at `version`, under what was in force then."""

    provider: Provider
    x: Tensor
    version: int
    has_grad: bool
    autocast: tuple[bool, torch.dtype]


_graphs: list[bool] = []


@torch.compiler.assume_constant_result
def _note_graph() -> bool:
    """A graph with layers was compiled in this process; called when it is, not when it runs."""
    _graphs[:] = [True]
    return True


def can_defer(x: Tensor) -> bool:
    """Whether a pair of `x` would later be the one that it is now, and those who read it are known.

    Not where a checkpoint looks on, which wants to see the same made again in the same place, nor of a tensor that
    could be changed in the meantime without anybody noticing; nor where layers are compiled, since they are not known
    to read, and what they make is part of their graph.
    """
    if torch.compiler.is_compiling() or top_saved_tensors_hooks is None or _graphs:
        return False
    return top_saved_tensors_hooks(True) is None and not x.is_inference() and not x.is_meta


class DeferredPairs(Places):
    """A history some of whose pairs wait until somebody reads, which makes those that are due, in their order."""

    def __init__(self, repeats: bool = False) -> None:
        super().__init__(repeats)
        self._deferred: list[_Deferred] = []

    def defer(self, provider: Provider, x: Tensor, heads: int) -> None:
        """Hold back the pair that `provider` makes of `x`. Does not count the layer.

        Raises:
            ValueError: `x` or `heads` do not fit what is held.
        """
        self._now.check_fits(x, heads)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._deferred.append(
            _Deferred(provider, x, version_of(x), torch.is_grad_enabled(), autocast)
        )

    @property
    def depth(self) -> int:
        """Number of key and value pairs held."""
        return len(self._now.pairs.keys) + len(self._deferred)

    @property
    def latest(self) -> Snapshot:
        """What the last layer left, immutable; in a recomputation the layer that was recomputed last."""
        self._settle()
        return self._latest

    def at(self, snapshot: Snapshot) -> Self:
        """A history that goes on from `snapshot`; see :meth:`Places.at`."""
        self._settle()
        return super().at(snapshot)

    def _settle(self) -> None:
        """Make the pairs that wait."""
        if not self._deferred or self.recomputing:
            return
        waiting, self._deferred = self._deferred, []
        position = self._now.position
        for provider, x, version, has_grad, (is_cast, dtype) in waiting:
            if version_of(x) != version:
                raise RuntimeError(
                    "history: got a read of the key and value of a skipped layer that nobody had read so far, after "
                    "its input was changed in place; allowed is an out-of-place operation on the layer's output"
                )
            autocast = torch.autocast(x.device.type, dtype, enabled=is_cast)
            with torch.set_grad_enabled(has_grad), autocast:
                provider.provide(x, self)
        self._now = self._latest = self._now.moved_to(position)

    def _place_of(self, caller: Any, recomputing: bool) -> Snapshot:
        if self._deferred and not recomputing:
            self._settle()
        return super()._place_of(caller, recomputing)

    def _enter(
        self,
        caller: Any,
        inputs: tuple[Tensor | None, ...],
        recomputing: bool,
        reads: bool = True,
    ) -> Snapshot:
        """`reads`: whether the layer may read the pairs held, or appends to them."""
        if torch.compiler.is_compiling():
            _note_graph()
        if self._deferred and reads and not recomputing:
            self._settle()
        return super()._enter(caller, inputs, recomputing)
