"""What the residual networks share: stem, residual block without attention, drop path, channel attention, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.published.filters import filter_size


class DropPath(nn.Module):
    """While training, zero a sample's map with probability `drop_prob`, and scale up those that stay."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1 - self.drop_prob
        drawn = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (drawn + keep).floor_()


def drop_path(drop_prob: float) -> nn.Module:
    """Drop path, or nothing where nothing is ever dropped."""
    return DropPath(drop_prob) if drop_prob > 0.0 else nn.Identity()


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate made of all channels' means."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(self.avg_pool(x).flatten(1))
        return x * gate[:, :, None, None]


class NeighbourGate(nn.Module):
    """Scale each channel by a gate made of the means of its neighbours."""

    def __init__(self, channels: int, size: int | None = None) -> None:
        super().__init__()
        size = size or filter_size(channels)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        means = self.avg_pool(x).flatten(2).transpose(1, 2)
        gate = self.sigmoid(self.conv(means))
        return x * gate.transpose(1, 2).unsqueeze(-1)


class Trunk(nn.Module):
    """The convolutions of a residual block and its shortcut; subclasses add the attention behind them."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        *,
        basic: bool = False,
        se: bool = False,
        eca: int | None = None,
    ) -> None:
        super().__init__()
        self.basic = basic
        self.channels = channels = planes if basic else 4 * planes
        if basic:
            self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
        else:
            self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.conv3 = nn.Conv2d(planes, channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.se = SqueezeExcitation(channels) if se else None
        self.eca = NeighbourGate(channels, eca) if eca else None

    def residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's map before the attention, and the shortcut that is a part of it."""
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if not self.basic:
            out = self.bn3(self.conv3(self.relu(out)))
        if self.se is not None:
            out = self.se(out)
        if self.eca is not None:
            out = self.eca(out)
        if self.downsample is not None:
            identity = self.downsample(identity)
        out += identity
        return self.relu(out), identity


# (channels before, planes, stride, first of its stage) -> a block
MakeBlock = Callable[[int, int, int, bool], Trunk]


class ResNet(nn.Module):
    """Stem and head. `stem`: "cifar", "imagenet" (7x7) or "deep" (three 3x3); `image`: the side of a cifar image."""

    def __init__(self, stem: str, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv1: nn.Module
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        elif stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        else:
            self.conv1 = nn.Sequential(
                nn.Conv2d(3, width // 2, 3, 2, 1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(width // 2, width // 2, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(width // 2, width, 3, 1, 1, bias=False),
            )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = None if stem == "cifar" else nn.MaxPool2d(3, 2, 1)

    def blocks(self, make: MakeBlock, depths: Sequence[int]) -> list[list[Trunk]]:
        """The blocks of all stages, each stage with twice the planes of the one before, and half its side."""
        stages, channels = [], self.width
        for i, depth in enumerate(depths):
            stage = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(make(channels, self.width * 2**i, stride, j == 0))
                channels = stage[-1].channels
            stages.append(stage)
        return stages

    def add_head(self, channels: int, classes: int, image: int, stages: int) -> None:
        """The classifier; the published networks for cifar pool a map of a fixed side."""
        side = image // 2 ** (stages - 1)
        self.avgpool = nn.AvgPool2d(side) if self.maxpool is None else nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def stem(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return x if self.maxpool is None else self.maxpool(x)

    def head(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))
