"""The published, concatenating form of layer attention: the baseline that the fused one is compared with.

Our own writing, in plain PyTorch. At every layer all keys and all values so far are concatenated anew, and one batched
matrix product aggregates them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.modules.query_key_value import QueryKeyValue
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.layer_attention.reference import divergence_reference


class ConcatHistory:
    """Concatenated keys `[B, G, t, D]` and values `[B, G, t, D * H * W]` of the layers so far.

    Make one for each stage and forward pass. A model whose layers were replaced by :func:`ela_kernels.convert` still
    makes these: it then holds a :class:`ela_kernels.LayerHistory`, and everything is handed over to that.

    A layer may not be recomputed (`torch.utils.checkpoint`) with this history; `LayerHistory` allows it.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._weights: Tensor | None = None
        self._scores: Tensor | None = None
        self._prev_weights: Tensor | None = None
        self._fused: LayerHistory | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's `[B, G, 1, D]` key and `[B, G, 1, D * H * W]` value; all of them are returned."""
        if self._fused is not None:
            raise TypeError(
                "history: got a ConcatHistory that fused layers use; allowed is one form for all layers of a stage. "
                "Convert all of them, or none"
            )
        if self.keys is None or self.values is None:
            self.keys, self.values = k, v
        else:
            self.keys = torch.cat((self.keys, k), dim=2)
            self.values = torch.cat((self.values, v), dim=2)
        return self.keys, self.values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """For fused layers in a converted model: as :meth:`ela_kernels.LayerHistory.attend`."""
        if self.keys is not None:
            raise TypeError(
                "history: got a ConcatHistory that concatenating layers use; allowed is one form for all layers of a "
                "stage. Convert all of them, or none"
            )
        if self._fused is None:
            self._fused = LayerHistory()
        return self._fused.attend(q, k, v, **options)

    @property
    def depth(self) -> int:
        """Number of key and value pairs held."""
        if self._fused is not None:
            return self._fused.depth
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def weights(self) -> Tensor | None:
        """Weights `[B, G, t]` of the last layer; None before the first."""
        return self._weights if self._fused is None else self._fused.weights

    @property
    def kl(self) -> Tensor | None:
        """Divergence `[B, G]` of the last layer from the one before it; worked out only when asked for."""
        if self._fused is not None:
            return self._fused.kl
        if self._scores is None or self._prev_weights is None:
            return None
        dtype = accumulate_dtype(self._scores.dtype)
        return divergence_reference(self._prev_weights, self._scores.to(dtype).log_softmax(-1))

    def retrieved(self, weights: Tensor, scores: Tensor) -> None:
        """Keep what the last layer retrieved with, `[B, G, t]` each."""
        self._prev_weights, self._weights, self._scores = self._weights, weights, scores


class ConcatLayerAttention(QueryKeyValue):
    """Layer attention as published: concatenate, then multiply matrices. Arguments as `LayerAttention`.

    Source:
        MRLA (arXiv 2302.03985), equations 4 to 6, base form; the style of its public PyTorch code, written anew.
    """

    def __init__(self, dim: int, head_dim: int = 16, kernel_size: int | None = None) -> None:
        super().__init__(dim, head_dim, kernel_size)

    def forward(self, x: Tensor, history: ConcatHistory) -> Tensor:
        """The aggregation `[B, C, H, W]`.

        Args:
            x: feature map `[B, C, H, W]`.
            history: the :class:`ConcatHistory` of this stage and forward pass.
        """
        self.check_input(x)
        if not isinstance(history, ConcatHistory):
            raise TypeError(
                f"history: got {type(history).__name__}; "
                "allowed is a ConcatHistory (LayerAttention takes a LayerHistory)"
            )
        batch, heads = x.shape[0], self.heads
        q, k, v = self.query_key_value(x)
        keys, values = history.extend(
            k.reshape(batch, heads, 1, self.head_dim),
            v.reshape(batch, heads, 1, self.head_dim * x.shape[2] * x.shape[3]),
        )
        query = q.reshape(batch, heads, 1, self.head_dim) * self.head_dim**-0.5
        scores = query @ keys.transpose(2, 3)  # [B, G, 1, t]
        weights = scores.softmax(dim=-1)
        history.retrieved(weights.squeeze(2), scores.squeeze(2))
        out: Tensor = (weights @ values).reshape(x.shape)
        return out
