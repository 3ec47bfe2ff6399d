"""A published residual block whose end, from the attention on, is one call of the kernels.

The block runs its own forward up to the attention, and is left there; `x + drop_path(act(norm(attention(x))))` follows
as in our own blocks. Whatever stands before the attention is thereby the original's own code, and need not be known;
that nothing else stands behind it, the handshake has found out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.backends.dispatch import refusal_by
from ela_kernels.conversion.cut import Given, run_up_to
from ela_kernels.conversion.factors import HAVE_FACTORS, Gated
from ela_kernels.conversion.fused import (
    Fused,
    FusedDecay,
    FusedGate,
    FusedLayer,
    is_wrapped,
    summed_dtype,
)
from ela_kernels.explaining import refused
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.residual import light_residual_block, residual_block
from ela_kernels.modules.reuse import block_around
from ela_kernels.modules.skipping import SkipMode, Skipping
from ela_kernels.ops.autocast import is_autocast_on, layer_dtype
from ela_kernels.torch_internals import has_own_hooks, is_exporting, own_child, part_of


class Tail(NamedTuple):
    """What a block does after its attention, by the names that the modules have in it.

    Attributes:
        attention: what is called with the map: a base layer, or the module around a light one.
        between: the modules that the call of the attention passes through.
        norm: the norm.
        act: the ReLU; None where there is none, FUNCTIONAL where it is no module.
        drop_path: what multiplies each sample with a number; None where there is none.
        drops: the class of that, which may be another by now.
    """

    attention: str
    between: tuple[str, ...]
    norm: str
    act: str | None
    drop_path: str | None
    drops: type[nn.Module] = nn.Identity


FUNCTIONAL = ""
_WIDENED = "under autocast the sum with the output before is {}, as in the original, and so is all that follows it"

_NOTHING, _RELU = nn.Identity(), nn.ReLU()


def _part(block: nn.Module, name: str | None) -> nn.Module:
    return _NOTHING if name is None else part_of(block, name)


def _act(block: FusedBlock) -> nn.Module:
    tail = block.fused_tail
    return _RELU if tail.act == FUNCTIONAL else _part(block, tail.act)


def path_of(block: FusedBlock) -> list[nn.Module] | None:
    """The modules from the block down to its attention; None where that is none of ours any more."""
    tail = block.fused_tail
    try:
        found = [part_of(block, name) for name in (*tail.between, tail.attention)]
    except (KeyError, AssertionError):
        return None
    return found if isinstance(found[-1], (FusedLayer, FusedDecay)) else None


def _layer_in(attention: nn.Module) -> nn.Module:
    """The layer itself; of the light form it is in the module that has the decay."""
    if isinstance(attention, FusedDecay):
        return part_of(attention, attention.fused_layer_name)
    return attention


class FusedBlock(Fused):
    """In front of a residual block; the forward's arguments and results are the original's."""

    fused_tail: Tail

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original."""
        tail = self.fused_tail
        path = path_of(self)
        if torch.compiler.is_compiling() or path is None:
            return self.fused_original_forward(*args, **options)
        attention = path[-1]
        why = None
        if is_wrapped(*path):
            why = "the attention, or a module between the block and it, has hooks, or all modules have"
        elif not args or not isinstance(args[0], Tensor):
            why = "the block is not called with its map in first place"
        if why is not None:
            refused(_layer_in(attention), "block", refusal_by((why,)))
            return self.fused_original_forward(*args, **options)
        found = run_up_to(attention, self.fused_original_forward, args, options)
        if not isinstance(found, Given):
            return found
        # Out here, what the block's own code held is freed.
        x, state = found
        norm, act, drop_path = part_of(self, tail.norm), _act(self), _part(self, tail.drop_path)
        samples = type(drop_path) is tail.drops
        if isinstance(state, Gated):
            assert isinstance(attention, FusedLayer)
            refused(attention, "block", refusal_by((HAVE_FACTORS,)), tells=False)
            o, left = attention.fused_mixed(x, state)
            return block_around(norm, act, drop_path, x, o, samples), *left
        if isinstance(attention, FusedLayer):
            out = residual_block(attention, norm, act, drop_path, x, state, samples)
            return attention.fused_with_state(out, state)
        layer = _layer_in(attention)
        assert isinstance(layer, FusedGate)
        assert isinstance(attention, FusedDecay)
        decay = attention.fused_decay()
        dtype = summed_dtype(x, state, decay)
        if is_autocast_on(x) and dtype != layer_dtype(x):
            refused(layer, "block", refusal_by((_WIDENED.format(dtype),)), tells=False)
            o = layer(x, state, decay).to(dtype)
            return block_around(norm, act, drop_path, x, o, samples)
        return light_residual_block(layer, norm, act, drop_path, x, state, samples, decay)[0]

    def fused_release(self) -> None:
        super().fused_release()
        del self.fused_tail


