"""A tolerance beside everything else: transforms, second derivatives, graphs, checkpoints, modules, reports."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from support.history_stages import make_layers
from support.layer_stages import gradients, make_blocks, make_stage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

SHAPE = (2, 12, 4, 5)
TOLERANCE = 0.02

pytestmark = pytest.mark.usefixtures("kernels")


def stage(kind: str, depth: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    """With weights that spread, some of them below :data:`TOLERANCE`."""
    if kind == "op":
        modules, x = make_layers(depth, scales=[12.0] * depth, dtype=dtype)
        return modules, x
    modules, x = (make_stage if kind == "layer" else make_blocks)(SHAPE, depth, 3, dtype)
    for module in modules:
        layer = getattr(module, "attn", module)
        nn.init.normal_(layer.Wq.weight)
        nn.init.normal_(layer.Wk.weight)
        layer.Wq.weight.data *= 25
    return modules, x


def run(modules: Any, x: Tensor, history: ek.LayerHistory, through: Any = None) -> list[Tensor]:
    y = x
    for module in modules:
        y = module(y, history) if through is None else through(module, y, history)
    loss = y.square().sum() + history.kl.sum() + history.weights.square().sum()
    return [
        y.detach(),
        history.weights.detach(),
        *gradients(loss, [x, *modules.parameters()]),
    ]


def assert_near(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= rtol * b.norm() + 1e-12, i


@pytest.mark.parametrize("kind", ["op", "layer", "block"])
def test_it_changes_what_is_retrieved(kind: str) -> None:
    """What the tests below rest on: something is below, and that shows."""
    modules, x = stage(kind)
    without = run(modules, x, ek.LayerHistory())
    found = run(modules, x, ek.LayerHistory(tolerance=TOLERANCE))
    assert (found[1] < TOLERANCE).any()
    assert (found[0] - without[0]).norm() > 1e-6 * found[0].norm()
    with ek.use_backend("eager"):
        assert_near(found, run(modules, x, ek.LayerHistory(tolerance=TOLERANCE)))


@pytest.mark.parametrize("forced", ["auto", "eager"])
def test_gradcheck_away_from_the_tolerance(forced: str) -> None:
    torch.manual_seed(0)
    q, *keys = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    values = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def op(q: Tensor, *pairs: Tensor) -> tuple[Tensor, Tensor]:
        r = ek.layer_attention(q, pairs[:3], pairs[3:], 2, 2.0, tolerance=TOLERANCE)
        return r.out, r.weights

    weights = op(q, *keys, *values)[1]
    assert (weights < TOLERANCE).any()
    assert ((weights / TOLERANCE).log().abs() > 1e-3).all()
    with ek.use_backend(forced):
        assert torch.autograd.gradcheck(op, (q, *keys, *values))
        assert torch.autograd.gradgradcheck(op, (q, *keys, *values))


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_transforms(transform: str) -> None:
    torch.manual_seed(1)
    q, k = torch.randn(3, 2, 4).double(), torch.randn(3, 3, 2, 4).double()
    v = torch.randn(3, 3, 2, 4, 5).double()

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ek.layer_attention(q, [*k], [*v], 2, 3.0, tolerance=TOLERANCE).out

    if transform == "vmap":
        found = torch.func.vmap(op)(q, k, v)
        expected = torch.stack([op(*one) for one in zip(q, k, v, strict=True)])
        assert_near([found], [expected])
        return
    args = (q[0], k[0], v[0])
    if transform == "grad":
        found = torch.func.grad(lambda *a: op(*a).sin().sum())(*args)
        leaf = args[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(op(leaf, *args[1:]).sin().sum(), leaf)
        assert_near([found], [expected])
        return
    tangents = tuple(torch.randn_like(a) for a in args)
    _, found = torch.func.jvp(op, args, tangents)
    leaves = [a.clone().requires_grad_() for a in args]
    _, expected = torch.autograd.functional.jvp(op, tuple(leaves), tangents)
    assert_near([found], [expected])


@pytest.mark.parametrize("kind", ["op", "layer", "block"])
def test_checkpoints(kind: str) -> None:
    modules, x = stage(kind)
    expected = run(modules, x, ek.LayerHistory(tolerance=TOLERANCE))
    found = run(
        modules,
        x,
        ek.LayerHistory(tolerance=TOLERANCE),
        lambda f, *args: checkpoint(f, *args, use_reentrant=False),
    )
    assert_near(found, expected)


@pytest.mark.parametrize("kind", ["op", "layer", "block"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graphs(kind: str, dynamic: bool) -> None:
    modules, x = stage(kind)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        history, y = ek.LayerHistory(tolerance=TOLERANCE), x
        for module in modules:
            y = module(y, history)
        return y, history.weights

    def results(f: Any) -> list[Tensor]:
        y, weights = f(x)
        return [y, weights, *gradients(y.square().sum(), [x, *modules.parameters()])]

    expected = results(step)
    torch._dynamo.reset()
    found = results(torch.compile(step, backend="aot_eager", dynamic=dynamic))
    assert_near(found, expected)


def test_the_operator_of_a_layer_is_given_it() -> None:
    modules, x = stage("layer", 2)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(x: Tensor) -> Tensor:
        history = ek.LayerHistory(tolerance=TOLERANCE)
        return modules[1](modules[0](x, history), history)

    torch._dynamo.reset()
    torch.compile(step, backend=backend, fullgraph=True)(x)
    (graph,) = graphs
    calls = [n for n in graph.graph.nodes if n.target is torch.ops.ela_kernels.layer]
    assert len(calls) == 2
    assert all(TOLERANCE in n.args for n in calls)


@pytest.mark.parametrize("skip", ["reuse", "retrieval", "layer"])
def test_skipped_blocks(skip: str) -> None:
    modules, x = stage("block", 4)
    for block in modules:
        block.mode = skip
    modules[2].skipped = True
    found = run(modules, x, ek.LayerHistory(tolerance=TOLERANCE))
    with ek.use_backend("eager"):
        assert_near(found, run(modules, x, ek.LayerHistory(tolerance=TOLERANCE)))


def test_a_retrieval_that_is_made_again() -> None:
    """One that nobody had kept is made again with the tolerance of the layer that made it."""
    modules, x = stage("layer", 3)
    modules[2].tolerance = TOLERANCE
    history, y = ek.LayerHistory(), x
    for module in modules:
        out = module(y, history)
        y = y + out
    assert (history.weights < TOLERANCE).any()
    assert_near([history.last_retrieved().o], [out])


def test_a_layers_own_comes_before_the_historys() -> None:
    modules, x = stage("layer", 3)
    by_history = run(modules, x, ek.LayerHistory(tolerance=TOLERANCE))
    for module in modules:
        module.tolerance = TOLERANCE
    assert all(map(torch.equal, run(modules, x, ek.LayerHistory()), by_history))
    for module in modules:
        module.tolerance = 0.0
    plain, _ = stage("layer", 3)
    without = run(plain, x, ek.LayerHistory())
    assert all(map(torch.equal, run(modules, x, ek.LayerHistory(tolerance=TOLERANCE)), without))


def test_modules_take_it_and_keep_it() -> None:
    layer = ek.LayerAttention(12, 3, tolerance=1e-3)
    block = ek.ELA(12, 3, tolerance=1e-3)
    assert layer.tolerance == block.attn.tolerance == 1e-3
    for module in (layer, block.attn):
        assert copy.deepcopy(module).tolerance == 1e-3
        assert pickle.loads(pickle.dumps(module)).tolerance == 1e-3
    old = ek.LayerAttention(12, 3)
    del old.__dict__["tolerance"]  # as one that was pickled before there was any
    assert old.tolerance is None
    old(torch.randn(2, 12, 3, 3), ek.LayerHistory())


def test_models_take_it() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = ek.models.resnet20(attention="mrla", tolerance=0.3)
    assert all(s.tolerance == 0.3 for s in model.attentions)
    found = ek.explain(model, images)
    assert all(e.left_out is not None for e in found)
    assert any(0 < e.left_out < 1 for e in found)
    assert "% of the retrievals left out" in str(found)
    plain = ek.explain(ek.models.resnet20(attention="mrla"), images)
    assert all(e.left_out is None for e in plain)
    assert "left out" not in str(plain)
    for options in ({"attention": "mrla_light"}, {"attention": "mrla", "fused": False}, {}):
        with pytest.raises(ValueError, match=r"tolerance: got 0\.1 with attention="):
            ek.models.resnet20(tolerance=0.1, **options)
    with pytest.raises(ValueError, match="tolerance: got 1"):
        ek.models.resnet20(attention="mrla", tolerance=1.0)


def test_explain_of_the_op() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, values: Tensor) -> Tensor:
            out: Tensor = ek.layer_attention(
                q, [q, -q], [values, values], 1, 1.0, tolerance=0.4
            ).out
            return out

    (found,) = ek.explain(Model(), torch.ones(2, 4), torch.randn(2, 4, 3))
    assert found.left_out == 0.5


def test_the_report_shows_what_was_left_out() -> None:
    modules, x = stage("block", 3, torch.float32)
    net = nn.ModuleList(modules)
    ebqm = ek.EBQM(net, warmup=1, interval=1)
    for _ in range(3):
        history, y = ek.LayerHistory(tolerance=TOLERANCE), x
        shares = []
        for block in net:
            y = block(y, history)
            shares.append((history.weights < TOLERANCE).float().mean().item())
        y.sum().backward()
        ebqm.step()
    rows = ebqm.report().layers
    seen = [
        (r.left_out, s) for r, s in zip(rows, shares, strict=True) if not math.isnan(r.left_out)
    ]
    assert seen
    assert all(found == pytest.approx(share, abs=1e-6) for found, share in seen)
    assert any(found > 0 for found, _ in seen)
    assert "left out" in str(ebqm.report())
    state = ebqm.state_dict()
    del state["diagnostics"]["left_out"]  # as an earlier version saved it
    other = ek.EBQM(copy.deepcopy(net), warmup=1, interval=1)
    other.load_state_dict(state)
    assert all(math.isnan(r.left_out) for r in other.report().layers)
