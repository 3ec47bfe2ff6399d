"""A published residual block whose end, from the attention on, is one call of the kernels.

The block runs its own forward up to the attention, and is left there; `x + drop_path(act(norm(attention(x))))` follows
as in our own blocks. Whatever stands before the attention is thereby the original's own code, and need not be known;
that nothing else stands behind it, the handshake has found out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.conversion.cut import Given, run_up_to
from ela_kernels.conversion.fused import Fused, FusedDecay, FusedGate, FusedLayer
from ela_kernels.modules.residual import light_residual_block, residual_block
from ela_kernels.torch_internals import has_hooks, part_of


class Tail(NamedTuple):
    """What a block does after its attention, by the names that the modules have in it.

    Attributes:
        attention: what is called with the map: a base layer, or the module around a light one.
        between: the modules that the call of the attention passes through.
        norm: the norm.
        act: the ReLU; None where there is none, FUNCTIONAL where it is no module.
        drop_path: what multiplies each sample with a number; None where there is none.
    """

    attention: str
    between: tuple[str, ...]
    norm: str
    act: str | None
    drop_path: str | None


FUNCTIONAL = ""

_NOTHING, _RELU = nn.Identity(), nn.ReLU()


class FusedBlock(Fused):
    """In front of a residual block; the forward's arguments and results are the original's."""

    tail: Tail

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original."""
        attention = self._part(self.tail.attention)
        if (
            torch.compiler.is_compiling()
            or not args
            or not isinstance(args[0], Tensor)
            or has_hooks(attention, *map(self._part, self.tail.between))
        ):
            return self.original_forward(*args, **options)
        found = run_up_to(attention, self.original_forward, *args, **options)
        if not isinstance(found, Given):
            return found
        # Out here, what the block's own code held is freed.
        tail, (x, given) = self.tail, found
        norm, drop_path = self._part(tail.norm), self._part(tail.drop_path)
        act = _RELU if tail.act == FUNCTIONAL else self._part(tail.act)
        if isinstance(attention, FusedLayer):
            out = residual_block(attention, norm, act, drop_path, x, given, samples=True)
            return attention.with_state(out, given)
        assert isinstance(attention, FusedDecay)
        layer = part_of(attention, attention.layer_name)
        assert isinstance(layer, FusedGate)
        return light_residual_block(layer, norm, act, drop_path, x, given, samples=True)[0]

    def _part(self, name: str | None) -> nn.Module:
        return _NOTHING if name is None else part_of(self, name)

    def release(self) -> None:
        super().release()
        del self.tail
