"""The keys, values and weights of the layers seen so far, with the pull form of the backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import Kernels
from ela_kernels.backends.dispatch import (
    LayerChoice,
    choose_kernels,
    kernels_of,
)
from ela_kernels.backends.layout import accumulate_dtype, resolved
from ela_kernels.backends.memory import PLAIN_TENSORS
from ela_kernels.backends.tracing import is_transformed, needs_dispatcher
from ela_kernels.backends.types import (
    Epilogue,
    Filters,
)
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import (
    as_autocast,
    autocast_inputs,
    fits_layer_dtype,
    is_autocast_on,
    layer_dtype,
)
from ela_kernels.ops.layer_attention.block import block_pull
from ela_kernels.ops.layer_attention.decided import Decided, attend_decided
from ela_kernels.ops.layer_attention.interface import (
    LayerAttentionWeights,
    layer_attention,
    layer_attention_weights,
)
from ela_kernels.ops.layer_attention.layer import layer_pull, provider_pull
from ela_kernels.ops.layer_attention.places import Places
from ela_kernels.ops.layer_attention.readers import Turns
from ela_kernels.ops.layer_attention.record import (
    Link,
    Record,
    attend_pull,
    provide_pull,
)
from ela_kernels.ops.layer_attention.snapshot import (
    Pairs,
    Prefix,
)


class LayerHistory(Places):
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

    A checkpoint keeps the history that it is called with. As with a list, both stay in memory where layers were
    checkpointed and their backward has not run to its end; elsewhere all goes with the last reference to the outputs.

    Example:
        >>> import torch, ela_kernels as ek
        >>> history = ek.LayerHistory()
        >>> for _ in range(3):
        ...     q, k, v = torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8, 4, 4)
        ...     out = history.attend(q, k, v, heads=2)
        >>> history.weights.shape, history.kl.shape
        (torch.Size([2, 2, 3]), torch.Size([2, 2]))
    """

    def __init__(self) -> None:
        super().__init__()
        self._record = Record()
        self._layer_kernels = LayerChoice()
        self._decided: Decided | None = None
        self.turns = Turns()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Whole layers would pass by an `attend` or `provide` of a subclass: they do not serve one that has its own."""
        super().__init_subclass__(**kwargs)
        if {"attend", "provide"} & vars(cls).keys() and "serves_layer" not in vars(cls):
            cls.serves_layer = lambda *_, **__: False  # type: ignore[method-assign]

    @property
    def depth(self) -> int:
        """Number of key and value pairs held."""
        return len(self._now.pairs.keys)

    @property
    def weights(self) -> Tensor | None:
        """Weights `[B, G, t]` of the last layer that retrieved; None before the first."""
        return self._latest.weights

    @property
    def kl(self) -> Tensor | None:
        """Divergence `[B, G]` of the last layer that retrieved from the one before it; None without one."""
        return self._latest.kl

    @property
    def has_divergence(self) -> Tensor | None:
        """Whether :attr:`kl` is a divergence, where that is data (see `active` of :meth:`attend`); None otherwise."""
        return None if self._decided is None else self._decided.has_divergence

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """The keys held, `[B, C]` each."""
        self._note_read()
        return self._now.pairs.keys

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The values held, `[B, C, *spatial]` each."""
        self._note_read()
        return self._now.pairs.values

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
        prefix = self._enter(caller, (q, k, v))
        heads = prefix.check_pair(q, k, v, heads, channels_last)
        scale = checks.check_scale(scale, q.shape[1] // heads)
        self._note_read()
        decided = self._decided_with(prefix, given, active is not None)
        kernels = self._kernels(q, prefix) if decided is None else None
        if kernels is not None:
            q, k, v = resolved(q), resolved(k), resolved(v)
        is_linked = kernels is not None and torch.is_grad_enabled()
        pairs = prefix.pairs.extended(k, v, is_linked=is_linked)
        if kernels is not None:
            link = self._link(pairs, heads, scale, channels_last, kernels)
            out, weights, kl, token = attend_pull(q, k, v, prefix.token, prefix.weights, link)
        else:
            keys, values, prev = self._read_by(q, prefix)
            keys, values = (*keys, k), (*values, v)
            if decided is None:
                out, weights, kl = layer_attention(
                    q, keys, values, heads, scale, prev, channels_last
                )
            else:
                out, weights, kl, self._decided = attend_decided(
                    q, keys, values, heads, scale, prev, channels_last, decided, active
                )
            token = prefix.token
        self._leave(Prefix(pairs, prefix.position + 1, heads, weights, kl, token))
        return out

    def provide(
        self, k: Tensor, v: Tensor, *, heads: int, channels_last: bool = False, caller: Any = None
    ) -> None:
        """Append `(k, v)` for the later layers without retrieving; arguments as in :meth:`attend`."""
        checks.check_query(k, "k")
        if is_autocast_on(k):
            k, _, v = autocast_inputs(k, (), v)
        prefix = self._enter(caller, (k, v))
        heads = prefix.check_pair(k, k, v, heads, channels_last)
        self._decided = self._decided_with(prefix, None)
        kernels = self._kernels(k, prefix) if self._decided is None else None
        if kernels is not None:
            k, v = resolved(k), resolved(v)
        is_linked = kernels is not None and torch.is_grad_enabled()
        pairs = prefix.pairs.extended(k, v, is_linked=is_linked)
        token = prefix.token
        if kernels is not None:
            # No scale: this layer has no scores, and a key's gradient carries that of the layers retrieving it.
            link = self._link(pairs, heads, 1.0, channels_last, kernels)
            token = provide_pull(k, v, token, link)
        self._leave(Prefix(pairs, prefix.position + 1, heads, prefix.weights, prefix.kl, token))

    def serves_layer(self, x: Tensor, filters: Sequence[Tensor | None], caller: Any = None) -> bool:
        """Whether :meth:`attend_layer` and :meth:`provide_layer` can serve `x`: the backend has kernels of a layer."""
        if needs_dispatcher(x) or not x.numel():
            return False
        dtype, device = layer_dtype(x), x.device
        for w in filters:
            # Of what needs a dispatcher only a class of its own can differ from x.
            if w is not None and (
                w.device != device
                or type(w) not in PLAIN_TENSORS
                or (w.dtype is not dtype and not fits_layer_dtype(w, x))
            ):
                return False
        if is_transformed() or self._decided is not None:
            return False
        pairs = self._place_of(caller).pairs
        return (
            pairs.linked
            and pairs.are_all(dtype)
            and self._layer_kernels(x, len(pairs.keys) + 1, dtype) is not None
        )

    def attend_layer(
        self, x: Tensor, filters: Filters, *, heads: int, residual: bool = False, caller: Any = None
    ) -> Tensor:
        """Make query, key and value from `x`, append, and retrieve, all in one call; see :meth:`serves_layer`.

        Equivalent PyTorch::

            y = x.mean((2, 3)).unsqueeze(1)                                       # [B, 1, C]
            q, k = (F.conv1d(y, w, padding=w.shape[-1] // 2).squeeze(1) for w in (wq, wk))
            v = F.conv2d(x, wv, padding=1, groups=C)
            out = history.attend(q, k, v, heads=heads)
            out = x + out if residual else out

        Under autocast `x` and the filters are cast to its dtype, as a convolution casts them.

        Args:
            x: feature map `[B, C, H, W]`.
            filters: `wq` and `wk` `[1, 1, size]` with an odd size, `wv` `[C, 1, 3, 3]`, of x's dtype.
            heads: G, the same for all layers of the history.
            residual: add `x`.
            caller: the module that calls; needed under `torch.utils.checkpoint`.

        Returns:
            `out`, like `x`; under autocast in its dtype.

        Raises:
            As :meth:`attend`.

        Source:
            MRLA (arXiv 2302.03985), base form.
        """
        if residual and x.dtype != layer_dtype(x):
            return x + self.attend_layer(x, filters, heads=heads, caller=caller)
        x, filters = as_autocast(x, filters)
        prefix, heads, link = self._layer_link(x, filters, heads, caller)
        self._note_read()
        out, weights, kl, token, k, v = layer_pull(
            resolved(x), filters, prefix.weights, residual, prefix.token, link
        )
        pairs = prefix.pairs.extended(k, v, link.path)
        self._leave(Prefix(pairs, prefix.position + 1, heads, weights, kl, token))
        return out

    def attend_block(
        self, x: Tensor, filters: Filters, epilogue: Epilogue, *, heads: int, caller: Any = None
    ) -> tuple[Tensor, Tensor]:
        """A residual block, `x + mask * act(norm(attend_layer(x)))`, in one node; arguments as :meth:`attend_layer`.

        Under autocast `x` has its dtype already.

        Returns:
            The block's output, like `x`, and mean and biased variance of each channel `[2, C]` that it was normed with.
        """
        x, filters = as_autocast(x, filters)
        prefix, heads, link = self._layer_link(x, filters, heads, caller)
        self._note_read()
        found, statistics = block_pull(
            resolved(x), filters, epilogue, prefix.weights, prefix.token, link
        )
        out, weights, kl, token, k, v = found
        pairs = prefix.pairs.extended(k, v, link.path)
        self._leave(Prefix(pairs, prefix.position + 1, heads, weights, kl, token))
        return out, statistics

    def _layer_link(
        self, x: Tensor, filters: Filters, heads: int, caller: Any
    ) -> tuple[Prefix, int, Link]:
        """Where a layer is in the history, its heads, and the pairs before it."""
        prefix = self._enter(caller, (x, *filters))
        pairs = prefix.pairs
        channels = x.shape[1]
        if type(heads) is not int or heads != prefix.heads:  # the same number is checked already
            heads = checks.check_heads(heads, channels)
        prefix.check_fits(x, heads)
        scale = 1.0 / math.sqrt(channels // heads)
        keys, values = pairs.keys, pairs.values
        may_serve = pairs.linked and pairs.are_all(x.dtype)
        served = self._layer_kernels.again(x, len(keys) + 1) if may_serve else None
        if served is None:
            raise ValueError("x: no kernel of a whole layer serves it; ask serves_layer first")
        path, kernels, layer = pairs.next_path(), kernels_of(served[0]), served[1]
        link = Link(path, keys, values, heads, scale, False, kernels, self._record, layer, pairs)
        return prefix, heads, link

    def provide_layer(self, x: Tensor, filters: Filters, *, heads: int, caller: Any = None) -> None:
        """Make key and value from `x` and append them, without retrieving; arguments as in :meth:`attend_layer`."""
        x, filters = as_autocast(x, filters._replace(wq=None))
        prefix, heads, link = self._layer_link(x, filters, heads, caller)
        token, k, v = provider_pull(resolved(x), filters, prefix.token, link)
        pairs = prefix.pairs.extended(k, v, link.path)
        self._leave(Prefix(pairs, prefix.position + 1, heads, prefix.weights, prefix.kl, token))

    def pass_by(self, caller: Any = None) -> None:
        """Count a layer that neither retrieves nor provides."""
        p = self._enter(caller, ())
        self._leave(Prefix(p.pairs, p.position + 1, p.heads, p.weights, p.kl, p.token))

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
        self._note_read()
        held, _, prev = self._read_by(q, self._now)
        keys = [*(key.detach() for key in held), k.detach()]
        prev = None if prev is None else prev.detach()
        return layer_attention_weights(q.detach(), keys, heads, scale, prev)

    def _decided_with(
        self, prefix: Prefix, given: Tensor | None, is_decided: bool = False
    ) -> Decided | None:
        """What is decided only when a graph runs, with one more pair; None where nothing is."""
        decided = self._decided
        if decided is None:
            if given is None and not is_decided:
                return None
            decided = Decided((None,) * len(prefix.pairs.keys))
        return decided._replace(given=(*decided.given, given))

    def _note_read(self) -> None:
        if not self.recomputing:
            self.turns.note_read()

    def _kernels(self, q: Tensor, prefix: Prefix) -> Kernels | None:
        """Those that serve this layer; None where the functional op, with its push form, does.

        It does so too after a layer that it served: nothing would gather the gradient of that layer's pair. And where
        dtypes differ.
        """
        if needs_dispatcher(q) or not prefix.pairs.linked or not prefix.pairs.are_all(q.dtype):
            return None
        return choose_kernels("layer_attention", q, len(prefix.pairs.keys) + 1)

    @staticmethod
    def _read_by(
        q: Tensor, prefix: Prefix
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """Keys, values and weights before a layer, in the dtypes that it reads them in."""
        if prefix.pairs.are_all(q.dtype):
            return prefix.pairs.keys, prefix.pairs.values, prefix.weights
        autocast = torch.get_autocast_dtype(q.device.type) if is_autocast_on(q) else None
        return prefix.in_dtype_of(q, autocast, accumulate_dtype(q.dtype))

    def _link(
        self, pairs: Pairs, heads: int, scale: float, channels_last: bool, kernels: Kernels
    ) -> Link:
        keys, values, path = pairs.keys, pairs.values, pairs.path
        return Link(path, keys, values, heads, scale, channels_last, kernels, self._record)
