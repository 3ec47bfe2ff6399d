"""What a compiled graph of layers depends on, and where the operator leaves a layer to its pieces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.graph_stages import CHANNELS, assert_trains_alike, block, maps, operators, stage
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import ela_kernels as ek
from ela_kernels.ops.layer_attention.in_graph.call import FORMULA

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_the_setting_compiles_anew() -> None:
    model, found = stage(block(), block()), []
    compiled = torch.compile(model, backend=operators(found, only_forward=True))
    x = maps()
    compiled(x)
    assert found == ["layer", "layer"]
    with ek.use_backend("eager"):
        found.clear()
        compiled(x)
        assert found == ["layer_attention", "layer_attention"]
    found.clear()
    compiled(x)
    assert found == []  # the graph of before


def test_more_batch_sizes_are_one_graph_more() -> None:
    model, counter = stage(block(), block()), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, size in ((2, 5), (3, 5), (4, 5), (3, 7), (2, 8), (5, 6)):
        x = maps(batch, size)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("why", ["hook", "one parameter", "group norm", "own forward"])
def test_what_the_operator_does_not_know_is_made_of_pieces(why: str) -> None:
    layers, seen = [block(), block()], []
    if why == "hook":
        layers[1].attn.register_forward_hook(lambda *_: seen.append(1))
    elif why == "one parameter":
        layers[1].norm.weight = None
    elif why == "group norm":
        layers[1].norm = nn.GroupNorm(4, CHANNELS)
    else:

        class Own(ek.LayerAttention):
            def forward(self, x: Tensor, history: Any, *rest: Any) -> Tensor:
                return 2 * super().forward(x, history, *rest)

        layers[1].attn = Own(CHANNELS)
    model, found = stage(*layers), []
    compiled = torch.compile(model, fullgraph=True, backend=operators(found, only_forward=True))
    x = maps()
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))
    assert found[0] == "layer"
    if why == "hook":
        assert len(seen) == 2
    assert_trains_alike(model, torch.compile(model, backend="aot_eager"))


def test_a_norm_without_momentum_is_pytorchs() -> None:
    """Its cumulative mean is a number that would have to be read when the graph runs."""
    model = stage(block(), block())
    model.layers[1].norm.momentum = None
    assert_trains_alike(model, torch.compile(model, backend="aot_eager"))


def test_graphs_on_disk_are_of_this_formula() -> None:
    """What they are found again by has to change with the backward, which it does not see."""
    numbers = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls = [n for n in graph.graph.nodes if "ela_kernels.layer" in str(n.target)]
        numbers.extend(call.args[-2] for call in calls)
        return graph.forward

    torch.compile(stage(block(), block()), backend=note)(maps())
    assert numbers == [FORMULA, FORMULA]


def test_an_exported_program_needs_no_kernels() -> None:
    model = stage(block(), block()).eval()
    program = torch.export.export(model, (maps(),))
    names = {str(n.target) for n in program.graph.nodes if "ela_kernels" in str(n.target)}
    assert names == {"ela_kernels.layer_attention.default"}


def test_a_second_derivative_is_refused() -> None:
    model = stage(block(), block())
    x = maps().requires_grad_()
    out = torch.compile(model, backend="eager")(x)
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
