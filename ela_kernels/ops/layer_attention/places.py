"""Where in a history a layer stands: at its end, or, while a checkpoint recomputes the layer, where it was."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ela_kernels.ops.autograd.record import graph_task, is_recomputing
from ela_kernels.ops.checks import check_tolerance
from ela_kernels.ops.layer_attention.held import check_history_dtype
from ela_kernels.ops.layer_attention.observer import present_observer
from ela_kernels.ops.layer_attention.snapshot import Snapshot
from ela_kernels.ops.traced import Traced, no_numbers
from ela_kernels.torch_internals import constant_in_graphs

if TYPE_CHECKING:
    from typing_extensions import Self


graphs_seen: list[bool] = []
"""Not empty once a graph with layers was compiled in this process."""


@constant_in_graphs
def _note_graph() -> bool:
    """Called when a graph is compiled, not when it runs."""
    graphs_seen[:] = [True]
    return True


_OUTSIDE = -1
Place = tuple[Snapshot, bool]
"""What a layer found, and whether there were gradients."""


class _ForEverybody(dict[Any, list[Place]]):
    """One place, whoever asks for it."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = [place]

    def get(self, _: Any, __: Any = None) -> Any:
        return self._place


class Places(Traced):
    """The snapshot that each layer of a history extends, and those that layers found, for their recomputation."""

    def __init__(
        self, repeats: bool = False, dtype: torch.dtype | None = None, tolerance: float = 0.0
    ) -> None:
        if type(repeats) is not bool:
            raise TypeError(
                f"repeats: got {type(repeats).__name__}; allowed is True, for a stage that goes through its layers "
                "several times in one forward pass, or False"
            )
        self._dtype = check_history_dtype(dtype)
        self._tolerance = check_tolerance(tolerance)
        self._now = Snapshot()
        self._latest = self._now
        self._found_by: dict[Any, list[tuple[Snapshot, bool]]] = {}
        self._made_in = graph_task()
        self.held: tuple[Tensor, Tensor] | None = None  # the stacked pairs that it began with
        self._repeats = repeats
        self._observer = present_observer()
        # Pairs that wait to be made. Not a list: a copy of the history, which goes on by itself, would share it.
        self._deferred: tuple[Any, ...] = ()
        self._is_settling = False
        # Who came last; the first two different layers that came one after the other, and the place of the second.
        self._last: Any = None
        self._first_two: tuple[Any, Any, int] | None = None

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor, *, heads: int, repeats: bool = False) -> Self:
        """A history that holds `keys` `[B, T, C]` and `values` `[B, T, C, *spatial]`, made elsewhere.

        The layers after them retrieve them with the rest. They are read where they are; their gradients are those of
        the functional op (the push form).

        Raises:
            ValueError: other shapes, dtypes or devices.
        """
        if keys.dtype != values.dtype or keys.device != values.device:
            raise ValueError(
                f"keys, values: got {keys.dtype} on {keys.device} and {values.dtype} on {values.device}; "
                "allowed is one dtype on one device. Convert one of them"
            )
        if keys.dim() != 3 or values.dim() < 3 or keys.shape != values.shape[:3]:
            raise ValueError(
                f"keys, values: got shapes {list(keys.shape)} and {list(values.shape)}; allowed are [B, T, C] and "
                "[B, T, C, *spatial]"
            )
        history = cls(repeats)
        history._now = history._latest = Snapshot.of(keys, values, heads)
        history.held = (keys, values)
        return history

    def _new_arguments(self) -> dict[str, Any]:
        return {"repeats": self._repeats, "dtype": self._dtype, "tolerance": self._tolerance}

    def _begin_trace(self) -> None:
        if self._now.position or self._now.pairs.keys:
            raise TypeError(
                "history: got one that holds pairs already, in a model that torch.fx traces; allowed is a "
                "LayerHistory() that the traced forward makes"
            )
        self._now = self._latest = no_numbers()

    def _held_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """In which the value of a layer in `dtype` is held, None for as it is: nothing is gained by as many bytes."""
        held = self._dtype
        return held if held is not None and dtype.itemsize > held.itemsize else None

    def tolerance_of(self, own: float | None) -> float:
        """What a layer leaves out that was given `own`; None where nothing was, and the history's counts."""
        return self._tolerance if own is None else check_tolerance(own)

    @property
    def position(self) -> int:
        """Number of layers that came by, skipped ones included."""
        return self._now.position

    def at(self, snapshot: Snapshot) -> Self:
        """A history that goes on from `snapshot`, one of this history's.

        This one itself where nobody came by since, or a checkpoint recomputes; otherwise another that shares the pairs
        up to there, and the gradients that meet in them.
        """
        if snapshot is self._now or self.recomputing:
            return self
        other = copy(self)
        other._now = other._latest = snapshot
        return other

    def continued(self) -> Self:
        """A history that goes on from here by itself, and knows nothing of those who came by; this one stays as it is.

        In a recomputation it goes on from what the last layer left there.
        """
        other = copy(self)
        other._found_by = {}
        if self.recomputing:
            other._now = self._latest
        return other

    @property
    def place_found(self) -> Place | None:
        """What the first layer found that came by since the history went on by itself; None in a recomputation.

        None before one came by, too, and in inference mode, after which nothing recomputes.
        """
        return next((found[0] for found in self._found_by.values()), None)

    @property
    def place_left(self) -> Place:
        """What a layer would find that came by now, with gradients."""
        return self._now, True

    def recomputed_from(self, place: Place) -> Self:
        """This history in a recomputation, where the next layer, whichever it is, finds `place`."""
        other = copy(self)
        if (
            not self.recomputing
        ):  # made in the backward pass that recomputes, and so not known to be in one
            other._made_in = _OUTSIDE
        other._found_by = _ForEverybody(place)
        return other

    @property
    def weights(self) -> Tensor | None:
        """Weights `[B, G, t]` of the last layer that retrieved; None before the first."""
        return self._latest.weights

    @property
    def kl(self) -> Tensor | None:
        """Divergence `[B, G]` of the last layer that retrieved from the one before it; None without one."""
        return self._latest.kl

    @property
    def is_observed(self) -> bool:
        """Whether somebody looks on, who wants to know of skipped layers too what they would retrieve."""
        return self._observer is not None

    @property
    def recomputing(self) -> bool:
        """True while a checkpoint recomputes a layer in the backward pass; the history does not grow then."""
        return is_recomputing(self._made_in)

    def _settle(self) -> None:
        """Make the pairs that wait; see :mod:`ela_kernels.ops.layer_attention.deferral`."""

    def _place_of(self, caller: Any, recomputing: bool, reads: bool = True) -> Snapshot:
        """Where a layer stands that has not entered yet: at the end, or in a recomputation where it was.

        `reads`: whether it may read the pairs held, or appends to them.
        """
        if self._deferred and reads and not recomputing:
            self._settle()
        found = self._found_by.get(caller) if recomputing and caller is not None else None
        return found[0][0] if found else self._now

    def _enter(
        self,
        caller: Any,
        inputs: tuple[Tensor | None, ...],
        recomputing: bool,
        reads: bool = True,
    ) -> Snapshot:
        """The snapshot that this layer extends: the present one, or its old one in a recomputation.

        `reads` as of :meth:`_place_of`.
        """
        if not recomputing:
            is_traced = torch.compiler.is_compiling()
            if is_traced:
                _note_graph()
            if self._is_settling:
                return self._now  # the layer was counted when it came by
            if self._deferred and reads:
                self._settle()
            if caller is not None:
                if not is_traced and caller is not self._last:
                    self._refuse_second_pass(caller)
                # In inference mode nothing recomputes, and the weights of earlier layers need not stay. torch.compile
                # cannot trace the question.
                if is_traced or not torch.is_inference_mode_enabled():
                    # What was retrieved is kept on only where a backward may recompute what takes it over.
                    has_grad = torch.is_grad_enabled()
                    now = self._now
                    place = now if has_grad or now.kept is None else now.with_kept(None), has_grad
                    self._found_by.setdefault(caller, []).append(place)
            return self._now
        found = self._found_by.get(caller, []) if caller is not None else []
        if len(found) != 1:
            raise RuntimeError(
                "caller: a LayerHistory is used in a backward pass that did not make it, and the layer's place in it "
                f"is not clear ({len(found)} calls of this caller are on record; allowed is exactly one). Under "
                "torch.utils.checkpoint pass caller=<the module>, and use each layer once for each history"
            )
        snapshot, had_grad = found[0]
        wants_grad = any(x is not None and x.requires_grad for x in inputs)
        if wants_grad and not had_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "LayerHistory: got reentrant checkpointing, which would lose the gradients between layers; allowed is "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        return snapshot

    def _refuse_second_pass(self, caller: Any) -> None:
        """Refuse the stage's first two layers, one after the other, for the second time.

        A layer alone may come again, also in a row: it may be shared by several places of the stage. A stage whose
        layers all take turns again is told from a second pass by nothing but its word.
        """
        last, self._last = self._last, caller
        if last is None:
            return
        if self._first_two is None:
            self._first_two = last, caller, self._now.position
            return
        first, second, place = self._first_two
        if caller is second and last is first and not self._repeats:
            raise ValueError(
                f"history: got a second forward pass, after {self._now.position - 1} layers: "
                f"{type(first).__name__} of place {place - 1} and {type(second).__name__} of place {place} came again, "
                "one after the other, and would retrieve from the pass before; allowed is one forward pass. Make a "
                "new LayerHistory for each stage and forward pass; for a stage that goes through its layers several "
                "times on purpose, LayerHistory(repeats=True)"
            )

    def _leave(self, snapshot: Snapshot, recomputing: bool, caller: Any) -> None:
        self._latest = snapshot
        if not recomputing:
            if self._observer is not None:
                self._observer.came_by(self, caller, self._now, snapshot)
            self._now = snapshot
