"""Dynamic layer attention: a recurrent cell rescales what earlier layers left; attention stands outside the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.published.filters import StackedAttention
from benchmarks.published.parts import ResNet, Trunk, drop_path
from benchmarks.published.resnet_base import BaseCell
from benchmarks.published.resnet_light import LightCell

State = tuple[Tensor, Tensor]


class Gates(nn.Module):
    """Three gates from one vector, through a part of its channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, 3 * channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class SharingCell(nn.Module):
    """One step of a cell like an LSTM's, whose hidden state is the sigmoid of its memory."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.w_ih = nn.ModuleList([Gates(channels, reduction)])
        self.w_hh = nn.ModuleList([Gates(channels, reduction)])
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor, state: State) -> State:
        hidden, memory = state[0][0], state[1][0]
        entering, staying, candidate = (self.w_ih[0](x) + self.w_hh[0](hidden)).chunk(3, 1)
        memory = staying.sigmoid() * memory + entering.sigmoid() * candidate.tanh()
        hidden = memory.sigmoid()
        self.dropout(
            hidden
        )  # published so: numbers are drawn, and what they make is used by nobody
        return hidden.unsqueeze(0), memory.unsqueeze(0)

    def scale(self, x: Tensor, state: State) -> Tensor:
        """`[B, C]`: by what a thing with these means `[B, C]` is multiplied."""
        # Published so: without the leading dimension, the cell takes the first sample's state for all of them.
        return self(x, (state[0][-1], state[1][-1]))[0][-1]


class ApartBlock(Trunk):
    """A residual block without attention. `both`: gives its shortcut as well."""

    def __init__(self, inplanes: int, planes: int, stride: int, both: bool) -> None:
        super().__init__(inplanes, planes, stride)
        self.both = both

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.residual(x) if self.both else self.residual(x)[0]


class BaseAttention(nn.Module):
    """Base form, norm, ReLU and drop path, apart from the block."""

    def __init__(self, channels: int, dim_perhead: int, init_cell: bool, drop: float) -> None:
        super().__init__()
        attention = StackedAttention(channels, dim_perhead, init_cell)
        self.layer_attention = BaseCell(attention, "layer_attention")
        self.bn_layer_attention = nn.BatchNorm2d(channels)
        self.drop_path = drop_path(drop)
        self.relu = nn.ReLU()

    def forward(
        self, out: Tensor, prev_k: Tensor | None, prev_v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn, k, v = self.layer_attention(out, prev_k, prev_v)
        attn = self.relu(self.bn_layer_attention(attn))
        return out + self.drop_path(attn), k, v


class BaseStage(nn.Module):
    """Blocks and attentions in turn; between them every earlier key and value is multiplied by a scale of its own."""

    def __init__(self, layers: list[Trunk], attention: list[nn.Module], reduction: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.attention = nn.Sequential(*attention)
        self.lstm = SharingCell(layers[0].channels, reduction)
        self.GlobalAvg = nn.AdaptiveAvgPool2d((1, 1))
        self.GlobalAvg1 = nn.AdaptiveAvgPool2d((1, 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        k: Tensor | None = None
        v: Tensor | None = None
        state: State | None = None
        for layer, attention in zip(self.layers, self.attention, strict=True):
            x = layer(x)
            means = self.GlobalAvg(x).flatten(1)
            state = self.lstm(means, state or _zeros(means))
            if k is not None and v is not None:
                k, v = self.rescaled(k, v, state)
            x, k, v = attention(x, k, v)
        return x

    def rescaled(self, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Keys and values of the layers so far, one at a time."""
        keys, values = [], []
        for i in range(k.shape[1]):
            key, value = k[:, i], v[:, i]
            keys.append((key * self.lstm.scale(key, state)).unsqueeze(1))
            means = self.GlobalAvg1(value).flatten(1)
            scale = self.lstm.scale(means, state)
            values.append((value * scale[:, :, None, None]).unsqueeze(1))
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


class LightApart(nn.Module):
    """Light form, norm and drop path, apart from the block. `child`: the attention layer's name."""

    def __init__(self, channels: int, dim_perhead: int, drop: float, child: str) -> None:
        super().__init__()
        self.layer_attention = LightCell(channels, dim_perhead, child)
        self.bn_layer_attention = nn.BatchNorm2d(channels)
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        attn = self.layer_attention(x, residual)
        return x + self.drop_path(self.bn_layer_attention(attn))


class LightStage(nn.Module):
    """Blocks and attentions in turn; the shortcut is rescaled and filtered before it reaches the attention."""

    def __init__(
        self, layers: list[Trunk], attention: list[nn.Module], reduction: int, filters: str
    ) -> None:
        super().__init__()
        channels, self.filters = layers[0].channels, filters
        self.layers = nn.Sequential(*layers)
        self.attention = nn.Sequential(*attention)
        self.lstm = SharingCell(channels, reduction)
        self.GlobalAvg = nn.AdaptiveAvgPool2d((1, 1))
        self.GlobalAvg1 = nn.AdaptiveAvgPool2d((1, 1))
        self.add_module(
            filters, nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        state: State | None = None
        for layer, attention in zip(self.layers, self.attention, strict=True):
            x, shortcut = layer(x)
            means = self.GlobalAvg(x).flatten(1)
            state = self.lstm(means, state or _zeros(means))
            scale = self.lstm.scale(self.GlobalAvg1(shortcut).flatten(1), state)
            filtered = getattr(self, self.filters)(shortcut)
            x = attention(x, shortcut * scale[:, :, None, None] + filtered)
        return x


def _zeros(means: Tensor) -> State:
    zeros = torch.zeros_like(means).unsqueeze(0)
    return zeros, zeros


class DLAResNet(ResNet):
    """Stages of dynamic layer attention. `form`: "base" or "light"; `names`: of the light layer and the filters."""

    def __init__(
        self,
        form: str,
        depths: Sequence[int],
        width: int = 16,
        stem: str = "cifar",
        *,
        dim_perhead: int = 32,
        drop: float = 0.0,
        classes: int = 10,
        image: int = 32,
        reduction: int = 4,
        names: tuple[str, str] = ("layer_attention", "excite"),
    ) -> None:
        super().__init__(stem, width)
        light = form == "light"
        stages: list[nn.Module] = []
        channels = width
        for blocks in self.blocks(
            lambda inplanes, planes, stride, _: ApartBlock(inplanes, planes, stride, light), depths
        ):
            channels = blocks[0].channels
            attention: list[nn.Module] = []
            for j in range(len(blocks)):
                if light:
                    attention.append(LightApart(channels, dim_perhead, drop, names[0]))
                else:
                    attention.append(BaseAttention(channels, dim_perhead, j == 0, drop))
            if light:
                stages.append(LightStage(blocks, attention, reduction, names[1]))
            else:
                stages.append(BaseStage(blocks, attention, reduction))
        if stem == "cifar":
            self.stages = nn.ModuleList(stages)
        else:
            for i, stage in enumerate(stages, 1):
                setattr(self, f"layer{i}", stage)
        self.count = len(stages)
        self.add_head(channels, classes, image, len(stages))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(self.count):
            x = self.stages[i](x) if hasattr(self, "stages") else getattr(self, f"layer{i + 1}")(x)
        return self.head(x)
