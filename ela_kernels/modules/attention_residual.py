"""Attention residuals as a module: a learned query retrieves from all layers so far at every position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ela_kernels.ops.position_attention import PositionHistory
from ela_kernels.ops.position_attention.checks import DEFAULT_EPS, check_eps, check_scale
from ela_kernels.ops.position_attention.interface import retrieve


class AttentionResidual(nn.Module):
    """Give a layer its input: at every position a weighted mean of what all layers before it gave.

    Takes the place of the sum of a residual network. Equivalent PyTorch, for tokens `[B, N, C]`::

        v = torch.stack(values, 1)                                # [B, T, N, C]
        s = F.rms_norm(v, (dim,), norm_weight, eps) @ query       # [B, T, N]
        out = (s.softmax(1).unsqueeze(-1) * v).sum(1)

    The query starts at zero, so that the weights of all values are equal at first, as in the paper.

    Args:
        dim: number of channels C.
        eps: added to the mean square of a key.
        scale: factor of the scores; 1 if None.
        device, dtype: of the parameters `query` and `norm_weight`, `[C]` each.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        Attention Residuals (Kimi Team, arXiv 2603.15031), the full form. The block form is the same module over fewer
        values: the sums of finished blocks, and the sum of the block that is under way.

    Example:
        >>> import torch, ela_kernels as ek
        >>> layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        >>> mixes = torch.nn.ModuleList(ek.AttentionResidual(8) for _ in range(4))
        >>> history = ek.PositionHistory()
        >>> history.append(torch.randn(2, 5, 8))
        >>> for layer, mix in zip(layers, mixes):
        ...     history.append(layer(mix(history)))
        >>> mixes[-1](history).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        eps: float = DEFAULT_EPS,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: got {type(dim).__name__}; allowed is an int")
        if dim < 1:
            raise ValueError(f"dim: got {dim}; allowed is the number of channels, 1 or more")
        self.dim, self.eps = dim, check_eps(eps)
        self.scale = None if scale is None else check_scale(scale)
        self.query = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.norm_weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(
        self, values: PositionHistory | Sequence[Tensor], channels_last: bool | None = None
    ) -> Tensor:
        """What the next layer is given, like a value.

        Args:
            values: the :class:`ela_kernels.PositionHistory` of this forward pass, which then holds weights and
                divergence, and gathers gradients; or a list of tensors, as of :func:`ela_kernels.position_attention`.
            channels_last: of a list, whether the last dimension of a value is the channel. A history knows.

        Raises:
            TypeError, ValueError: as of :func:`ela_kernels.position_attention`, and `channels_last` that is not that of
                the history.
        """
        if isinstance(values, PositionHistory):
            values.check_form(channels_last)
            return values.attend(self.query, self.norm_weight, self.eps, self.scale, caller=self)
        return retrieve(
            self.query,
            values,
            None,
            self.norm_weight,
            self.eps,
            self.scale,
            None,
            channels_last,
            self,
        ).out

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale}"
        return f"{self.dim}, eps={self.eps}{scale}"
