"""The pieces of a residual network with layer attention: residual blocks, and what stands after each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ela_kernels.modules import (
    ELA,
    ConcatHistory,
    ConcatLayerAttention,
    LayerAttention,
    LightLayerAttention,
)
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.norms import normed
from ela_kernels.modules.parts import made_part
from ela_kernels.modules.residual import light_residual_block, residual_block
from ela_kernels.modules.skipping import SkipMode
from ela_kernels.modules.tokens import Grid, TakesTokens, joined
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.light_layer_attention.history import PreviousOutput
from ela_kernels.ops.traced import is_traced, traced_call

NormLayer = Callable[[int], nn.Module]
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
    """Two 3x3 convolutions around a shortcut (arXiv 1512.03385).

    Args:
        inputs: channels of the map that comes in.
        width: channels of the convolutions.
        stride: of the first convolution, and of the shortcut.
        gives_shortcut: forward gives `(output, shortcut)`: what stands after the block wants both.
    """

    expansion = 1
    gives_shortcut = False  # of blocks that were pickled before there was a choice

    def __init__(self, inputs: int, width: int, stride: int, gives_shortcut: bool = False) -> None:
        super().__init__()
        self.gives_shortcut = gives_shortcut
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm that ends the residual branch."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut: Tensor = self.downsample(x)
        out: Tensor = self.relu(y + shortcut)
        return (out, shortcut) if self.gives_shortcut else out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, the stride in the 3x3 (arXiv 1512.03385).

    Arguments as :class:`BasicBlock`; the output has four times `width` channels.
    """

    expansion = 4
    gives_shortcut = False

    def __init__(self, inputs: int, width: int, stride: int, gives_shortcut: bool = False) -> None:
        super().__init__()
        self.gives_shortcut = gives_shortcut
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm that ends the residual branch."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut: Tensor = self.downsample(x)
        out: Tensor = self.relu(y + shortcut)
        return (out, shortcut) if self.gives_shortcut else out


def _activation(relu: bool) -> nn.Module:
    return nn.ReLU(inplace=True) if relu else nn.Identity()


