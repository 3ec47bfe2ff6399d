"""Layers and blocks that are nearly what is converted: they are left, or keep their end, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_published import BaseBlock, Block, Layer
from torch import Tensor, nn

import ela_kernels as ek


class Truncated(Layer):
    """No gradients between layers."""

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        if prev_K is not None:
            prev_K, prev_V = prev_K.detach(), prev_V.detach()
        return super().forward(x, prev_K, prev_V)


class Windowed(Layer):
    """The last five layers."""

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        if prev_K is not None:
            prev_K, prev_V = prev_K[:, -4:], prev_V[:, -4:]
        return super().forward(x, prev_K, prev_V)


class Keeping(Layer):
    """Keeps its keys for a figure."""

    last: Any = None

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        out, k, v = super().forward(x, prev_K, prev_V)
        self.last = k.detach()
        return out, k, v


class Counting(Layer):
    """Has a statistic in a buffer."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        out, k, v = super().forward(x, prev_K, prev_V)
        self.mean.lerp_(out.detach().mean((0, 2, 3)), 0.1)
        return out, k, v


class Annealed(Layer):
    """A temperature that is one at first, in a buffer."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("tau", torch.ones(()))

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        out, k, v = super().forward(x, prev_K, prev_V)
        return out * self.tau, k, v


LAYERS = {
    "truncated": (Truncated, "its gradients are others"),
    "windowed": (Windowed, "not the keys and values"),
    "keeping": (Keeping, "keeps something"),
    "counting": (Counting, "differ|keeps something"),
    "annealed": (Annealed, "something else than to begin anew"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_left(name: str) -> None:
    kind, reason = LAYERS[name]
    report = ek.convert(nn.ModuleDict({"stranger": kind(8), "friend": Layer(8)}))
    assert list(report.converted) == ["friend"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left["stranger"])


class Scale(nn.Module):
    """What LayerScale and ReZero do."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Stop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Halved(nn.Module):
    """A number for each channel, of none that it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 1, 8, dtype=x.dtype)[:, None, None]


def with_end(end: nn.Module) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = BaseBlock(8, 8, False, False, 0.0)
        block.drop_path = end
        return block

    return make


class FirstOfAll(BaseBlock):
    """Adds nothing where there is nothing to retrieve from."""

    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        x = self.relu(self.bn(self.conv(x)) + x)
        attn, k, v = self.mrla(x, prev_k, prev_v)
        if prev_k is None:
            return x, k, v
        return x + self.drop_path(self.relu(self.bn_mrla(attn))), k, v


class Inline(BaseBlock):
    """Drops the whole batch at once."""

    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        x = self.relu(self.bn(self.conv(x)) + x)
        attn, k, v = self.mrla(x, prev_k, prev_v)
        out = self.relu(self.bn_mrla(attn))
        if self.training and torch.rand(()) < 0.3:
            out = out * 0
        return x + out, k, v


class Auxiliary(BaseBlock):
    """Appends a loss to a list."""

    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        x = self.relu(self.bn(self.conv(x)) + x)
        attn, k, v = self.mrla(x, prev_k, prev_v)
        self.losses.append(attn.square().mean())
        return x + self.relu(self.bn_mrla(attn)), k, v


class Catching(BaseBlock):
    """Goes on without its attention, whatever happened in it."""

    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        x = self.relu(self.bn(self.conv(x)) + x)
        try:
            attn, k, v = self.mrla(x, prev_k, prev_v)
        except BaseException:
            return x, prev_k, prev_v
        return x + self.relu(self.bn_mrla(attn)), k, v


class Shared(BaseBlock):
    """One norm before and behind its attention."""

    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        x = self.relu(self.bn_mrla(self.conv(x)) + x)
        attn, k, v = self.mrla(x, prev_k, prev_v)
        return x + self.relu(self.bn_mrla(attn)), k, v


def plain(kind: type[Block]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = kind(8, 8, False, False, 0.0)
        block.losses = []
        return block

    return make


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "a scale": with_end(Scale()),
    "a scale of one": with_end(Scale(1)),
    "a scale for each channel": with_end(Scale(8, 1, 1)),
    "fixed numbers for channels": with_end(Halved()),
    "a stop": with_end(Stop()),
    "dropout at zero": with_end(nn.Dropout(0.0)),
    "the first of all": plain(FirstOfAll),
    "random numbers in line": plain(Inline),
    "a list of losses": plain(Auxiliary),
    "a bare except": plain(Catching),
    "one norm twice": plain(Shared),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_keep_their_end(name: str) -> None:
    torch.manual_seed(0)
    theirs = nn.ModuleList(BLOCKS[name]() for _ in range(3)).double()
    ours = copy.deepcopy(theirs)
    what = ek.convert(ours, strict=True).converted.values()
    assert all("not the block" in w for w in what)
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    x = torch.linspace(-1, 1, 4 * 8 * 12).double().view(4, 8, 4, 3).sin()
    results = []
    for network in (theirs, ours):
        torch.manual_seed(2)
        y, k, v = x, None, None
        for block in network:
            y, k, v = block(y, k, v)
        y.square().sum().backward()
        grads = [p.grad for p in network.parameters()]
        results.append(
            [
                y,
                *grads,
                *network.buffers(),
                *(torch.tensor(len(b.losses)) for b in network if hasattr(b, "losses")),
            ]
        )
    for a, b in zip(*results, strict=True):
        if a is None or b is None:  # none is as good as zeros
            assert not any(bool(t.any()) for t in (a, b) if t is not None)
        else:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
