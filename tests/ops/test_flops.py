"""What PyTorch's counter of operations says of our operators: as much as of the form that multiplies matrices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.models.blocks import StageAttention

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

DIM, HEAD_DIM, SIZE = 32, 8, (2, 32, 6, 5)


class Stage(nn.Module):
    """Layers that are used as `use` says, on one history."""

    def __init__(self, fused: bool, blocks: bool, depth: int = 4) -> None:
        super().__init__()
        layers: Any = StageAttention("mrla", DIM, [0.0] * depth, HEAD_DIM, fused, "reuse")
        self.new_history, self.blocks = layers.new_history, blocks
        self.layers = layers if blocks else nn.ModuleList(layer.attn for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        history = self.new_history()
        for layer in self.layers:
            y = layer(x, history)
            x = y if self.blocks else x + y
        return x


def counted(model: Callable[[Tensor], Any], backward: bool = True) -> tuple[int, set[str]]:
    """The total, and who was counted."""
    x = torch.randn(SIZE, requires_grad=backward)
    counter = FlopCounterMode(display=False)
    with counter:
        out = model(x)
        if backward:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
    return counter.get_total_flops(), {str(op) for op in counter.get_flop_counts()["Global"]}


def captured(model: nn.Module) -> Callable[[Tensor], Any]:
    """The graph that the compiler makes of a model, to be run by itself: under a counter nothing is compiled."""
    found: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        found.append((graph, inputs))
        return graph.forward

    torch.compile(model, backend=keep, fullgraph=True)(torch.randn(SIZE, requires_grad=True))
    ((graph, inputs),) = found
    return lambda x: graph(*(x if i.shape == x.shape else i for i in inputs))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_as_the_form_that_concatenates(blocks: bool, backward: bool) -> None:
    # Without gradients PyTorch makes matrix products of the filters over the channels too, in both forms.
    with torch.set_grad_enabled(backward):
        want, _ = counted(Stage(False, blocks), backward)
        found, names = counted(Stage(True, blocks), backward)
    assert found == want
    assert "ela_kernels.layer_attention" in names


@pytest.mark.parametrize("blocks", [False, True])
def test_a_whole_layer_in_a_graph(blocks: bool) -> None:
    want, _ = counted(Stage(False, blocks))
    found, names = counted(captured(Stage(True, blocks)))
    assert found == want
    assert {"ela_kernels.layer", "ela_kernels.layer_backward"} <= names


def test_an_exported_program() -> None:
    model = Stage(True, True)
    x = torch.randn(SIZE, requires_grad=True)
    want, _ = counted(Stage(False, True))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    found, names = counted(program.module())
    assert found == want
    assert "ela_kernels.layer_attention" in names


def test_an_output_that_nothing_asks_for_costs_no_products_of_maps() -> None:
    q, k = (torch.randn(2, DIM, requires_grad=True) for _ in range(2))
    v = torch.randn(SIZE, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        ek.layer_attention(q, [k, k], [v, v], heads=4).weights[..., 0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    # Two products for a number: of query and two keys, forward; backward the gradients of all three.
    assert counts[torch.ops.ela_kernels.layer_attention_backward] == 2 * 4 * 2 * DIM
    assert counts[torch.ops.ela_kernels.layer_attention] == 2 * 2 * (2 * DIM + v.numel())


@pytest.mark.parametrize("first", ["ela_kernels", "torch.utils.flop_counter"])
def test_in_whatever_order_they_are_imported(first: str) -> None:
    other = {"ela_kernels", "torch.utils.flop_counter"} - {first}
    code = f"""
import sys, {first}
was_loaded = "torch.utils.flop_counter" in sys.modules
import {other.pop()}, torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
print(was_loaded, torch.ops.ela_kernels.layer in flop_registry, len(FlopCounterMode.__doc__) > 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Nobody who imports the package waits for the counter: it imports Triton, where there is one.
    assert run.stdout.split() == [str(first != "ela_kernels"), "True", "True"]
