"""What a history holds, as immutable values: the pairs so far, and the place where one layer found them."""

from __future__ import annotations

import functools
import itertools
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.layout import with_one_more
from ela_kernels.ops import checks
from ela_kernels.ops.autograd.gathering import Gathering
from ela_kernels.ops.layer_attention.held import widened
from ela_kernels.torch_internals import version_of


class Pairs(NamedTuple):
    """Keys and values held, each pair with a number of its own, and the versions that they were appended at.

    `gathering` says whether kernels may go on from them, and `mixed` that they are of several dtypes, which no kernel
    reads together. Where the history holds values in another dtype than their layers have, `stand_ins` has for each
    what leads gradients to it, None where none has to be led; else it is empty.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    path: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()
    gathering: Gathering = Gathering()
    mixed: bool = False
    stand_ins: tuple[Tensor | None, ...] = ()

    def extended(
        self,
        key: Tensor,
        value: Tensor,
        path: tuple[int, ...] | None = None,
        have_node: bool = True,
        stand_in: Tensor | None = None,
    ) -> Pairs:
        """With one more pair, whose place is the end of `path` where it has one already.

        `have_node`: a node gathers the gradients of its key and value.
        """
        keys, values, old_path, versions, gathering, mixed, stand_ins = self
        mixed = mixed or not self.are_all(key.dtype, value.dtype)
        if value.dtype is not key.dtype:
            stand_ins = (*(stand_ins or (None,) * len(keys)), stand_in)
        elif stand_ins:
            stand_ins = (*stand_ins, None)
        # Neither path nor versions can be traced, and a compiled graph needs neither.
        if torch.compiler.is_compiling():
            path, version = old_path, -1
            keys, values = (*keys, key), (*values, value)
            if not have_node and (key.requires_grad or value.requires_grad):
                gathering = Gathering(is_whole=False)
        else:
            path = self.next_path() if path is None else path
            version = _version(key, value)
            keys, values = with_one_more(keys, key), with_one_more(values, value)
            # A value that was rounded to be held is nobody else's.
            own = (key, value) if value.dtype is key.dtype else (key,)
            gathering = gathering.with_tensors(own, have_node)
        return Pairs(keys, values, path, (*versions, version), gathering, mixed, stand_ins)

    def are_all(self, dtype: torch.dtype, held: torch.dtype | None = None) -> bool:
        """Whether every pair is one of layers in this dtype, with its value held in `held`, or in the same if None."""
        # By length: torch.compile cannot negate a tuple.
        if len(self.values) == 0:
            return True
        if self.mixed or self.keys[0].dtype != dtype:
            return False
        return self.values[0].dtype == (dtype if held is None else held)

    def widened(self) -> Pairs:
        """With values in the dtype of their layers, as these read them: new tensors, where they are held in another."""
        if len(self.stand_ins) == 0:
            return self
        found = Pairs()
        for key, value, stand_in in zip(self.keys, self.values, self.stand_ins, strict=True):
            wide = value if value.dtype == key.dtype else widened(value, stand_in, key.dtype)
            found = found.extended(key, wide)
        # What has no node, or asked for a gradient in the meantime, is not known by the new tensors.
        return found._replace(path=self.path, gathering=self.gathering)

    def next_path(self) -> tuple[int, ...]:
        return (*self.path, next(_serials))

    def changed(self) -> int | None:
        """The first layer whose key or value was changed in place since it was appended; None if none was."""
        versions = self.versions
        if -1 not in versions:
            # Asked at every layer about all before it, so without a loop in Python.
            found = map(add, map(version_of, self.keys), map(version_of, self.values))
            if tuple(found) == versions:
                return None
        for j, version in enumerate(versions):
            if version >= 0 and _version(self.keys[j], self.values[j]) != version:
                return j
        return None


_serials = itertools.count(1)


def _version(key: Tensor, value: Tensor) -> int:
    """Versions only grow, so their sum tells whether either has; inference tensors have none."""
    return -1 if value.is_inference() or key.is_inference() else version_of(key) + version_of(value)


def _check_promotes(held: torch.dtype, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Refuse a layer of `dtype` where its matrix product with what was concatenated in `held` is refused.

    Args:
        autocast: the dtype that autocast casts such a product to, where it is on.
    """
    wider = torch.promote_types(held, dtype)
    if wider == dtype or (held == torch.float32 and dtype == autocast):
        return
    raise ValueError(
        f"q: got {dtype} for a history of {held}; allowed is {wider}, which holds both (autocast casts float32 and its "
        "own dtype, and no other). Convert the layer and its input, or make a new LayerHistory"
    )


