"""The pieces of a residual network with layer attention: residual blocks, and what stands after each of them."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from ela_kernels.modules import (
    ELA,
    ConcatHistory,
    ConcatLayerAttention,
    LayerAttention,
    LightLayerAttention,
)
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.residual import light_residual_block, residual_block
from ela_kernels.modules.skipping import SkipMode
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

Attention = Literal["none", "mrla", "mrla_light", "ela"]
ATTENTIONS: tuple[str, ...] = get_args(Attention)


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (arXiv 1512.03385)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, the stride in the 3x3 (arXiv 1512.03385)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        out: Tensor = self.relu(self.bn3(self.conv3(y)) + self.downsample(x))
        return out


class MRLA(nn.Module):
    """`x + drop_path(relu(bn(o)))`, o from the base form of layer attention; never skipped.

    Parameters and their names are those of :class:`ela_kernels.ELA`, which loads this block's state.

    Source:
        MRLA (arXiv 2302.03985), the block form in a residual network.
    """

    def __init__(self, attn: LayerAttention | ConcatLayerAttention, drop_path: float) -> None:
        super().__init__()
        self.attn = attn
        self.norm = nn.BatchNorm2d(attn.dim)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, history: LayerHistory | ConcatHistory) -> Tensor:
        if isinstance(history, LayerHistory):
            return residual_block(self.attn, self.norm, self.act, self.drop_path, x, history)
        out: Tensor = x + self.drop_path(self.act(self.norm(self.attn(x, history))))
        return out


class MRLALight(nn.Module):
    """`x + drop_path(relu(bn(o)))`, o from the light form of layer attention.

    Source:
        MRLA (arXiv 2302.03985), the light form. Its o_0 is our choice: the map that enters the stage's first layer.
    """

    def __init__(self, attn: LightLayerAttention, drop_path: float) -> None:
        super().__init__()
        self.attn = attn
        self.norm = nn.BatchNorm2d(attn.dim)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, previous: PreviousOutput) -> Tensor:
        result, out = light_residual_block(
            self.attn, self.norm, self.act, self.drop_path, x, previous.find(self, x)
        )
        previous.leave(out)
        return result


History = LayerHistory | ConcatHistory | PreviousOutput


class StageAttention(nn.ModuleList):
    """The attention layers of one stage, one after each residual block, and the history they share.

    Args:
        kind: `"mrla"`, `"mrla_light"` or `"ela"`.
        dim: channels of the stage.
        drop_paths: probability of dropping for each layer; their number is the number of layers.
        head_dim: channels of a head.
        fused: False takes the concatenating modules (`"mrla"` only).
        skip: skip mode of ELA layers.
    """

    def __init__(
        self,
        kind: Attention,
        dim: int,
        drop_paths: list[float],
        head_dim: int,
        fused: bool,
        skip: SkipMode,
    ) -> None:
        layers: list[nn.Module] = []
        for drop_path in drop_paths:
            if kind == "ela":
                layers.append(ELA(dim, head_dim, drop_path=drop_path, skip=skip))
            elif kind == "mrla_light":
                layers.append(MRLALight(LightLayerAttention(dim, head_dim), drop_path))
            else:
                attention = LayerAttention if fused else ConcatLayerAttention
                layers.append(MRLA(attention(dim, head_dim), drop_path))
        super().__init__(layers)
        self.kind, self.fused = kind, fused

    def new_history(self) -> History:
        """What the layers of the stage share in one forward pass."""
        if self.kind == "mrla_light":
            return PreviousOutput()
        concatenates = any(isinstance(m, ConcatLayerAttention) for m in self.modules())
        return ConcatHistory() if concatenates else LayerHistory()


def initialise(model: nn.Module) -> None:
    """Kaiming initialisation of the residual network's own convolutions; attention layers keep theirs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


__all__ = ["ATTENTIONS", "Attention", "BasicBlock", "Bottleneck", "StageAttention", "initialise"]
