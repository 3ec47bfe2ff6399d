"""The attention layers: how keys, queries and values are made, kept and joined."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def filter_size(channels: int) -> int:
    """Width of the filters along the channels: odd, and wider the more channels there are."""
    size = int(abs((math.log2(channels) + 1) / 2))
    return size if size % 2 else size + 1


class Filters(nn.Module):
    """Query and key from a map's means, filtered along the channels; the value by a depthwise convolution."""

    def __init__(self, channels: int, dim_perhead: int) -> None:
        super().__init__()
        size = filter_size(channels)
        self.input_dim = channels
        self.heads = channels // dim_perhead
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.Wq = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wk = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self._norm_fact = 1 / math.sqrt(dim_perhead)

    def means(self, x: Tensor) -> Tensor:
        """Means over space `[B, 1, C]`."""
        return self.avg_pool(x).flatten(2).transpose(1, 2)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention of `[B, 1, C]` over `[B, T, C]` and `[B, T, C, H, W]`, each head by itself."""
        heads = (self.heads, q.shape[-1] // self.heads)
        q, k = (t.unflatten(2, heads).transpose(1, 2) for t in (q, keys))
        v = values.unflatten(2, heads).transpose(1, 2).flatten(3)
        weights = (q @ k.transpose(-1, -2) * self._norm_fact).softmax(-1)
        return (weights @ v).reshape(values[:, 0].shape)


class StackedAttention(Filters):
    """The base form: keys and values of all layers of the stage are stacked and handed on."""

    def __init__(self, channels: int, dim_perhead: int, init_cell: bool = False) -> None:
        super().__init__(channels, dim_perhead)
        self.init_cell = init_cell
        self.softmax = nn.Softmax(dim=-1)

    def forward(
        self, x: Tensor, prev_K: Tensor | None, prev_V: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self.means(x)
        q, K, V = self.Wq(y), self.Wk(y), self.Wv(x).unsqueeze(1)
        if not self.init_cell:
            assert prev_K is not None
            assert prev_V is not None
            K = torch.cat((prev_K, K), dim=1)
            V = torch.cat((prev_V, V), dim=1)
        return self.attend(q, K, V), K, V


class RawAttention(StackedAttention):
    """Stacks the maps themselves; every layer makes the keys and values of all of them with its own filters."""

    def forward(
        self, x: Tensor, prev_K: Tensor | None, prev_V: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = K = self.means(x)
        V = x.unsqueeze(1)
        if not self.init_cell:
            assert prev_K is not None
            assert prev_V is not None
            K = torch.cat((prev_K, K), dim=1)
            V = torch.cat((prev_V, V), dim=1)
        return self.join(self.Wq(y), *self.filtered(K, V)), K, V

    def filtered(self, means: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers so far."""
        keys = self.Wk(means.flatten(0, 1).unsqueeze(1)).view_as(means)
        return keys, self.Wv(maps.flatten(0, 1)).view_as(maps)

    def join(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.attend(q, keys, values)


class RawLinearAttention(RawAttention):
    """The same, without a softmax: `elu + 1` of queries and keys, and no division by their sum."""

    def join(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = (self.heads, q.shape[-1] // self.heads)
        q, k = (F.elu(t.unflatten(2, heads).transpose(1, 2)) + 1 for t in (q, keys))
        v = values.unflatten(2, heads).transpose(1, 2).flatten(3)
        return (q @ (k.transpose(-1, -2) @ v)).reshape(values[:, 0].shape)


class LightAttention(Filters):
    """The light form's own part: the value of this layer, gated by its own query and key."""

    def __init__(self, channels: int, dim_perhead: int, act_v: nn.Module | None = None) -> None:
        super().__init__(channels, dim_perhead)
        if act_v is not None:
            self.act_v = act_v
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.means(x)
        q, k = (t.view(len(x), self.heads, 1, -1) for t in (self.Wq(y), self.Wk(y)))
        v = self.Wv(x)
        if hasattr(self, "act_v"):
            v = self.act_v(v)
        scores = torch.einsum("bgid,bgjd->bgij", q, k) * self._norm_fact
        gate = self.sigmoid(scores).unsqueeze(-1)
        return (v.unflatten(1, (self.heads, -1)) * gate).view_as(v)


class ContextAttention(Filters):
    """Attention of equation (4) over the maps `ctx` `[B, T, C, H, W]`.

    Keys and values are viewed as `[B, G, T, D]` without a transposition, as published: with more than one layer, what a
    head attends to is not its own channels of all layers.
    """

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        b, t, c, h, w = ctx.shape
        maps = ctx.flatten(0, 1)
        q = self.Wq(self.means(x)).view(b, self.heads, 1, -1)
        k = self.Wk(self.means(maps)).reshape(b, self.heads, t, -1)
        v = self.Wv(maps).view(b, self.heads, t, -1, h, w)
        weights = (torch.einsum("bgid,bgtd->bgit", q, k) * self._norm_fact).softmax(-1)
        return torch.einsum("bgit,bgtdhw->bgidhw", weights, v).view(b, c, h, w)


class ElementwiseMap(nn.Module):
    """The feature map of linear attention, a module of its own without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


class LinearAttention(nn.Module):
    """Linear attention with running sums `s` of keys times values and `z` of keys; `dim` channels a group."""

    def __init__(self, channels: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        size = filter_size(channels)
        self.groups, self.eps = channels // dim, eps
        self.feature_map = ElementwiseMap()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.Wq = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wk = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)

    def forward(
        self, x: Tensor, s: Tensor | float, z: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self.avg_pool(x).flatten(2).transpose(1, 2)
        q, k = (
            self.feature_map(t).unflatten(2, (self.groups, -1)) for t in (self.Wq(y), self.Wk(y))
        )
        v = self.Wv(x).flatten(2).unflatten(1, (self.groups, -1))
        s = s + k.squeeze(1)[:, :, :, None, None] * v[:, :, None]
        z = z + k
        retrieved = torch.einsum("bgc,bgcsd->bgsd", q.squeeze(1), s)
        total = (q * (z + self.eps)).sum(-1).squeeze(1)
        return (retrieved / total[:, :, None, None]).view_as(x), s, z