class Kept(NamedTuple):
    """What the last layer that retrieved got, kept for blocks that take it over.

    Attributes:
        o: the retrieval, `[B, C, *spatial]`.
        version: that it was kept at; whoever changed it in place made it another.
        statistics: mean and biased variance `[2, C]` of it over the batch, where a norm has taken them.
        exists: whether any layer has retrieved, a boolean of no dimension, where that is data; None: one has.
    """

    o: Tensor
    version: int
    statistics: Tensor | None = None
    exists: Tensor | None = None

    @classmethod
    def of(cls, o: Tensor, statistics: Tensor | None = None, exists: Tensor | None = None) -> Kept:
        version = -1 if torch.compiler.is_compiling() or o.is_inference() else version_of(o)
        return cls(o, version, statistics, exists)

    def is_as_it_was(self) -> bool:
        return self.version < 0 or version_of(self.o) == self.version


class Snapshot:
    """The history as one layer found it: immutable, so that a recomputed layer can start from it again.

    `kept` may be None where a layer has retrieved: then nobody needed it. `tolerance` is that of `weights`.
    """

    __slots__ = ("heads", "kept", "kl", "pairs", "position", "token", "tolerance", "weights")

    def __init__(
        self,
        pairs: Pairs = Pairs(),  # noqa: B008 - immutable
        position: int = 0,
        heads: int | None = None,
        weights: Tensor | None = None,
        kl: Tensor | None = None,
        token: Tensor | None = None,
        kept: Kept | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self.pairs, self.position, self.heads = pairs, position, heads
        self.weights, self.kl, self.token, self.kept = weights, kl, token, kept
        self.tolerance = tolerance

    def moved_on(self, pairs: Pairs, heads: int | None, token: Tensor | None) -> Snapshot:
        """After a layer that retrieved nothing of its own."""
        return self._changed(pairs, self.position + 1, heads, token, self.kept)

    def _changed(
        self,
        pairs: Pairs,
        position: int,
        heads: int | None,
        token: Tensor | None,
        kept: Kept | None,
    ) -> Snapshot:
        of_last = heads, self.weights, self.kl, token, kept, self.tolerance
        return Snapshot(pairs, position, *of_last)

    def widened(self) -> Snapshot:
        """With values as layers read them, in the layers' dtype; itself where they are held so."""
        if len(self.pairs.stand_ins) == 0:
            return self
        pairs = self.pairs.widened()
        return self._changed(pairs, self.position, self.heads, self.token, self.kept)

    def moved_to(self, position: int) -> Snapshot:
        return self._changed(self.pairs, position, self.heads, self.token, self.kept)

    def with_kept(self, kept: Kept | None) -> Snapshot:
        return self._changed(self.pairs, self.position, self.heads, self.token, kept)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, heads: int) -> Snapshot:
        """What holds `keys` `[B, T, C]` and `values` `[B, T, C, *spatial]`, as views.

        No layer of a history made them, so that nothing gathers their gradients: each layer adds its own.
        """
        pairs = Pairs()
        for key, value in zip(keys.unbind(1), values.unbind(1), strict=True):
            pairs = pairs.extended(key, value, have_node=False)
        return cls(pairs, len(pairs.keys), heads)

    def check_pair(self, q: Tensor, k: Tensor, v: Tensor, heads: int, channels_last: bool) -> int:
        """The heads, after the checks against q and against what is held."""
        checks.check_tensor("k", k)
        checks.check_like("k", k, q)
        if k.shape != q.shape:
            raise ValueError(f"k: got shape {list(k.shape)}; allowed is q's shape {list(q.shape)}")
        checks.check_map("v", v, q, channels_last)
        heads = checks.check_heads(heads, q.shape[1])
        self.check_fits(v, heads)
        return heads

    def in_dtype_of(
        self, q: Tensor, autocast: torch.dtype | None, weights: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """Keys, values and the last weights as a layer of query `q` reads them, promoted as concatenating them does.

        Args:
            autocast: as of :func:`_check_promotes`.
            weights: the dtype of its weights.

        Raises:
            ValueError: what is held is of a dtype that does not go with that of `q`.
        """
        dtype, pairs = q.dtype, self.pairs.widened()
        held = functools.reduce(torch.promote_types, [v.dtype for v in pairs.values])
        _check_promotes(held, dtype, autocast)
        keys, values = (tuple(t.to(dtype) for t in some) for some in (pairs.keys, pairs.values))
        return keys, values, None if self.weights is None else self.weights.to(weights)

    def check_fits(self, v: Tensor, heads: int) -> None:
        """Refuse a value or heads that differ from those held, and a pair that was changed since."""
        if not self.pairs.keys:
            return
        first = self.pairs.values[0]
        if v.shape != first.shape or v.device != first.device:
            raise ValueError(
                f"v: got shape {list(v.shape)} on {v.device}; allowed is what the history holds, "
                f"{list(first.shape)} on {first.device}. Make a new LayerHistory for each stage and forward pass"
            )
        if heads != self.heads:
            raise ValueError(
                f"heads: got {heads}; allowed is {self.heads}, as the layers before it in this history"
            )
        changed = self.pairs.changed()
        if changed is not None:
            raise RuntimeError(
                f"history: the key or value of layer {changed} was changed in place after it was appended; allowed is "
                "an out-of-place operation, or a clone given to the history"
            )
