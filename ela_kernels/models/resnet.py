"""Residual networks with layer attention after every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ela_kernels.models.blocks import (
    ATTENTIONS,
    Attention,
    BasicBlock,
    Bottleneck,
    StageAttention,
    initialise,
)
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.query_key_value import check_count
from ela_kernels.modules.skipping import SkipMode, check_skip

Block = Literal["basic", "bottleneck"]
_BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}
HEAD_DIM = 16


class ResNet(nn.Module):
    """A residual network whose blocks each query all earlier blocks of their stage.

    After every residual block stands an attention layer, `x <- x + drop_path(relu(bn(o)))`, with one history for each
    stage and forward pass. With `attention="none"` it is the plain residual network.

    Args:
        blocks: number of residual blocks of each stage.
        widths: width of each stage; a bottleneck's output has four times as many channels.
        block: `"basic"` or `"bottleneck"`.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        attention: `"none"`, `"mrla"`, `"mrla_light"` or `"ela"`; :class:`ela_kernels.EBQM` then finds what to skip.
        fused: False takes the published, concatenating modules instead of the kernels; for `"mrla"` only.
        head_dim: channels of a head; 16 if None, and never more than a stage has channels.
        drop_path: probability of dropping a retrieval in training, growing linearly from 0 at the first layer to this
            value at the last.
        skip: what a skipped ELA layer leaves out, `"retrieval"` or `"layer"`.
        stem: `"small"` (one 3x3 convolution, for images of some tens of pixels) or `"imagenet"` (7x7, then pooling).
        features_only: forward gives the list of the stages' last maps; there is no classifier.
        checkpointing: recompute each block and its attention in the backward pass instead of keeping their
            intermediate maps. Running statistics of batch norms are then updated twice a step.

    Shapes:
        Images `[B, in_chans, H, W]` to scores `[B, num_classes]`, or to a list of maps.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        ResNet (arXiv 1512.03385); layer attention in it as MRLA (arXiv 2302.03985); ELA (arXiv 2503.06473).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        block: Block = "bottleneck",
        num_classes: int = 1000,
        in_chans: int = 3,
        attention: Attention = "none",
        fused: bool = True,
        head_dim: int | None = None,
        drop_path: float = 0.0,
        skip: SkipMode = "retrieval",
        stem: Literal["small", "imagenet"] = "imagenet",
        features_only: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check(blocks, widths, block, attention, fused, stem)
        check_count("num_classes", num_classes)
        check_count("in_chans", in_chans)
        _check_head_dim(head_dim, [width * _BLOCKS[block].expansion for width in widths], attention)
        DropPath(drop_path)  # its checks, before the value is spread over the layers
        check_skip(skip)
        if checkpointing and not fused:
            raise ValueError(
                "checkpointing: got True with fused=False; the concatenating modules cannot be recomputed. Allowed is "
                "fused=True"
            )
        kind = _BLOCKS[block]
        channels = widths[0] if stem == "small" else 64
        self.stem = _small_stem(in_chans, channels) if stem == "small" else _imagenet_stem(in_chans)
        self.stages = nn.ModuleList()
        self.attentions = nn.ModuleList()
        total, done = sum(blocks), 0
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.ModuleList()
            for j in range(count):
                stage.append(kind(channels, width, stride=2 if i > 0 and j == 0 else 1))
                channels = width * kind.expansion
            self.stages.append(stage)
            if attention != "none":
                rates = [drop_path * (done + j) / max(total - 1, 1) for j in range(count)]
                size = min(HEAD_DIM if head_dim is None else head_dim, channels)
                self.attentions.append(
                    StageAttention(attention, channels, rates, size, fused, skip)
                )
            done += count
        self.num_features = channels
        self.features_only = features_only
        self.checkpointing = checkpointing
        self.head = None if features_only else nn.Linear(channels, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The last map of every stage, `[B, C, H, W]` each."""
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            attention = self.attentions[i] if len(self.attentions) else None
            history = attention.new_history() if isinstance(attention, StageAttention) else None
            assert isinstance(stage, nn.ModuleList)
            for j, block in enumerate(stage):
                layer = attention[j] if isinstance(attention, StageAttention) else None
                # What is given away may be changed in place.
                copy = self.features_only and j == len(stage) - 1
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(_run_block, block, layer, x, history, copy, use_reentrant=False)
                else:
                    x = _run_block(block, layer, x, history, copy)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores, or the stages' maps with `features_only`."""
        maps = self.forward_features(x)
        if self.head is None:
            return maps
        scores: Tensor = self.head(maps[-1].mean((2, 3)))
        return scores


def _run_block(
    block: nn.Module, layer: nn.Module | None, x: Tensor, history: Any, copy: bool
) -> Tensor:
    x = block(x)
    if layer is None:
        return x
    # Nothing between the blocks changes a map in place that anybody else may have.
    out: Tensor = layer(x, history, copy=copy) if isinstance(layer, ELA) else layer(x, history)
    return out


def _small_stem(in_chans: int, width: int) -> nn.Module:
    conv = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _imagenet_stem(in_chans: int) -> nn.Module:
    conv = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(
        conv, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
    )


def _check(
    blocks: Sequence[int],
    widths: Sequence[int],
    block: str,
    attention: str,
    fused: bool,
    stem: str,
) -> None:
    sequences = all(isinstance(s, Sequence) and not isinstance(s, str) for s in (blocks, widths))
    if not sequences or not all(_is_count(n) for s in (blocks, widths) for n in s):
        raise TypeError(
            f"blocks, widths: got {blocks!r} and {widths!r}; allowed are two sequences of positive ints"
        )
    if len(blocks) != len(widths) or not blocks or min(*blocks, *widths) < 1:
        raise ValueError(
            f"blocks, widths: got {list(blocks)} and {list(widths)}; allowed are two sequences of one "
            "length, of positive ints"
        )
    for name, value, allowed in (
        ("block", block, tuple(_BLOCKS)),
        ("attention", attention, ATTENTIONS),
        ("stem", stem, ("small", "imagenet")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}")
    if not fused and attention != "mrla":
        raise ValueError(
            f"fused: got False with attention={attention!r}; allowed is False with 'mrla' only, which has a published, "
            "concatenating form here"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_head_dim(head_dim: int | None, channels: Sequence[int], attention: str) -> None:
    """Refuse by what was given: each stage takes the lesser of it and its own number of channels."""
    size = HEAD_DIM if head_dim is None else check_count("head_dim", head_dim)
    if attention != "none" and any(count % min(size, count) for count in channels):
        got = f"None, which is {HEAD_DIM}" if head_dim is None else str(head_dim)
        raise ValueError(
            f"head_dim: got {got}, for stages of {', '.join(map(str, channels))} channels; allowed is a divisor of "
            "each stage's channels, or a number that is larger than they are"
        )


def CifarResNet(  # noqa: N802 - makes a ResNet, and reads as one
    blocks: Sequence[int] = (3, 3, 3),
    widths: Sequence[int] = (16, 32, 64),
    block: Block = "basic",
    num_classes: int = 10,
    **options: Any,
) -> ResNet:
    """A residual network for small images, of any depth; options as :class:`ResNet`."""
    return ResNet(blocks, widths, block, num_classes, stem="small", **options)


def _cifar(depth: int) -> Callable[..., ResNet]:
    def make(num_classes: int = 10, block: Block = "basic", **options: Any) -> ResNet:
        if block not in _BLOCKS:
            raise ValueError(f"block: got {block!r}; allowed are {', '.join(map(repr, _BLOCKS))}")
        convolutions = 2 if block == "basic" else 3
        count, rest = divmod(depth - 2, 3 * convolutions)
        if rest:
            raise ValueError(
                f"block: got {block!r} for resnet{depth}; allowed is a block whose {convolutions} convolutions make up "
                f"{depth - 2} layers in 3 equal stages"
            )
        return CifarResNet((count,) * 3, (16, 32, 64), block, num_classes, **options)

    make.__name__ = make.__qualname__ = f"resnet{depth}"
    make.__doc__ = f"""ResNet-{depth} for 32x32 images: 3 stages of widths 16, 32, 64; basic blocks, or bottlenecks.

    Args:
        num_classes: outputs of the classifier.
        block: `"basic"` or `"bottleneck"`{"" if (depth - 2) % 9 == 0 else " (not at this depth)"}.
        **options: as :class:`ResNet`.

    Source: ResNet (arXiv 1512.03385), section 4.2.
    """
    return make


def _imagenet(depth: int, blocks: tuple[int, ...]) -> Callable[..., ResNet]:
    def make(num_classes: int = 1000, **options: Any) -> ResNet:
        return ResNet(blocks, (64, 128, 256, 512), "bottleneck", num_classes, **options)

    make.__name__ = make.__qualname__ = f"resnet{depth}"
    make.__doc__ = f"""ResNet-{depth}: 4 stages of {blocks} bottlenecks, for images of about 224x224.

    Args:
        num_classes: outputs of the classifier.
        **options: as :class:`ResNet`.

    Source: ResNet (arXiv 1512.03385), table 1; the stride is in the 3x3 convolution.
    """
    return make


resnet20 = _cifar(20)
resnet32 = _cifar(32)
resnet56 = _cifar(56)
resnet110 = _cifar(110)
resnet50 = _imagenet(50, (3, 4, 6, 3))
resnet101 = _imagenet(101, (3, 4, 23, 3))

MODELS: dict[str, Callable[..., ResNet]] = {
    make.__name__: make for make in (resnet20, resnet32, resnet56, resnet110, resnet50, resnet101)
}


def build_model(name: str, **options: Any) -> ResNet:
    """A model by name, `"resnet20"` to `"resnet101"`; options as the function of that name.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"name: got {name!r}; allowed are {', '.join(MODELS)}")
    return MODELS[name](**options)
