"""The keys, values and weights of the layers seen so far, with the pull form of the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend, Request
from ela_kernels.backends.dispatch import Refusal, kernels_for, plan, refusal_by
from ela_kernels.backends.layout import accumulate_dtype, resolved
from ela_kernels.backends.tracing import is_transformed, needs_dispatcher
from ela_kernels.explaining import held_as_they_are, refused, retrieved, served
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import autocast_inputs, is_autocast_on
from ela_kernels.ops.autograd.gathering import signs_are_in_memory
from ela_kernels.ops.layer_attention.attend_node import attend_pull, provide_pull
from ela_kernels.ops.layer_attention.decided import Decided, attend_decided
from ela_kernels.ops.layer_attention.held import narrowed, rounded, widened
from ela_kernels.ops.layer_attention.interface import (
    LayerAttentionWeights,
    layer_attention_weights,
    retrieve,
)
from ela_kernels.ops.layer_attention.link import Link
from ela_kernels.ops.layer_attention.plan import pair_obstacles
from ela_kernels.ops.layer_attention.reuse import ReusedRetrievals
from ela_kernels.ops.layer_attention.snapshot import Pairs, Snapshot


class LayerHistory(ReusedRetrievals):
    """Keys, values and weights of the layers of one stage in one forward pass.

    Make one for each stage and forward pass, and hand it to every layer of the stage in turn. Equivalent
    PyTorch: two growing lists, and :func:`ela_kernels.layer_attention` over them at every layer. The gradients
    are the same; the memory is not: with a kernel the gradient of a value is gathered once, from the later
    layers' output gradients (the pull form), instead of added up over T partial gradients.

    Values share one shape, device and number of heads; they must not be changed in place while the history is in
    use. A layer of another dtype than those before it retrieves in its own, as after `torch.cat` of them: what is
    held is promoted to it, or under autocast cast to its dtype, and a layer is refused where its matrix product
    would be. From there on the functional op serves, without the pull form.

    Works with `torch.utils.checkpoint` (`use_reentrant=False`) when `caller` is given, as the modules of this
    package do. Kernels give first derivatives only; second ones come with `use_backend("eager")`.

    A second forward pass over a history is refused outside of a recomputation, as soon as the first two layers that
    differ come again, one after the other. Not seen, since it may be on purpose: a stage whose places all share one
    layer, or that has one layer, calls of :meth:`attend` without `caller`, and what compiled graphs or replicas run.

    A checkpoint keeps the history that it is called with. As with a list, both stay in memory where layers were
    checkpointed and their backward has not run to its end; elsewhere all goes with the last reference to the outputs.

    Args:
        repeats: the stage goes through its layers several times in one forward pass, on purpose (`a, b, a, b`, with
            shared weights). A layer that comes again by itself (`a, a, a`, or `a, b, a, c`) needs no word.
        dtype: `torch.bfloat16` or `torch.float16`: values of a wider dtype are rounded to it once, before any layer
            reads them, their own layer included. Equivalent PyTorch: the values are `v.to(dtype).to(v.dtype)`, with
            the identity for the gradient of that rounding, so that a value's gradient is added up and given in the
            dtype of its layer. Keys, queries, weights, divergence and all sums are as without it. Where kernels can
            read them so, values are then held in that dtype, in half the memory (`docs/history_dtype.md` says where);
            elsewhere the same numbers are held as wide as they were, and :func:`ela_kernels.explain` says why. Values
            of half precision, also those of layers under autocast, stay as they are. float16 makes infinity of what
            is beyond 65504. None: values as they are.
        tolerance: of layers that name none of their own; see :meth:`attend`.

    Raises:
        TypeError: `repeats` is no bool, `dtype` no dtype, or `tolerance` no number.
        ValueError: another `dtype`, or a `tolerance` that is no weight below 1; by its methods, a second forward pass
            (the sentence names its first layers).

    Example:
        >>> import torch, ela_kernels as ek
        >>> history = ek.LayerHistory()
        >>> for _ in range(3):
        ...     q, k, v = torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8, 4, 4)
        ...     out = history.attend(q, k, v, heads=2)
        >>> history.weights.shape, history.kl.shape
        (torch.Size([2, 2, 3]), torch.Size([2, 2]))
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Whole layers would pass by an `attend` or `provide` of a subclass: they do not serve one that has its own."""
        super().__init_subclass__(**kwargs)
        if {"attend", "provide"} & vars(cls).keys() and "plan_layer" not in vars(cls):
            cls._retrieves_its_own_way = True

    @property
    def has_divergence(self) -> Tensor | None:
        """Whether :attr:`kl` is a divergence, where that is data (see `active` of :meth:`attend`); None otherwise."""
        return None if self._decided is None else self._decided.has_divergence

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """The keys held, `[B, C]` each."""
        self._note_read(self.recomputing)
        self._settle()
        return self._now.pairs.keys

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The values held, `[B, C, *spatial]` each, in the dtype that they are held in."""
        self._note_read(self.recomputing)
        self._settle()
        pairs = self._now.pairs
        if self._dtype is None:
            return pairs.values
        stand_ins = pairs.stand_ins or (None,) * len(pairs.keys)
        found = []
        for key, value, stand_in in zip(pairs.keys, pairs.values, stand_ins, strict=True):
            if stand_in is not None:
                value = widened(value, stand_in, key.dtype)
            held = self._held_dtype(value.dtype)
            found.append(value if held is None else value.to(held))
        return tuple(found)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        heads: int,
        scale: float | None = None,
        channels_last: bool = False,
        caller: Any = None,
        active: Tensor | None = None,
        given: Tensor | None = None,
        tolerance: float | None = None,
    ) -> Tensor:
        """Append `(k, v)` and retrieve with `q` from all pairs held, this layer's own included.

        Args:
            q, k: query and key, `[B, C]`.
            v: value, `[B, C, *spatial]`, or `[B, *spatial, C]` with `channels_last=True`.
            heads: G, the same for all layers of the history.
            scale: factor of the scores; `1 / sqrt(C / G)` if None.
            channels_last: the last dimension of the values is the channel.
            caller: the module that calls; needed under `torch.utils.checkpoint`.
            active, given: whether this layer retrieves, and whether its pair is there for the layers after it, where
                that is data: booleans of no dimension. Without them it does, and is. `out` means nothing where
                `active` is false.
            tolerance: retrievals of a smaller weight are left out, and their values not read; see
                :func:`ela_kernels.layer_attention`. That of the history if None.

        Returns:
            `out`, like `v`. The weights and the divergence are then in :attr:`weights` and :attr:`kl`, both
            differentiable.

        Raises:
            TypeError, ValueError: as :func:`ela_kernels.layer_attention`, and for a layer whose value or heads
                differ from those held, or whose dtype cannot be promoted to.
            RuntimeError: a held tensor was changed in place, or reentrant checkpointing.

        Source:
            MRLA (arXiv 2302.03985), base form.
        """
        q = checks.check_query(q)
        if is_autocast_on(q):
            q, k, v = autocast_inputs(q, k, v)
        recomputing = self.recomputing
        snapshot = self._enter(caller, (q, k, v), recomputing)
        heads = snapshot.check_pair(q, k, v, heads, channels_last)
        scale = checks.check_scale(scale, q.shape[1] // heads)
        tolerance = self.tolerance_of(tolerance)
        self._note_read(recomputing)
        decided = self._decided_with(snapshot, given, active is not None)
        backend = held = None
        if self._dtype is not None:
            v, snapshot, held, backend = self._held(q, k, v, snapshot, caller, decided is None)
        if backend is None and decided is None:
            backend = self._backend(q, k, v, snapshot, caller)
        if backend is not None:
            q = resolved(q)
        pairs = self._extended(snapshot.pairs, k, v, held, backend is not None)
        if backend is not None:
            served(caller, "op", backend.name)
            link = self._link(pairs, heads, scale, channels_last, backend, tolerance)
            out, weights, kl, token = attend_pull(q, k, v, snapshot.token, snapshot.weights, link)
        else:
            keys, values, prev = self._read_by(q, snapshot)
            keys, values = (*keys, k), (*values, v)
            if decided is None:
                out, weights, kl = retrieve(
                    q, keys, values, heads, scale, prev, channels_last, tolerance, caller or self
                )
            else:
                out, weights, kl, self._decided = attend_decided(
                    q,
                    keys,
                    values,
                    heads,
                    scale,
                    prev,
                    channels_last,
                    decided,
                    active,
                    tolerance,
                    caller or self,
                )
            token = snapshot.token
        retrieved(weights, tolerance)
        at = snapshot.position + 1
        left = Snapshot(pairs, at, heads, weights, kl, token, None, tolerance)
        self._leave(left, recomputing, caller)
        return out

    def provide(
        self, k: Tensor, v: Tensor, *, heads: int, channels_last: bool = False, caller: Any = None
    ) -> None:
        """Append `(k, v)` for the later layers without retrieving; arguments as in :meth:`attend`."""
        checks.check_query(k, "k")
        if is_autocast_on(k):
            k, _, v = autocast_inputs(k, (), v)
        recomputing = self.recomputing
        snapshot = self._enter(caller, (k, v), recomputing)
        heads = snapshot.check_pair(k, k, v, heads, channels_last)
        decided = self._decided = self._decided_with(snapshot, None)
        backend = held = None
        if self._dtype is not None:
            v, snapshot, held, backend = self._held(k, k, v, snapshot, caller, decided is None)
        if backend is None and decided is None:
            backend = self._backend(k, k, v, snapshot, caller)
        pairs = self._extended(snapshot.pairs, k, v, held, backend is not None)
        token = snapshot.token
        if backend is not None:
            # No scale: this layer has no scores, and a key's gradient carries that of the layers retrieving it.
            link = self._link(pairs, heads, 1.0, channels_last, backend)
            token = provide_pull(k, v, token, link)
        self._leave(snapshot.moved_on(pairs, heads, token), recomputing, caller)

    @torch.no_grad()
    def probe(
        self, q: Tensor, k: Tensor, *, heads: int, scale: float | None = None
    ) -> LayerAttentionWeights:
        """The weights and divergence that a layer would have here; nothing is appended, no value is read.

        Args:
            q, k: query and key of the layer, `[B, C]`, the key counted as its own pair.
            heads, scale: as in :meth:`attend`.

        Returns:
            `weights` `[B, G, t + 1]` and `kl` `[B, G]`, without gradient.
        """
        self._note_read(self.recomputing)
        self._settle()
        held, _, prev = self._read_by(q, self._now)
        keys = [*(key.detach() for key in held), k.detach()]
        prev = None if prev is None else prev.detach()
        found = layer_attention_weights(q.detach(), keys, heads, scale, prev)
        if self._observer is not None:
            self._observer.probed(self, found)
        return found

    def _decided_with(
        self, snapshot: Snapshot, given: Tensor | None, is_decided: bool = False
    ) -> Decided | None:
        """What is decided only when a graph runs, with one more pair; None where nothing is."""
        decided = self._decided
        if decided is None:
            if given is None and not is_decided:
                return None
            decided = Decided((None,) * len(snapshot.pairs.keys))
        # Not `_replace`, which the compiler of PyTorch 2.8 cannot trace.
        return Decided((*decided.given, given), decided.retrieved, decided.has_divergence)

    def _backend(
        self, q: Tensor, k: Tensor, v: Tensor, snapshot: Snapshot, caller: Any
    ) -> KernelBackend | None:
        """Those that serve this layer; None where the functional op, with its push form, does.

        It does so too after a layer that it served: nothing would gather the gradient of that layer's pair. And where
        dtypes differ, or signs of the pair are not in memory.
        """
        pairs = snapshot.pairs
        if needs_dispatcher(q) or not signs_are_in_memory(k, v):
            return None
        if not pairs.gathering.serves or not pairs.are_all(q.dtype):
            refused(caller or self, "op", refusal_by(tuple(pair_obstacles(pairs, q.dtype))))
            return None
        return kernels_for("layer_attention", q, len(pairs.keys) + 1)

    def _held(
        self, q: Tensor, k: Tensor, v: Tensor, snapshot: Snapshot, caller: Any, may_link: bool
    ) -> tuple[Tensor, Snapshot, torch.dtype | None, KernelBackend | None]:
        """How the value of a layer is held in a history that was given a dtype: `(v, snapshot, held, backend)`.

        `backend` has kernels that read values held in `held`. Both are None where no kernel does; `v` is then rounded,
        and the values of `snapshot` are as wide as it.

        Args:
            q: the layer's query, or its key.
            may_link: whether kernels may be asked.
        """
        held = self._held_dtype(q.dtype)
        if held is None:
            return v, snapshot, None, None
        if may_link and not needs_dispatcher(q) and signs_are_in_memory(k, v):
            obstacles = tuple(pair_obstacles(snapshot.pairs, q.dtype, held))
            depth = len(snapshot.pairs.keys) + 1
            of_call = "layer_attention", q.device, q.dtype, depth, False, is_transformed()
            found = plan(Request(*of_call, obstacles, held))
            if not isinstance(found, Refusal):
                return v, snapshot, held, found
            held_as_they_are(caller or self, found)
        return rounded(v, held), snapshot.widened(), None, None

    @staticmethod
    def _extended(
        pairs: Pairs, k: Tensor, v: Tensor, held: torch.dtype | None, is_served: bool
    ) -> Pairs:
        have_node = is_served and torch.is_grad_enabled()
        if held is None:
            return pairs.extended(k, v, have_node=have_node)
        value, stand_in = narrowed(v, held)
        return pairs.extended(k, value, have_node=have_node, stand_in=stand_in)

    @staticmethod
    def _read_by(
        q: Tensor, snapshot: Snapshot
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """Keys, values and weights before a layer, in the dtypes that it reads them in."""
        if snapshot.pairs.are_all(q.dtype):
            return snapshot.pairs.keys, snapshot.pairs.values, snapshot.weights
        autocast = torch.get_autocast_dtype(q.device.type) if is_autocast_on(q) else None
        return snapshot.in_dtype_of(q, autocast, accumulate_dtype(q.dtype))

    def _link(
        self,
        pairs: Pairs,
        heads: int,
        scale: float,
        channels_last: bool,
        backend: KernelBackend,
        tolerance: float = 0.0,
    ) -> Link:
        keys, values, path = pairs.keys, pairs.values, pairs.path
        of_pairs = path, keys, values, heads, scale, channels_last
        return Link(*of_pairs, backend, self._record, tolerance=tolerance)
