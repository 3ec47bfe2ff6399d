"""Residual networks with the base form of layer attention: keys and values go from block to block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.published.filters import ContextAttention, StackedAttention
from benchmarks.published.parts import ResNet, Trunk, drop_path


class BaseCell(nn.Module):
    """The attention layer, and the rule that a stage's first layer begins anew. `child`: the layer's name."""

    def __init__(self, attention: StackedAttention, child: str = "mrla") -> None:
        super().__init__()
        self.child, self.init_cell = child, attention.init_cell
        self.add_module(child, attention)

    def forward(
        self, xt: Tensor, prev_k: Tensor | None, prev_v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.init_cell:
            prev_k = prev_v = None
        out, k, v = getattr(self, self.child)(xt, prev_k, prev_v)
        return out, k, v


class BaseBlock(Trunk):
    """A residual block with what it retrieves from the blocks before, normalised, added to its map."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        attention: type[StackedAttention],
        dim_perhead: int,
        init_cell: bool,
        activated: bool,
        drop: float,
        **trunk: bool | int | None,
    ) -> None:
        super().__init__(inplanes, planes, stride, **trunk)
        self.activated = activated
        self.mrla = BaseCell(attention(self.channels, dim_perhead, init_cell))
        self.bn_mrla = nn.BatchNorm2d(self.channels)
        self.drop_path = drop_path(drop)

    def forward(
        self, x: Tensor, prev_k: Tensor | None, prev_v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, _ = self.residual(x)
        attn, k, v = self.mrla(out, prev_k, prev_v)
        attn = self.bn_mrla(attn)
        if self.activated:
            attn = self.relu(attn)
        return out + self.drop_path(attn), k, v


class BaseResNet(ResNet):
    """Stages of base blocks. `activated`: a ReLU behind the attention's norm; `channel_wise`: heads of one channel."""

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 16,
        stem: str = "cifar",
        *,
        dim_perhead: int = 32,
        attention: type[StackedAttention] = StackedAttention,
        basic: bool = False,
        activated: bool = True,
        channel_wise: bool = False,
        se: bool = False,
        eca: int | None = None,
        drop: float = 0.0,
        classes: int = 10,
        image: int = 32,
    ) -> None:
        super().__init__(stem, width)
        dim = 1 if channel_wise else dim_perhead

        def block(inplanes: int, planes: int, stride: int, first: bool) -> BaseBlock:
            options = {"basic": basic, "se": se, "eca": eca}
            return BaseBlock(
                inplanes, planes, stride, attention, dim, first, activated, drop, **options
            )

        stages = self.blocks(block, depths)
        self.stages = nn.ModuleList([nn.ModuleList(stage) for stage in stages])
        self.add_head(stages[-1][-1].channels, classes, image, len(stages))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        k: Tensor | None = None
        v: Tensor | None = None
        for stage in self.stages:
            for block in stage:
                x, k, v = block(x, k, v)
        return self.head(x)


class ContextBlock(Trunk):
    """A residual block of equation (4): a list of the stage's maps grows from block to block."""

    def __init__(
        self, inplanes: int, planes: int, stride: int, dim_perhead: int, drop: float
    ) -> None:
        super().__init__(inplanes, planes, stride)
        self.la = ContextAttention(self.channels, dim_perhead)
        self.bn_la = nn.BatchNorm2d(self.channels)
        self.drop_path = drop_path(drop)  # made, and not used

    def forward(self, x: Tensor, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, _ = self.residual(x)
        maps.append(out)
        return self.bn_la(self.la(out, torch.stack(maps, 1))), maps


class ContextResNet(ResNet):
    """Stages of blocks of equation (4)."""

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 64,
        stem: str = "imagenet",
        *,
        dim_perhead: int = 32,
        drop: float = 0.0,
        classes: int = 10,
        image: int = 32,
    ) -> None:
        super().__init__(stem, width)
        stages = self.blocks(
            lambda inplanes, planes, stride, _: ContextBlock(
                inplanes, planes, stride, dim_perhead, drop
            ),
            depths,
        )
        self.layers = []
        for i, stage in enumerate(stages, 1):
            setattr(self, f"layer{i}", nn.Sequential(*stage))
            self.layers.append(f"layer{i}")
        self.add_head(stages[-1][-1].channels, classes, image, len(stages))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.layers:
            maps: list[Tensor] = []
            for block in getattr(self, name):
                x, maps = block(x, maps)
        return self.head(x)
