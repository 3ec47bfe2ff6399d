"""Small networks, without any library, whose blocks get layers; and the same forward written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.integrations import attach
from ela_kernels.models.blocks import MRLA, MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

DIM = 8


class Block(nn.Module):
    """A residual block of a stage; the first of a stage may have a stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.bn = nn.BatchNorm2d(outputs)
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))) + self.shortcut(x)


class Network(nn.Module):
    """Two stages of three blocks, called one by one, with whatever `run` does around a call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 3, padding=1)
        self.first = nn.Sequential(*(Block(DIM, DIM) for _ in range(3)))
        self.second = nn.Sequential(
            Block(DIM, 2 * DIM, 2), *(Block(2 * DIM, 2 * DIM) for _ in "ab")
        )
        self.head = nn.Linear(2 * DIM, 5)
        self.run: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.first, *self.second):
            x = self.run(block, x)
        return self.head(x.mean((2, 3)))


STAGES = [[f"{stage}.{i}" for i in range(3)] for stage in ("first", "second")]


def layer_of(form: str, dim: int) -> nn.Module:
    if form == "ela":
        return ek.ELA(dim, 4)
    if form == "mrla":
        return MRLA(ek.LayerAttention(dim, 4), 0.0)
    return MRLALight(ek.LightLayerAttention(dim, 4), 0.0)


FORMS = ("ela", "mrla", "mrla_light")


def network(form: str = "ela", **options: object) -> Network:
    torch.manual_seed(3)
    model = Network()
    attach(
        model,
        STAGES,
        lambda name: layer_of(form, DIM if name.startswith("first") else 2 * DIM),
        **options,
    )
    return model.double()


def by_hand(model: Network, x: Tensor, **options: Any) -> Tensor:
    """The forward with an explicit history, of the blocks as they were written and the layers after them."""
    x = model.stem(x)
    for stage in (model.first, model.second):
        light = any(isinstance(m, MRLALight) for m in stage.modules())
        history = PreviousOutput() if light else ek.LayerHistory(**options)
        for block in stage:
            x = Block.forward(block, x)
            if hasattr(block, "ela"):
                x = block.ela(x, history)
    return model.head(x.mean((2, 3)))


def images(batch: int = 2, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=made)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def same(a: Any, b: Any) -> None:
    """Equal numbers, of tensors or of what holds them."""
    # float64, a few additions in another order: 1e-11 relative to numbers near 1 is far above their rounding, and far
    # below what a missing layer would change.
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def checkpointed(block: nn.Module, x: Any) -> Any:
    """How a network calls a block that is recomputed in the backward."""
    return checkpoint(block, x, use_reentrant=False)
