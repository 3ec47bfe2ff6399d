"""Whole layers and blocks in compiled graphs: one operator each, with the numbers and gradients of eager PyTorch."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.graph_stages import CHANNELS, Stage, assert_trains_alike, block, maps, operators, stage
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

COMPILES = pytest.mark.skipif(
    " " in torch.__file__, reason="torch.compile gives g++ its folders without quotes"
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["blocks", "layers", "mixed"])
def test_each_layer_is_one_operator_and_its_backward_another(
    kind: str, channels_last: bool
) -> None:
    layers: list[nn.Module] = {
        "blocks": [block(), block(0.3), block(relu=False)],
        "layers": [ek.LayerAttention(CHANNELS) for _ in range(3)],
        "mixed": [block(), ek.LayerAttention(CHANNELS), block()],
    }[kind]
    model, found = stage(*layers, reads=True), []
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend=operators(found))
    assert_trains_alike(model, compiled, steps=1)
    assert found == ["layer"] * 3 + ["layer_backward"] * 3


def test_no_gradient_of_a_value_is_added_up_in_the_graph() -> None:
    """The pull form: each value's gradient is made where it is used, whatever the depth."""
    model, graphs = stage(*(block() for _ in range(5))), []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        model, fullgraph=True, backend=aot_autograd(fw_compiler=note, bw_compiler=note)
    )
    compiled(maps()).backward()
    backward = graphs[-1].graph
    shape = maps().shape
    added = [n for n in backward.nodes if "add" in str(n.target) and n.meta["val"].shape == shape]
    assert added == []
    made = [n for n in backward.nodes if "layer_backward" in str(n.target)]
    assert len(made) == 5
    assert all(n.args[-2:] == ([], []) for n in made)  # no pair is gathered for other layers


@COMPILES
def test_by_the_default_compiler() -> None:
    model = stage(block(), ek.LayerAttention(CHANNELS))
    assert_trains_alike(model, torch.compile(model, fullgraph=True), steps=1)


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("channels_last", [False, True])
def test_by_the_default_compiler_with_all_there_is(channels_last: bool) -> None:
    layers = [block(), ek.ELA(CHANNELS), block(), ek.LayerAttention(CHANNELS), ek.ELA(CHANNELS)]
    model = stage(*layers)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.layers[4].skipped = True
    compiled = torch.compile(model, fullgraph=True)
    assert_trains_alike(model, compiled, steps=3)
    model.eval()
    with torch.no_grad():
        x = maps(7)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(training: bool, dtype: torch.dtype) -> None:
    model = Stage([block(), ek.LayerAttention(CHANNELS), block()]).train(training)
    found: list[str] = []
    compiled = torch.compile(model, fullgraph=True, backend=operators(found))
    x, grads = maps(dtype=torch.float32), []
    for call in (compiled, model):
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            out = call(x)
        out.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert (
        found.count("layer") >= 1
    )  # a norm in float32 beside a map in half precision is PyTorch's
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", ["retrieval", "reuse"])
def test_a_skipped_layer_is_skipped_when_the_graph_runs(mode: str, backend: str) -> None:
    """Every set of decisions, by one graph: outputs, gradients, running statistics, and what was observed."""
    model = stage(*(ek.ELA(CHANNELS, skip=mode) for _ in range(4)))
    counter = CompileCounter()
    compiled = torch.compile(
        model, fullgraph=True, backend=counter if backend == "eager" else backend
    )
    for skipped in itertools.product((False, True), repeat=4):
        for layer, is_skipped in zip(model.layers, skipped, strict=True):
            layer.skipped = is_skipped
        assert_trains_alike(model, compiled, steps=1)
        model.eval()
        with torch.no_grad():
            x = maps()
            torch.testing.assert_close(compiled(x), model(x))
        model.train()
    assert counter.frame_count <= 3  # in training, in evaluation, and without gradients


