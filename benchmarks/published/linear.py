"""Linear layer attention: running sums go from block to block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from benchmarks.published.filters import LinearAttention
from benchmarks.published.parts import ResNet, Trunk, drop_path


class LinearBlock(Trunk):
    """A residual block with linear layer attention."""

    def __init__(
        self, inplanes: int, planes: int, stride: int, dim_perhead: int, drop: float
    ) -> None:
        super().__init__(inplanes, planes, stride)
        self.mrla = LinearAttention(self.channels, dim_perhead)
        self.bn_mrla = nn.BatchNorm2d(self.channels)
        self.drop_path = drop_path(drop)

    def forward(
        self, x: Tensor, s: Tensor | float, z: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, _ = self.residual(x)
        attn, s, z = self.mrla(out, s, z)
        return out + self.drop_path(self.bn_mrla(attn)), s, z


class LinearResNet(ResNet):
    """Stages of linear blocks; the sums begin anew in each."""

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 16,
        stem: str = "cifar",
        *,
        dim_perhead: int = 8,
        drop: float = 0.0,
        classes: int = 10,
        image: int = 32,
    ) -> None:
        super().__init__(stem, width)
        stages = self.blocks(
            lambda inplanes, planes, stride, _: LinearBlock(
                inplanes, planes, stride, dim_perhead, drop
            ),
            depths,
        )
        self.stages = nn.ModuleList([nn.ModuleList(stage) for stage in stages])
        self.add_head(stages[-1][-1].channels, classes, image, len(stages))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            s: Tensor | float = 0.0
            z: Tensor | float = 0.0
            for block in stage:
                x, s, z = block(x, s, z)
        return self.head(x)
