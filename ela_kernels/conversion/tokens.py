"""The light form on tokens, as vision transformers have it: a class token goes by, and norms are inside the module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.tracing import is_transformed, needs_dispatcher
from ela_kernels.conversion.fused import Fused, gate_of, summed_dtype
from ela_kernels.modules.tokens import as_map, as_tokens
from ela_kernels.torch_internals import part_of


class FusedTokens(Fused):
    """The module around a light layer: `forward(x, prev_out)` on tokens `[B, 1 + side * side, C]`.

    Equivalent PyTorch::

        x, prev_out = norm_of_x(x), norm_of_prev(prev_out)                     # or as they are
        maps = (t[:, 1:].unflatten(1, (side, side)).movedim(3, 1) for t in (x, prev_out))
        out = layer(*maps, decay.view(C, 1, 1))                                # the light form
        torch.cat((x[:, :1], out.flatten(2).transpose(1, 2)), 1)
    """

    fused_layer_name: str
    fused_factor: str
    fused_norms: tuple[str | None, str | None]

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original: `[B, 1 + N, C]` of `x` and the output before."""
        layer = gate_of(self, args, options)
        if layer is None:
            return self.fused_original_forward(*args, **options)
        x, prev_out = args
        if not _are_tokens(x, prev_out, layer.dim) or needs_dispatcher(x) or is_transformed():
            return self.fused_original_forward(x, prev_out)
        norm_of_x, norm_of_prev = self.fused_norms
        if norm_of_x is not None:
            x = part_of(self, norm_of_x)(x)
        if norm_of_prev is not None:
            prev_out = part_of(self, norm_of_prev)(prev_out)
        # As one node each, whose backward writes no zeros.
        positions = x.shape[1] - 1
        leading, own = torch.split(x, [1, positions], 1)
        _, before = torch.split(prev_out, [1, positions], 1)
        decay = getattr(self, self.fused_factor).view(layer.dim, 1, 1)
        out = layer(as_map(own), as_map(before), decay).to(summed_dtype(own, before, decay))
        return torch.cat((leading, as_tokens(out)), 1)

    def fused_release(self) -> None:
        super().fused_release()
        del self.fused_layer_name, self.fused_factor, self.fused_norms


def _are_tokens(x: Any, prev_out: Any, dim: int) -> bool:
    if not (isinstance(x, Tensor) and isinstance(prev_out, Tensor)):
        return False
    shape = x.shape
    if len(shape) != 3 or shape[2] != dim or shape != prev_out.shape or x.dtype != prev_out.dtype:
        return False
    return shape[1] > 1 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1
