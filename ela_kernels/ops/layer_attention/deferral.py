"""Pairs that nobody is expected to read: made when somebody does, and not at all where nobody does."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ela_kernels.backends.types import Filters
from ela_kernels.ops.autograd.saved_tensors import past_hooks
from ela_kernels.ops.layer_attention.places import Places, graphs_seen
from ela_kernels.ops.layer_attention.readers import Turns
from ela_kernels.ops.layer_attention.snapshot import Snapshot
from ela_kernels.torch_internals import top_saved_tensors_hooks, version_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Provider(Protocol):
    """What makes key and value of a map, and gives them to a history."""

    def provide(self, x: Tensor, history: Any) -> None: ...
    def own_filters(self) -> Filters | None: ...


class _Deferred(NamedTuple):
    """A pair to be made of `x` and the provider's filters as they were, under what was in force then."""

    provider: Provider
    x: Tensor
    filters: tuple[Tensor, ...]
    versions: tuple[int, ...]
    has_grad: bool
    autocast: tuple[bool, torch.dtype]

    @classmethod
    def of(cls, provider: Provider, x: Tensor) -> _Deferred:
        device, filters = x.device.type, _filters_of(provider)
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        versions = tuple(map(version_of, (x, *filters)))
        return cls(provider, x, filters, versions, torch.is_grad_enabled(), autocast)

    def is_as_it_was(self) -> bool:
        now = _filters_of(self.provider)
        return (
            len(now) == len(self.filters)
            and all(map(operator.is_, now, self.filters))
            and tuple(map(version_of, (self.x, *now))) == self.versions
        )

    def give(self, history: DeferredPairs) -> None:
        is_cast, dtype = self.autocast
        autocast = torch.autocast(self.x.device.type, dtype, enabled=is_cast)
        # A checkpoint around the layer that reads does not see it made again when it recomputes.
        with torch.set_grad_enabled(self.has_grad), autocast, past_hooks():
            self.provider.provide(self.x, history)


def _filters_of(provider: Provider) -> tuple[Tensor, ...]:
    found = provider.own_filters()
    return () if found is None else (found.wk, found.wv)


def can_defer(x: Tensor) -> bool:
    """Whether a pair of `x` would later be the one that it is now, and those who read it are known.

    Not where a checkpoint looks on, which wants to see the same made again in the same place, nor of a tensor that
    could be changed in the meantime without anybody noticing; nor where layers are compiled, since they are not known
    to read, and what they make is part of their graph.
    """
    if torch.compiler.is_compiling() or top_saved_tensors_hooks is None or graphs_seen:
        return False
    return top_saved_tensors_hooks(True) is None and not x.is_inference() and not x.is_meta


class DeferredPairs(Places):
    """A history some of whose pairs wait until somebody reads, which makes those that are due, in their order."""

    def __init__(
        self, repeats: bool = False, dtype: torch.dtype | None = None, tolerance: float = 0.0
    ) -> None:
        super().__init__(repeats, dtype, tolerance)
        self.turns = Turns()

    def defer(self, provider: Provider, x: Tensor, heads: int) -> None:
        """Hold back the pair that `provider` makes of `x`. Does not count the layer.

        Raises:
            ValueError: `x` or `heads` do not fit what is held.
        """
        self._now.check_fits(x, heads)
        self._deferred = (*self._deferred, _Deferred.of(provider, x))

    @property
    def depth(self) -> int:
        """Number of key and value pairs held."""
        return len(self._now.pairs.keys) + len(self._deferred)

    @property
    def latest(self) -> Snapshot:
        """What the last layer left, immutable; in a recomputation the layer that was recomputed last.

        Whoever asks is taken to read the pairs.
        """
        self._note_read(self.recomputing)
        return self.left_by_last()

    def left_by_last(self) -> Snapshot:
        """The same for somebody who hands it on, and reads nothing."""
        self._settle()
        return self._latest

    def _note_read(self, recomputing: bool) -> None:
        if not recomputing:
            self.turns.note_read()

    def at(self, snapshot: Snapshot) -> Self:
        """A history that goes on from `snapshot`; see :meth:`Places.at`."""
        self._settle()
        return super().at(snapshot)

    def _settle(self) -> None:
        """Make the pairs that wait; all of them, or none where that raises."""
        if not self._deferred or self._is_settling:
            return
        if self.recomputing:
            raise RuntimeError(
                "history: got a read in a backward pass of the keys and values of skipped layers that were not made, "
                "since nobody had read them so far; allowed is to read them before the backward pass"
            )
        before = self._now, self._latest
        self._is_settling = True
        try:
            for one in self._deferred:
                if not one.is_as_it_was():
                    raise RuntimeError(
                        "history: got a read of the key and value of a skipped layer that nobody had read so far, "
                        "after its input or a filter was changed; allowed is to read before the optimizer's step, and "
                        "out-of-place operations on the layer's output"
                    )
                one.give(self)
            self._now = self._latest = self._now.moved_to(before[0].position)
            self._deferred = ()
        except BaseException:
            self._now, self._latest = before
            raise
        finally:
            self._is_settling = False
