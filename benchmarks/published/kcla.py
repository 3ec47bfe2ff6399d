"""Residual networks whose layer attention is a running mean of all maps so far, weighted by the norms of their keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published.filters import filter_size
from benchmarks.published.parts import DropPath, ResNet, Trunk

# Sum of the weighted maps, sum of the keys, sum of the weights; none of them in the first stage's first layer.
Info = list[Tensor | None]


class NormWeightedAttention(nn.Module):
    """A gated convolution of the mean of the stage's maps. `carries`: takes the mean of the stage before over."""

    def __init__(
        self, channels: int, before: int, dim_perhead: int, carries: bool, drop: float
    ) -> None:
        super().__init__()
        size = filter_size(channels)
        self.head, self.heads, self.init_layer = dim_perhead, channels // dim_perhead, carries
        if carries:
            self.adjust_channel = nn.Conv2d(before, channels, 1, 2, groups=self.heads, bias=False)
            self.u_Wk = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
            self.u_bn = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop)
        self.bn_attention = nn.BatchNorm2d(channels)
        self.Wq = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wk = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.head_att = nn.Linear(self.heads, self.heads, bias=False)
        spread = math.log10(0.7)
        norm_d = torch.logspace(-spread, spread, self.heads).view(1, -1, 1, 1, 1)
        self.norm_d = nn.Parameter(norm_d, requires_grad=False)

    def forward(self, x: Tensor, info: Info | None = None) -> tuple[Tensor, Info]:
        total, keys, weights = info if info is not None else (None, None, None)
        if self.init_layer and total is not None and weights is not None:
            total, weights = self.carried(total / weights, x)
            keys = None
        means = self.avg_pool(x).flatten(2).transpose(1, 2)
        q, k = self.split(self.Wq(means)), self.split(self.Wk(means))
        norm = torch.linalg.vector_norm(k, dim=2, keepdim=True)
        weight = self.weight(norm)
        own = weight * x.unflatten(1, (self.heads, self.head))
        total = own if total is None else total + own
        keys = k if keys is None else keys + k
        weights = weight if weights is None else weights + weight
        value = self.Wv((total / (weights + 1e-3)).flatten(1, 2))
        score = (q * k).sum(2, keepdim=True) / norm
        gate = self.head_att(score.flatten(1)).sigmoid()[:, :, None, None, None]
        out = (gate * value.unflatten(1, (self.heads, self.head))).flatten(1, 2)
        return self.drop_path(F.relu(self.bn_attention(out))), [total, keys, weights]

    def carried(self, mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the stage before, in this stage's channels and size, as if it were a map of this stage."""
        mean = mean.flatten(1, 2)
        if mean.shape[1] != x.shape[1]:
            mean = self.adjust_channel(mean)
        mean = self.u_bn(mean)
        key = self.split(self.u_Wk(self.avg_pool(mean).flatten(2).transpose(1, 2)))
        weight = self.weight(torch.linalg.vector_norm(key, dim=2, keepdim=True))
        return mean.unflatten(1, (self.heads, self.head)) * weight, weight

    def split(self, t: Tensor) -> Tensor:
        """`[B, 1, C]` to `[B, G, D, 1, 1]`."""
        return t.view(t.shape[0], self.heads, self.head, 1, 1)

    def weight(self, norm: Tensor) -> Tensor:
        return (norm / self.norm_d).clamp(max=10).exp()


class NormWeightedBlock(Trunk):
    """A residual block with this attention; what it carries goes from block to block, and from stage to stage."""

    def __init__(
        self, inplanes: int, planes: int, stride: int, dim_perhead: int, first: bool, drop: float
    ) -> None:
        super().__init__(inplanes, planes, stride)
        self.kcla = NormWeightedAttention(self.channels, 2 * planes, dim_perhead, first, drop)

    def forward(self, x: Tensor, info: Info | None = None) -> tuple[Tensor, Info]:
        out, _ = self.residual(x)
        attn, info = self.kcla(out, info)
        return out + attn, info


class NormWeightedResNet(ResNet):
    """Stages of these blocks."""

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 16,
        stem: str = "cifar",
        *,
        dim_perhead: int = 16,
        drop: float = 0.2,
        classes: int = 10,
        image: int = 32,
    ) -> None:
        super().__init__(stem, width)
        stages = self.blocks(
            lambda inplanes, planes, stride, first: NormWeightedBlock(
                inplanes, planes, stride, dim_perhead, first, drop
            ),
            depths,
        )
        self.stages = nn.ModuleList([nn.ModuleList(stage) for stage in stages])
        self.add_head(stages[-1][-1].channels, classes, image, len(stages))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        info: Info | None = None
        for stage in self.stages:
            for block in stage:
                x, info = block(x, info)
        return self.head(x)