class BlockELA(ELA):
    """An :class:`ela_kernels.ELA` whose attention, norm, activation and drop path are those of a converted block.

    It is the block's child `ela`, and has nothing of its own but the decision, so that the keys of the block's
    parameters stay. A checkpoint of the original loads; it says nothing about decisions.
    """

    lent = True

    def __init__(self, block: FusedELABlock, skip: SkipMode) -> None:
        Skipping.__init__(self, skip)
        self._begin()
        self._block = (block,)  # no child

    @property
    def samples(self) -> bool:  # type: ignore[override]
        """Whether the drop path is still what the handshake has seen."""
        return type(self.drop_path) is self._block[0].fused_tail.drops

    def is_of(self, block: FusedELABlock) -> None:
        """Where it stands: a replica's block is another one."""
        if self._block[0] is not block:
            self._block = (block,)

    def is_around(self, layer: nn.Module) -> bool:
        """Whether its attention is `layer`."""
        return self._layer is layer

    def _has_query(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """The block has seen to it already."""
        return own_child(self._layer, "Wq") is not None

    @property
    def _layer(self) -> FusedLayer:
        block = self._block[0]
        found = part_of(block, block.fused_tail.attention)
        assert isinstance(found, FusedLayer)
        return found

    @property
    def attn(self) -> LayerAttention | None:
        """The block's attention; None where it has nothing left to make a pair of."""
        layer = self._layer
        return None if own_child(layer, "Wv") is None else layer

    @attn.setter
    def attn(self, value: LayerAttention | None) -> None:
        """Remove the parameters. The layer itself stays, since the block's own code calls it."""
        for name in ("Wq", "Wk", "Wv"):
            self._layer.register_module(name, None)

    @property
    def norm(self) -> nn.Module | None:
        """The block's norm; None once it is removed."""
        block = self._block[0]
        return own_child(block, block.fused_tail.norm)

    @norm.setter
    def norm(self, value: nn.Module | None) -> None:
        block = self._block[0]
        block.register_module(block.fused_tail.norm, None)

    @property
    def act(self) -> nn.Module:  # type: ignore[override]
        """The block's activation."""
        return _act(self._block[0])

    @property
    def drop_path(self) -> nn.Module:  # type: ignore[override]
        """What drops samples in the block."""
        block = self._block[0]
        return _part(block, block.fused_tail.drop_path)


class FusedELABlock(FusedBlock):
    """In front of a residual block of the base form whose retrieval can be skipped, by its child `ela`."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original; where its retrieval is skipped, without it."""
        tail = self.fused_tail
        path, ela = path_of(self), part_of(self, "ela")
        assert isinstance(ela, BlockELA)
        if path is None:
            raise RuntimeError(
                f"{type(self).__name__}: its attention was exchanged for another; allowed is to exchange it after "
                "ela_kernels.unconvert"
            )
        attention = path[-1]
        ela.is_of(self)
        if is_exporting():
            raise RuntimeError(
                f"{type(self).__name__}: got torch.export of a network that was converted with to='ela', which leaves "
                "a block in the middle; allowed is to export it after ela_kernels.unconvert, or without to='ela'"
            )
        names = (*tail.between, tail.attention)
        hooked = [
            n for n, m in zip(names, path, strict=True) if has_own_hooks(m) or "forward" in vars(m)
        ]
        if hooked:
            raise RuntimeError(
                f"{type(self).__name__}: got hooks on {', '.join(hooked)}, whose calls a block that was converted with "
                "to='ela' does not finish; allowed are hooks on the block, its norm or Wq, Wk and Wv"
            )
        found = run_up_to(attention, self.fused_original_forward, args, options)
        if not isinstance(found, Given):
            raise RuntimeError(
                f"{type(self).__name__}: its attention was called under other circumstances than the block (gradients, "
                "autocast, a checkpoint inside the block) or not at all; a block that was converted with to='ela' "
                "allows none of that"
            )
        assert isinstance(attention, FusedLayer)
        x, history = found
        return attention.fused_with_state(ela(x, history), history, x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        extra, ela = state_dict.get(f"{prefix}ela._extra_state"), part_of(self, "ela")
        pruned = 0 if extra is None else int(extra[3])
        if pruned:
            # Before the parts are loaded, so that none of them misses its parameters.
            query = f"{prefix}{self.fused_tail.attention}.Wq."
            assert isinstance(ela, BlockELA)
            ela.remove_unused(pruned == 1, any(k.startswith(query) for k in state_dict))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fused_release(self) -> None:
        super().fused_release()
        del self.ela
