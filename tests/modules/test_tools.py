"""Tools around a model: what exports it, and what says in a sentence that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, batch
from torch import Tensor, nn

import ela_kernels as ek


class Light(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ek.LightLayerAttention(CHANNELS, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, x)
        return x


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ek.LayerAttention(CHANNELS, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        for layer in self.layers:
            x = layer(x, history)
        return x


MODELS = [lambda: Network((3,)), Base, Light]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    ("tool", "error", "message"),
    [
        (
            torch.jit.script,
            NotImplementedError,
            r"^torch\.jit\.script: got a .*torch\.export\.export",
        ),
    ],
)
def test_what_cannot_follow_a_layer_is_told_so(
    make: Callable[[], nn.Module], tool: Callable[..., Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        tool(make().eval())


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_traces_and_exports(make: Callable[[], nn.Module]) -> None:
    model, x = make(), batch()
    model(x), model.eval()
    with torch.no_grad():
        want = model(x)
        # float32: PyTorch's own pieces in another order of sums
        for other in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
            torch.testing.assert_close(other(x), want, rtol=1e-4, atol=1e-5)
