"""Residual networks with layer attention after every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ela_kernels.models.blocks import (
    ATTENTIONS,
    Attention,
    BasicBlock,
    Bottleneck,
    StageAttention,
    begin_as_identity,
    initialise,
    run_block,
)
from ela_kernels.models.options import (
    HEAD_DIM,
    check_head_dim,
    check_history_options,
    check_identity_init,
)
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.query_key_value import check_count
from ela_kernels.modules.skipping import SkipMode, check_skip

Block = Literal["basic", "bottleneck"]
Stem = Literal["small", "imagenet", "deep"]
Variant = Literal["ours", "published"]
BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}
PUBLISHED_HEAD_DIM = 32  # of the light form, and of bottlenecks for small images


class ResNet(nn.Module):
    """A residual network whose blocks each query all earlier blocks of their stage.

    After every residual block stands an attention layer, `x <- x + drop_path(act(bn(o)))`, with one history for each
    stage and forward pass. With `attention="none"` it is the plain residual network.

    There are two variants of it. `"ours"` is our definition: all forms of attention stand in the same network, so that
    they compare. `"published"` is each form in the network that it was published in:

    =======================  ======================  ===========================  ==================================
    .                        `"ours"`                `"published"`, base form     `"published"`, light form
    =======================  ======================  ===========================  ==================================
    `act`                    ReLU                    ReLU                         none
    o of the layer before    what that layer gave;   (all layers of the stage)    the shortcut of the residual block
                             first the stage's map
    `head_dim`               16                      16                           32
    `head_dim`, small stem   16                      32; 16 with basic blocks     32; 16 with basic blocks
    `stem`, large images     `"imagenet"`            `"deep"`                     `"imagenet"`
    `drop_path`              grows with depth        the same for all layers      the same for all layers
    last norm of a branch    scale 1                 scale 0 (small stem: 1)      scale 0 (small stem: 1)
    filters `Wv`             PyTorch's initial ones  Kaiming's                    Kaiming's
    =======================  ======================  ===========================  ==================================

    The base form is `"mrla"`. `"ela"` with `variant="published"` is its network, with layers that can be skipped, and
    `"none"` the plain one that they were compared with. Of large images bottlenecks are published; basic blocks follow
    the same rules.

    Args:
        blocks: number of residual blocks of each stage.
        widths: width of each stage; a bottleneck's output has four times as many channels.
        block: `"basic"` or `"bottleneck"`.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        attention: `"none"`, `"mrla"`, `"mrla_light"` or `"ela"`; :class:`ela_kernels.EBQM` then finds what to skip.
        fused: False takes the published, concatenating modules instead of the kernels; for `"mrla"` only.
        head_dim: channels of a head; by the table if None, and never more than a stage has channels.
        drop_path: probability of dropping a retrieval in training: of the last layer, from 0 at the first and growing
            linearly between them, or of every layer where the variant is the published one.
        skip: what a skipped ELA layer leaves out, `"reuse"`, `"retrieval"` or `"layer"`.
        stem: `"small"` (one 3x3 convolution, for images of some tens of pixels), `"imagenet"` (7x7, then pooling) or
            `"deep"` (three 3x3, the first with stride 2, then pooling); by the table if None.
        features_only: forward gives the list of the stages' last maps; there is no classifier.
        checkpointing: recompute each block and its attention in the backward pass instead of keeping their
            intermediate maps. Running statistics of batch norms are then updated twice a step.
        variant: `"ours"` or `"published"`.
        identity_init: every attention layer gives its input at first, so that attention put into a trained network
            changes nothing before the first step. Our definition: the scale of its norm starts at 0, and `act` is left
            out in all forms, since behind a ReLU a scale of 0 would never have a gradient. It costs nothing: the same
            kernels serve. A model is built with the same value again to load a checkpoint of its own.
        history_dtype: `torch.bfloat16` or `torch.float16`: values are rounded to it, and held in it where kernels can
            read them so (`dtype` of :class:`ela_kernels.LayerHistory`); for `"mrla"` and `"ela"`, fused. No part of a
            checkpoint.
        tolerance: retrievals of a smaller weight are left out (`tolerance` of :class:`ela_kernels.LayerHistory`); for
            `"mrla"` and `"ela"`, fused. No part of a checkpoint.

    Shapes:
        Images `[B, in_chans, H, W]` to scores `[B, num_classes]`, or to a list of maps.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        ResNet (arXiv 1512.03385); layer attention in it as MRLA (arXiv 2302.03985), whose published networks are
        `variant="published"`, those for small images as published with DLA (arXiv 2406.13392); ELA (arXiv 2503.06473).
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
        skip: SkipMode = "reuse",
        stem: Stem | None = None,
        features_only: bool = False,
        checkpointing: bool = False,
        variant: Variant = "ours",
        identity_init: bool = False,
        history_dtype: torch.dtype | None = None,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        published = variant == "published"
        if stem is None:
            stem = "deep" if published and attention in ("mrla", "ela") else "imagenet"
        _check(blocks, widths, block, attention, fused, stem, variant, identity_init)
        check_count("num_classes", num_classes)
        check_count("in_chans", in_chans)
        kind, is_light = BLOCKS[block], attention == "mrla_light"
        head_size = HEAD_DIM
        if published and (is_light if stem != "small" else block == "bottleneck"):
            head_size = PUBLISHED_HEAD_DIM
        head_size = check_head_dim(
            head_dim, head_size, [width * kind.expansion for width in widths], attention
        )
        DropPath(drop_path)  # its checks, before the value is spread over the layers
        check_skip(skip)
        check_history_options(history_dtype, tolerance, attention, fused)
        if checkpointing and not fused:
            raise ValueError(
                "checkpointing: got True with fused=False; the concatenating modules cannot be recomputed. Allowed is "
                "fused=True"
            )
        channels = widths[0] if stem == "small" else 64
        self.stem = _stem(stem, in_chans, channels)
        self.stages = nn.ModuleList()
        self.attentions = nn.ModuleList()
        total, done = sum(blocks), 0
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.ModuleList()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(kind(channels, width, stride, gives_shortcut=published and is_light))
                channels = width * kind.expansion
            self.stages.append(stage)
            if attention != "none":
                rates = [drop_path * (done + j) / max(total - 1, 1) for j in range(count)]
                layers = StageAttention(
                    attention,
                    channels,
                    [drop_path] * count if published else rates,
                    min(head_size, channels),
                    fused,
                    skip,
                    relu=not identity_init and not (published and is_light),
                    takes_shortcut=published and is_light,
                    history_dtype=history_dtype,
                    tolerance=tolerance,
                )
                self.attentions.append(layers)
            done += count
        self.num_features = channels
        self.features_only = features_only
        self.checkpointing = checkpointing
        self.head = None if features_only else nn.Linear(channels, num_classes)
        initialise(self, all_maps=published, zero_last_norm=published and stem != "small")
        if identity_init:
            begin_as_identity(self.attentions)

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
                    x = checkpoint(run_block, block, layer, x, history, copy, use_reentrant=False)
                else:
                    x = run_block(block, layer, x, history, copy)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores, or the stages' maps with `features_only`."""
        maps = self.forward_features(x)
        if self.head is None:
            return maps
        scores: Tensor = self.head(maps[-1].mean((2, 3)))
        return scores


