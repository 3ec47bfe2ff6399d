"""The light form of layer attention as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ela_kernels.backends.types import LightFilters
from ela_kernels.modules.layer_attention import QueryKeyValue
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import is_autocast_on, may_be_cast
from ela_kernels.ops.light_layer_attention import light_layer_attention
from ela_kernels.ops.light_layer_attention.choice import choose_light_kernels
from ela_kernels.ops.light_layer_attention.layer import light_layer


class LightLayerAttention(QueryKeyValue):
    """Gate this layer's value and let the previous layer's output decay; needs no history.

    Where the kernels serve it, one call of theirs makes all of it, and another all gradients.

    Equivalent PyTorch::

        y = x.mean((2, 3)).unsqueeze(1)                                  # [B, 1, C]
        q, k, v = Wq(y).squeeze(1), Wk(y).squeeze(1), Wv(x)
        out = ek.light_layer_attention(q, k, v, prev_out, lambda_t, heads=dim // head_dim)

    Args:
        dim: number of channels C.
        head_dim: channels of a head; a divisor of `dim`.
        kernel_size: odd size of the filters over the channel axis; `int(|log2(C) + 1| / 2)`, made odd, if None.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        MRLA (arXiv 2302.03985), light form. Parameters have the published names, `lambda_t` `[C, 1, 1]` included.
    """

    def __init__(self, dim: int, head_dim: int = 32, kernel_size: int | None = None) -> None:
        super().__init__(dim, head_dim, kernel_size)
        self.lambda_t = nn.Parameter(torch.randn(dim, 1, 1))

    def light_filters(self, x: Tensor, prev_out: Tensor) -> LightFilters | None:
        """The parameters, for the kernels that serve a whole layer; None where a module may not be passed by."""
        filters = self.filters(lambda: choose_light_kernels(x, (), prev_out) is not None)
        if filters is None or filters.wq is None or self.lambda_t.shape != (self.dim, 1, 1):
            return None
        return LightFilters(filters.wq, filters.wk, filters.wv, self.lambda_t)

    def forward(self, x: Tensor, prev_out: Tensor) -> Tensor:
        """The output `[B, C, H, W]`.

        Args:
            x: feature map `[B, C, H, W]`.
            prev_out: output of the layer before; the stage's input for its first layer. Shape of `x`. Of another dtype
                than `x` outside of autocast, the wider of the two is that of the output.
        """
        self.check_input(x)
        filters = self.light_filters(x, prev_out) if isinstance(prev_out, Tensor) else None
        if filters is not None:
            kernels = choose_light_kernels(x, filters, prev_out)
            if kernels is not None:
                return light_layer(kernels, x, filters, prev_out, self.heads, self.head_dim**-0.5)
        q, k, v = self.query_key_value(x)
        if isinstance(prev_out, Tensor) and prev_out.dtype in checks.ALLOWED_DTYPES:
            if is_autocast_on(x) and may_be_cast(prev_out):
                # The stage's input need not have passed through an autocast operation.
                prev_out = prev_out.to(v.dtype)
            elif prev_out.dtype != v.dtype:
                # As PyTorch's own product and sum: the wider of the two.
                wider = torch.promote_types(v.dtype, prev_out.dtype)
                q, k, v, prev_out = (t.to(wider) for t in (q, k, v, prev_out))
        return light_layer_attention(q, k, v, prev_out, self.lambda_t, self.heads)
