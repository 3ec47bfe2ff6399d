"""Models that `torch.fx` traces: a layer is one node, and the history is made anew by the graph."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import ela_kernels as ek
from ela_kernels import models
from ela_kernels.modules.published import ConcatHistory, ConcatLayerAttention

NETWORKS: dict[str, dict[str, Any]] = {
    "ela": {"attention": "ela"},
    "history": {"attention": "ela", "history_dtype": torch.bfloat16, "tolerance": 0.1},
    "mrla": {"attention": "mrla"},
    "light": {"attention": "mrla_light"},
    "shortcut": {"attention": "mrla_light", "variant": "published"},
}


def network(**options: Any) -> nn.Module:
    model = models.ResNet((3, 2), (16, 32), "basic", 10, stem="small", **options)
    model(torch.randn(4, 3, 16, 16))
    return model


def of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_gives_the_same_in_every_pass(name: str) -> None:
    model = network(**NETWORKS[name]).eval()
    traced = fx.symbolic_trace(model)
    for size in (2, 3):
        x = torch.randn(size, 3, 16, 16)
        assert torch.equal(of(traced, x), of(model, x))


def test_a_layer_is_one_node() -> None:
    model = network(attention="ela")
    graph = fx.symbolic_trace(model).graph
    called = {n.target for n in graph.nodes if n.op == "call_module" and "attentions" in n.target}
    assert called == {n for n, m in model.named_modules() if isinstance(m, ek.ELA)}


def test_training_and_decisions_are_the_layers_own() -> None:
    model = network(attention="ela")
    traced = fx.symbolic_trace(model)
    layers = [m for m in model.modules() if isinstance(m, ek.ELA)]
    x = torch.randn(2, 3, 16, 16)
    for skipped in (False, True):
        layers[1].skipped = skipped
        gradients = []
        for run in (model, traced):
            model.zero_grad()
            run(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert traced.get_submodule("attentions.0.1") is layers[1]


class Provides(nn.Module):
    """The first layer gives its pair, and nobody asks for what it retrieves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (ek.LayerAttention(16, 8) for _ in range(2))

    def forward(self, x):  # what torch.fx pickles may have no annotations that are strings
        history = ek.LayerHistory()
        self.first(2 * x, history)
        return self.second(x, history)


@pytest.mark.parametrize("again", ["once", "pickled", "copied"])
def test_what_later_layers_read_is_no_dead_code(again: str) -> None:
    model = Provides()
    traced = fx.symbolic_trace(model)
    if again == "pickled":
        stored = io.BytesIO()
        torch.save(traced, stored)
        stored.seek(0)
        traced = torch.load(stored, weights_only=False)
    elif again == "copied":
        traced = copy.deepcopy(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(of(traced, x), of(model, x))


def test_a_history_that_comes_from_outside_is_handed_on() -> None:
    layer = ek.LayerAttention(16, 8)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, history: ek.LayerHistory) -> Tensor:
            return self.layer(x, history)

    x, history = torch.randn(2, 16, 5, 5), ek.LayerHistory()
    found = fx.symbolic_trace(Around())(x, history)
    assert history.depth == 1
    assert torch.equal(found, layer(x, ek.LayerHistory()))


class Reads(Provides):
    def forward(self, x: Tensor) -> Any:
        history = ek.LayerHistory()
        return self.first(x, history), history.weights


class Began(Provides):
    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        pair = torch.ones(2, 16), torch.ones(2, 16), torch.ones(2, 16, 5, 5)
        history.attend(*pair, heads=2)
        return self.first(x, history)


class Concatenates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ConcatLayerAttention(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, ConcatHistory())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Reads, r"^history: got a read of it in a model that torch\.fx traces.*torch\.export"),
        (Began, r"^history: got one that holds pairs already.*LayerHistory\(\)"),
        (Concatenates, r"^x: got Proxy; .*leaf.*torch\.export\.export"),
    ],
)
def test_what_a_trace_cannot_hold_is_told(make: type[nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fx.symbolic_trace(make())
