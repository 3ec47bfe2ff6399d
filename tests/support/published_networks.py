"""Residual networks written out in plain PyTorch, with the names and the structure that they were published with.

Plain ones as in torchvision and timm; those of MRLA (arXiv 2302.03985) in its base and its light form, for large images
and, as with DLA (arXiv 2406.13392), for small ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Form = Literal["none", "base", "light"]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Filters(nn.Module):
    """Query, key and value of a map, by heads."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        size = int((math.log2(channels) + 1) / 2)
        size += 1 - size % 2
        self.heads = channels // head_dim
        self.Wq = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wk = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        means = x.mean((2, 3))[:, None]
        made = self.Wq(means)[:, 0], self.Wk(means)[:, 0], self.Wv(x)
        return [t.unflatten(1, (self.heads, -1)) for t in made]


class Attention(nn.Module):
    """What retrieves: `mrla` holds the filters, and the light form its decay beside them."""

    def __init__(self, form: Form, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.mrla = Filters(channels, head_dim)
        if form == "light":
            self.lambda_t = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor, shortcut: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        q, k, v = self.mrla(x)
        if hasattr(self, "lambda_t"):
            gate = torch.sigmoid((q * k).sum(2) / self.head_dim**0.5)
            return (gate[..., None, None, None] * v).flatten(1, 2) + self.lambda_t * shortcut
        pairs.append((k, v))
        keys, values = (torch.stack(part) for part in zip(*pairs, strict=True))
        weights = torch.softmax((q * keys).sum(3) / self.head_dim**0.5, 0)
        return (weights[..., None, None, None] * values).sum(0).flatten(1, 2)


class Block(nn.Module):
    def __init__(
        self, form: Form, inputs: int, width: int, stride: int, basic: bool, head_dim: int
    ) -> None:
        super().__init__()
        outputs = width if basic else 4 * width
        self.convs = 2 if basic else 3
        sizes = (3, 3) if basic else (1, 3, 1)
        strides = (stride, 1) if basic else (1, stride, 1)
        widths = (inputs, width, outputs) if basic else (inputs, width, width, outputs)
        for i in range(self.convs):
            conv = convolution(widths[i], widths[i + 1], sizes[i], strides[i])
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.downsample = None
        if stride > 1 or inputs != outputs:
            shortcut = convolution(inputs, outputs, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        self.form = form
        if form != "none":
            self.mrla = Attention(form, outputs, head_dim)
            self.bn_mrla = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        y = x
        for i in range(1, self.convs + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.convs else y
        shortcut = x if self.downsample is None else self.downsample(x)
        out = (y + shortcut).relu()
        if self.form == "none":
            return out
        o = self.bn_mrla(self.mrla(out, shortcut, pairs))
        return out + (o.relu() if self.form == "base" else o)


class PublishedNetwork(nn.Module):
    """`layer1`, `layer2` ... of blocks, of the base form `stages.0`, `stages.1` ...; then `fc`."""

    def __init__(
        self,
        form: Form,
        blocks: Sequence[int],
        widths: Sequence[int],
        head_dim: int = 16,
        basic: bool = False,
        small: bool = False,
        classes: int = 5,
    ) -> None:
        super().__init__()
        inputs = widths[0] if small else 64
        self.small = small
        if small:
            self.conv1: nn.Module = convolution(3, inputs, 3)
        elif form == "base":
            steps = [(3, 32, 2), (32, 32, 1), (32, 64, 1)]
            layers: list[nn.Module] = []
            for before, after, stride in steps:
                layers += [convolution(before, after, 3, stride), nn.BatchNorm2d(after), nn.ReLU()]
            self.conv1 = nn.Sequential(*layers[:-2])  # the last norm is bn1
        else:
            self.conv1 = convolution(3, inputs, 7, 2)
        self.bn1 = nn.BatchNorm2d(inputs)
        made = []
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.ModuleList()
            for j in range(count):
                stride = 2 if i and not j else 1
                stage.append(Block(form, inputs, width, stride, basic, head_dim))
                inputs = width if basic else 4 * width
            made.append(stage)
        if form == "base":
            self.stages = nn.ModuleList(made)
        for i, stage in enumerate(made if form != "base" else []):
            self.add_module(f"layer{i + 1}", stage)
        self.names = [
            f"stages.{i}" if form == "base" else f"layer{i + 1}" for i in range(len(made))
        ]
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        if not self.small:
            x = nn.functional.max_pool2d(x, 3, 2, 1)
        for name in self.names:
            pairs: list[tuple[Tensor, Tensor]] = []
            for block in self.get_submodule(name).children():
                x = block(x, pairs)
        return self.fc(x.mean((2, 3)))


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with norms and statistics other than those that it starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.add_(noise if name.endswith("var") else noise - 0.5, alpha=0.5)
    return network


def state_of(network: nn.Module) -> OrderedDict[str, Tensor]:
    """Its tensors as copies: what is loaded must not be what it was loaded from."""
    return OrderedDict((name, tensor.clone()) for name, tensor in network.state_dict().items())