def test_a_skipped_layer_does_not_retrieve(monkeypatch: pytest.MonkeyPatch) -> None:
    from ela_kernels.backends.dispatch import KERNELS

    backend, retrieved = KERNELS["cpp"], []
    if backend.unavailable_reason() is not None:
        pytest.skip("needs the compiled kernels")
    model = stage(*(ek.ELA(CHANNELS) for _ in range(4)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(maps())
    layer = backend.layer

    def counted(x: Tensor, filters: Any, *rest: Any, **options: Any) -> Any:
        retrieved.append(filters.wq is not None)
        return layer(x, filters, *rest, **options)

    monkeypatch.setitem(vars(backend), "layer", counted)
    model.layers[1].skipped = model.layers[3].skipped = True
    compiled(maps())
    assert retrieved == [True, False, True, False]


def test_layers_that_cannot_be_skipped_beside_those_that_can() -> None:
    layers = [
        block(),
        ek.ELA(CHANNELS),
        ek.ELA(CHANNELS, skip="retrieval"),
        block(),
        ek.ELA(CHANNELS),
    ]
    model = stage(*layers)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for skipped in itertools.product((False, True), repeat=3):
        for i, is_skipped in zip((1, 2, 4), skipped, strict=True):
            model.layers[i].skipped = is_skipped
        assert_trains_alike(model, compiled, steps=1)


def _breaks(_: int, x: Tensor, __: ek.LayerHistory) -> Tensor:
    torch._dynamo.graph_break()
    return x


def _attends(i: int, x: Tensor, history: ek.LayerHistory) -> Tensor:
    """A pair that no whole layer has made, after the second layer."""
    if i != 1:
        return x
    q = x.mean((2, 3))
    return x + history.attend(q, q * 0.5, x * 0.3, heads=2)


def _provides(i: int, x: Tensor, history: ek.LayerHistory) -> Tensor:
    if i == 1:
        history.provide(x.mean((2, 3)), x * 0.7, heads=2)
    return x


@pytest.mark.parametrize("between", [_breaks, _attends, _provides])
def test_stages_that_are_not_whole_layers_alone(between: Any) -> None:
    model = stage(*(block() for _ in range(4)), between=between, reads=True)
    compiled = torch.compile(model, fullgraph=between is not _breaks, backend="aot_eager")
    assert_trains_alike(model, compiled)


@pytest.mark.parametrize("compiled", [{0}, {1, 2}, {3}, {0, 2}, {0, 1, 2, 3}])
def test_layers_compiled_one_by_one(compiled: set[int]) -> None:
    model = stage(*(block() for _ in range(4)), reads=True)
    partly = copy.deepcopy(model)
    for i in compiled:
        partly.layers[i] = torch.compile(partly.layers[i], backend="aot_eager")
    x = maps()
    for m in (model, partly):
        m(x).backward()
    for got, want in zip(partly.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-11)


class Branches(nn.Module):
    """Two continuations of one history, neither of which sees the other's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        x = self.layers[0](x, history)
        keys, values = (torch.stack(t, 1) for t in (history.keys, history.values))
        ends = []
        for layer in self.layers[2:]:
            branch = ek.LayerHistory.holding(keys, values, heads=2)
            ends.append(layer(self.layers[1](x, branch), branch))
        return ends[0].square().mean() + ends[1].sum()


def test_two_continuations_of_one_history() -> None:
    model = Branches().double()
    assert_trains_alike(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


class Checkpointed(Stage):
    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        for conv, layer in zip(self.convs, self.layers, strict=True):
            x = layer(checkpoint(conv, x, use_reentrant=False).relu(), history)
        return x.square().mean()


def test_beside_checkpoints() -> None:
    model = Checkpointed([block() for _ in range(3)]).double()
    assert_trains_alike(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_a_part_of_the_gradients_and_a_graph_that_is_kept() -> None:
    model = stage(*(block() for _ in range(3)))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = maps().requires_grad_()
    wanted = [x, model.layers[1].attn.Wk.weight, model.layers[0].norm.bias]
    outs = compiled(x), model.train()(x)
    for _ in range(2):
        for one in ([0], [1], [0, 2]):
            got, want = (
                torch.autograd.grad(out, [wanted[i] for i in one], retain_graph=True)
                for out in outs
            )
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
