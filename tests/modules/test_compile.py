"""torch.compile of a stage: one graph, and no compiling anew at every step."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, batch, plant, skipped
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import ela_kernels as ek
from ela_kernels import models


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def test_a_stage_is_one_graph_and_stays_compiled() -> None:
    network = Network((3,))
    ebqm = ek.EBQM(network, warmup=100)
    counter = CompileCounter()
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for _ in range(4):
        x = batch()
        twin = copy.deepcopy(network)
        compiled(x).sum().backward()
        twin(x).sum().backward()
        for got, want in zip(network.parameters(), twin.parameters(), strict=True):
            # float32: the functional op's kernel or eager sums in another order
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)
        network.zero_grad()
        ebqm.step()
    assert counter.frame_count == 1
    assert [row.divergence > 0 for row in ebqm.report().layers] == [False, True, True]


@pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
def test_decisions_compile_nothing_anew(mode: str) -> None:
    network = Network((4,), skip=mode).eval()
    counter = CompileCounter()
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    x = batch()
    for skip in itertools.product((False, True), repeat=4):
        for layer, is_skipped in zip(network.layers, skip, strict=True):
            layer.skipped = is_skipped
        # float32: the functional op, or PyTorch's own pieces, in another order of sums
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
def test_training_of_200_steps_with_changing_decisions_is_one_graph(mode: str) -> None:
    """As eager training: every output, every gradient, running statistics, and the decisions."""
    settings = {"warmup": 10, "interval": 5, "probe_interval": 5, "smoothing": 0.5}
    network = Network((6, 3), skip=mode)
    plant(network, {2, 4})
    twin = copy.deepcopy(network)
    counter = CompileCounter()
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    pairs = [(m, c, ek.EBQM(m, **settings)) for m, c in ((network, compiled), (twin, twin))]
    patterns = set()
    for step in range(200):
        if step % 20 == 0:
            redundant = [{2, 4}, {3, 7}, {1, 4, 8}, set()][step // 20 % 4]
            for model in (network, twin):
                plant(model, redundant)
        outs, x = [], batch()
        for model, call, ebqm in pairs:
            model.zero_grad()
            outs.append(call(x))
            outs[-1].sum().backward()
            ebqm.step()
        patterns.add(tuple(sorted(skipped(twin))))
        assert skipped(network) == skipped(twin), step
        # float32: sums in another order, and batch normalisation divides by a small spread
        torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)
        if step % 20 == 19:
            for got, want in zip(network.parameters(), twin.parameters(), strict=True):
                want_grad = torch.zeros_like(want) if want.grad is None else want.grad
                torch.testing.assert_close(got.grad, want_grad, rtol=1e-3, atol=1e-2)
            for got, want in zip(network.buffers(), twin.buffers(), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert len(patterns) > 3
    assert counter.frame_count == 1


def test_micro_batches_are_one_graph_and_all_seen() -> None:
    network = Network((3,))
    ebqm = ek.EBQM(network, smoothing=0.0)
    counter = CompileCounter()
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    twin = copy.deepcopy(network)
    by_hand = ek.EBQM(twin, smoothing=0.0)
    for size in (2, 3, 2, 2) * 4:
        x = batch(size)
        compiled(x).sum().backward()
        twin(x).sum().backward()
    network(x).sum().backward()  # one more, in eager PyTorch
    twin(x).sum().backward()
    ebqm.step()
    by_hand.step()
    got, want = ([r.divergence for r in e.report().layers[1:]] for e in (ebqm, by_hand))
    assert got == pytest.approx(want, rel=1e-4)
    assert counter.frame_count <= 2  # a second batch size makes it a variable


def test_an_average_that_was_compiled_follows_the_decisions() -> None:
    network = Network((4,)).eval()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)
    compiled = torch.compile(average.module, fullgraph=True, backend="eager")
    x = batch()
    compiled(x)
    for skip in ({1}, {2, 3}, set()):
        for i, layer in enumerate(network.layers):
            layer.skipped = i in skip
        average.update_parameters(network)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [0.5, float("nan"), 0.50001])
def test_between_two_decisions_it_does_what_eager_does(number: float) -> None:
    network, x = Network((3,)).eval(), batch()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    network.layers[1].decision[0] = number
    torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda dim: nn.GroupNorm(4, dim), lambda _: nn.Identity()]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_whatever_norm_keeps_what_it_had(norm: Any, backend: str) -> None:
    network = Network((3,), norm_layer=norm, drop_path=0.0)
    network.layers[1].skipped = True
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    for _ in range(2):
        x = batch()
        out, want = compiled(x), twin(x)
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)
        out.square().mean().backward()
        want.square().mean().backward()
    for (name, got), expected in zip(
        network.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        if "_extra_state" not in name:  # in which who reads whom is, which eager passes learn
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
def test_a_pruned_model_computes_nothing_of_what_it_skips(mode: str) -> None:
    network, ran = Network((4,), skip=mode), []
    network(batch())
    network.layers[1].skipped = network.layers[3].skipped = True
    ek.prune(network).eval()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        ran.extend(n for n in graph.graph.nodes if "ela_kernels" in str(n.target))
        return graph

    x = batch()
    out = torch.compile(network, fullgraph=True, backend=count)(x)
    torch.testing.assert_close(out, network(x), rtol=1e-4, atol=1e-5)
    # No kernel takes pairs that may be missing, as they may of layers that give none where they are skipped.
    assert len(ran) == (1 if mode == "layer" else 2)


def test_layers_compiled_one_by_one_beside_others_that_are_not() -> None:
    network = Network((5,), skip="layer")
    twin = copy.deepcopy(network)
    for i in (1, 2, 4):
        network.stages[0][i] = torch.compile(network.stages[0][i], backend="eager")
    for skip in (set(), {1}, {2, 3}, {1, 4}, {3}):
        for i, (first, second) in enumerate(zip(network.layers, twin.layers, strict=True)):
            first.skipped = second.skipped = i in skip
        x = batch()
        first, second = network(x), twin(x)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
        grads = [
            torch.autograd.grad(y.sum(), m.layers[0].attn.Wv.weight)[0]
            for y, m in ((first, network), (second, twin))
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("backend", "steps"),
    [("aot_eager", 60), pytest.param("inductor", 200, marks=pytest.mark.slow)],
)
def test_a_network_in_training_compiles_once_for_each_mode(backend: str, steps: int) -> None:
    """Steps with an optimizer, decisions of EBQM and by hand, and validation in between, with no way out."""
    options: dict[str, Any] = {"attention": "ela", "stem": "small", "head_dim": 8}
    model = models.ResNet((4, 3), (8, 16), "basic", 10, **options)
    layers = [m for m in model.modules() if isinstance(m, ek.ELA)]
    ebqm = ek.EBQM(model, warmup=5, interval=5, probe_interval=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    patterns = set()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in range(steps):
            if step % 20 == 10:
                layer = layers[step // 20 % 7]
                layer.skipped = not layer.skipped
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(x), labels).backward()
            optimizer.step()
            ebqm.step()
            patterns.add(tuple(layer.skipped for layer in layers))
            if step % 30 == 29:
                model.eval()
                with torch.no_grad():
                    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
                model.train()
    assert len(patterns) > 3
    # In the graph, skipped or not, a layer is seen at every step.
    rows = ebqm.report().layers
    assert all(
        len(row.over_time) == steps // 5 and row.divergence >= 0 for row in rows if row.place
    )
    # Training, and evaluation without gradients.
    assert counter.frame_count == 2


@pytest.mark.parametrize("layer", ["attention", "block", "light"])
def test_a_model_that_was_compiled_runs_after_a_mode_looked_on(layer: str) -> None:
    """The compiler skips then what it saw running, and comes upon what it did not by itself."""
    light = layer == "light"
    kinds = {"attention": ek.LayerAttention, "block": ek.ELA, "light": ek.LightLayerAttention}
    layers = nn.ModuleList(kinds[layer](CHANNELS, 8) for _ in range(3))

    def run(x: torch.Tensor) -> torch.Tensor:
        history = ek.LayerHistory()
        for each in layers:
            x = x + each(x, x if light else history)
        return x

    compiled, x = torch.compile(run, backend="aot_eager"), batch().requires_grad_()
    with FlopCounterMode(display=False):
        compiled(x)
    for _ in range(2):
        out, want = compiled(x), run(x)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        (got,), (expected,) = (torch.autograd.grad(o.sum(), x) for o in (out, want))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
