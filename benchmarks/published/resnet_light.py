"""Residual networks with the light form of layer attention: each block adds its own shortcut, scaled by channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.published.filters import LightAttention
from benchmarks.published.parts import ResNet, Trunk, drop_path


class LightCell(nn.Module):
    """The gated value, and `lambda_t` times what was there before. `child`: the attention layer's name."""

    def __init__(self, channels: int, dim_perhead: int, child: str = "mrla") -> None:
        super().__init__()
        self.child = child
        self.add_module(child, LightAttention(channels, dim_perhead))
        self.lambda_t = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        attn = getattr(self, self.child)(xt)
        return attn + self.lambda_t.expand_as(ot_1) * ot_1


class LightBlock(Trunk):
    """A residual block of the light form; no activation behind the norm. `drop` None: no drop path at all."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        dim_perhead: int,
        drop: float | None,
        **trunk: bool | int | None,
    ) -> None:
        super().__init__(inplanes, planes, stride, **trunk)
        self.mrla = LightCell(self.channels, dim_perhead)
        self.bn_mrla = nn.BatchNorm2d(self.channels)
        if drop is not None:
            self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        out, identity = self.residual(x)
        attn = self.bn_mrla(self.mrla(out, identity))
        if hasattr(self, "drop_path"):
            attn = self.drop_path(attn)
        return out + attn


class LightResNet(ResNet):
    """Stages of light blocks, each a `Sequential`."""

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 16,
        stem: str = "cifar",
        *,
        dim_perhead: int = 32,
        basic: bool = False,
        se: bool = False,
        eca: int | None = None,
        drop: float | None = 0.0,
        classes: int | None = 10,
        image: int = 32,
    ) -> None:
        super().__init__(stem, width)
        self.layers = []

        def block(inplanes: int, planes: int, stride: int, first: bool) -> LightBlock:
            options = {"basic": basic, "se": se, "eca": eca}
            return LightBlock(inplanes, planes, stride, dim_perhead, drop, **options)

        stages = self.blocks(block, depths)
        for i, stage in enumerate(stages, 1):
            setattr(self, f"layer{i}", nn.Sequential(*stage))
            self.layers.append(f"layer{i}")
        if classes is not None:
            self.add_head(stages[-1][-1].channels, classes, image, len(stages))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The last map of each stage."""
        x, maps = self.stem(x), []
        for name in self.layers:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x)[-1])


class LightBackbone(LightResNet):
    """A detector's backbone: every stage's map, no head, no drop path, and norms that stay in evaluation mode."""

    def __init__(self, depths: Sequence[int], width: int = 64, *, dim_perhead: int = 32) -> None:
        super().__init__(
            depths, width, "imagenet", dim_perhead=dim_perhead, drop=None, classes=None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(self.maps(x))

    def train(self, mode: bool = True) -> LightBackbone:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self