def _stem(kind: Stem, in_chans: int, width: int) -> nn.Sequential:
    """Convolutions with a norm and a ReLU each; pooling after them for large images."""
    # Outputs, size and stride of each.
    convolutions = {
        "small": [(width, 3, 1)],
        "imagenet": [(width, 7, 2)],
        "deep": [(width // 2, 3, 2), (width // 2, 3, 1), (width, 3, 1)],
    }[kind]
    layers: list[nn.Module] = []
    for outputs, size, stride in convolutions:
        conv = nn.Conv2d(in_chans, outputs, size, stride=stride, padding=size // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        in_chans = outputs
    if kind != "small":
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers)


def _check(
    blocks: Sequence[int],
    widths: Sequence[int],
    block: str,
    attention: str,
    fused: bool,
    stem: str,
    variant: str,
    identity_init: bool,
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
        ("block", block, tuple(BLOCKS)),
        ("attention", attention, ATTENTIONS),
        ("stem", stem, get_args(Stem)),
        ("variant", variant, get_args(Variant)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}")
    if not fused and attention != "mrla":
        raise ValueError(
            f"fused: got False with attention={attention!r}; allowed is False with 'mrla' only, which has a published, "
            "concatenating form here"
        )
    check_identity_init(identity_init, attention)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