class MRLA(TakesTokens, nn.Module):
    """`x + drop_path(act(norm(o)))`, o from the base form of layer attention; never skipped.

    Parameters and their names are those of :class:`ela_kernels.ELA`, which loads this block's state, and so are the
    arguments `norm_layer`, `prefix_tokens` and `grid`. `act` is a ReLU, as published, or nothing.

    Source:
        MRLA (arXiv 2302.03985), the block form in a residual network.
    """

    def __init__(
        self,
        attn: LayerAttention | ConcatLayerAttention,
        drop_path: float,
        relu: bool = True,
        norm_layer: NormLayer = nn.BatchNorm2d,
        prefix_tokens: int = 0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self._take_tokens(prefix_tokens, grid)
        self.attn = attn
        self.norm = made_part("norm_layer", norm_layer, attn.dim)
        self.act = _activation(relu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, history: LayerHistory | ConcatHistory) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == 3:
            first, patches = self._split(x, self.attn.dim)
            return joined(first, self._run(patches, history))
        return self._run(x, history)

    def _run(self, x: Tensor, history: LayerHistory | ConcatHistory) -> Tensor:
        if isinstance(history, LayerHistory):
            if type(x) is not Tensor and is_traced(x):
                return traced_call(self, x, history)
            return residual_block(self.attn, self.norm, self.act, self.drop_path, x, history)
        out: Tensor = x + self.drop_path(self.act(normed(self.norm, self.attn(x, history))))
        return out


class MRLALight(TakesTokens, nn.Module):
    """`x + drop_path(act(norm(o)))`, o from the light form of layer attention; other arguments as :class:`MRLA`.

    As published there is no `act`, and the o of the layer before is the shortcut of the residual block whose output x
    is. Ours has a ReLU and the o that the layer before gave, for the stage's first layer the map that enters it.

    Source:
        MRLA (arXiv 2302.03985), the light form.
    """

    def __init__(
        self,
        attn: LightLayerAttention,
        drop_path: float,
        relu: bool = True,
        norm_layer: NormLayer = nn.BatchNorm2d,
        prefix_tokens: int = 0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self._take_tokens(prefix_tokens, grid)
        self.attn = attn
        self.norm = made_part("norm_layer", norm_layer, attn.dim)
        self.act = _activation(relu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, previous: PreviousOutput | Tensor) -> Tensor:
        """The block's output; `previous`: the o of the layer before, or what keeps it between the stage's layers."""
        if not isinstance(x, Tensor) or x.dim() != 3:
            return self._run(x, previous)
        first, patches = self._split(x, self.attn.dim)
        if isinstance(previous, Tensor) and previous.dim() == 3:
            if previous.shape != x.shape:
                raise ValueError(
                    f"previous: got shape {list(previous.shape)}; allowed is that of x, {list(x.shape)}"
                )
            previous = self._split(previous, self.attn.dim)[1]
        return joined(first, self._run(patches, previous))

    def _run(self, x: Tensor, previous: PreviousOutput | Tensor) -> Tensor:
        if type(x) is not Tensor and is_traced(x):
            return traced_call(self, x, previous)
        kept = previous if isinstance(previous, PreviousOutput) else None
        prev_out = previous if kept is None else kept.find(self, x)
        assert isinstance(prev_out, Tensor)
        result, out = light_residual_block(
            self.attn, self.norm, self.act, self.drop_path, x, prev_out
        )
        if kept is not None:
            kept.leave(out)
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
        relu: whether a ReLU stands after each norm.
        takes_shortcut: each layer is given the shortcut of its residual block instead of a history.
        history_dtype: `dtype` of the history.
        tolerance: of the history.
        norm_layer, prefix_tokens, grid: of each layer, as of :class:`ela_kernels.ELA`.
    """

    # Of stages that were pickled before there was a choice.
    takes_shortcut = False
    history_dtype: torch.dtype | None = None
    tolerance = 0.0

    def __init__(
        self,
        kind: Attention,
        dim: int,
        drop_paths: list[float],
        head_dim: int,
        fused: bool,
        skip: SkipMode,
        relu: bool = True,
        takes_shortcut: bool = False,
        history_dtype: torch.dtype | None = None,
        tolerance: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        prefix_tokens: int = 0,
        grid: Grid | None = None,
    ) -> None:
        layers: list[nn.Module] = []
        act = nn.ReLU if relu else nn.Identity
        for drop_path in drop_paths:
            if kind == "ela":
                layers.append(
                    ELA(
                        dim,
                        head_dim,
                        norm_layer=norm_layer,
                        act_layer=act,
                        drop_path=drop_path,
                        skip=skip,
                        prefix_tokens=prefix_tokens,
                        grid=grid,
                    )
                )
                continue
            of_block = (drop_path, relu, norm_layer, prefix_tokens, grid)
            if kind == "mrla_light":
                layers.append(MRLALight(LightLayerAttention(dim, head_dim), *of_block))
            else:
                attention = LayerAttention if fused else ConcatLayerAttention
                layers.append(MRLA(attention(dim, head_dim), *of_block))
        super().__init__(layers)
        self.kind, self.fused, self.takes_shortcut = kind, fused, takes_shortcut
        self.history_dtype, self.tolerance = history_dtype, tolerance

    def new_history(self) -> History | None:
        """What the layers of the stage share in one forward pass; None where they share nothing."""
        if self.takes_shortcut:
            return None
        if self.kind == "mrla_light":
            return PreviousOutput()
        concatenates = any(isinstance(m, ConcatLayerAttention) for m in self.modules())
        if concatenates:
            return ConcatHistory()
        return LayerHistory(dtype=self.history_dtype, tolerance=self.tolerance)


def run_block(
    block: nn.Module, layer: nn.Module | None, x: Tensor, history: Any, copy: bool
) -> Tensor:
    """A block, then the layer after it; `history` is what its stage shares, `copy` as of :class:`ELA`'s forward."""
    given: Any = block(x)
    if isinstance(given, tuple):  # the shortcut stands for the layer before
        x, history = given
    else:
        x = given
    if layer is None:
        return x
    # Nothing between the blocks changes a map in place that anybody else may have.
    out: Tensor = layer(x, history, copy=copy) if isinstance(layer, ELA) else layer(x, history)
    return out


def initialise(model: nn.Module, all_maps: bool = False, zero_last_norm: bool = False) -> None:
    """Kaiming initialisation of the residual network's own convolutions; attention layers keep theirs.

    Args:
        model: the network.
        all_maps: of the 3x3 filters of attention layers too.
        zero_last_norm: a residual branch begins with nothing, by the scale of its last norm.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and (all_maps or module.groups == 1):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_last_norm and isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.zeros_(module.last_norm.weight)


def begin_as_identity(stages: nn.ModuleList) -> None:
    """Set the scale of each attention layer's norm to zero: with nothing but the sum after it, the layer gives x.

    The scale has a gradient at once, and the attention has one as soon as the scale is not zero. With a ReLU after the
    norm neither would ever have any, since its derivative at zero is zero.
    """
    for stage in stages:
        assert isinstance(stage, StageAttention)
        for layer in stage:
            assert isinstance(layer.act, nn.Identity)
            assert isinstance(layer.norm, nn.Module)
            scale = getattr(layer.norm, "weight", None)
            if not isinstance(scale, nn.Parameter):
                raise ValueError(
                    f"norm_layer: got one that makes {type(layer.norm).__name__} without a scale, with "
                    "identity_init=True, which sets it to zero; allowed is a norm with parameters"
                )
            nn.init.zeros_(scale)


__all__ = [
    "ATTENTIONS",
    "Attention",
    "BasicBlock",
    "Bottleneck",
    "NormLayer",
    "StageAttention",
    "begin_as_identity",
    "initialise",
    "run_block",
]
