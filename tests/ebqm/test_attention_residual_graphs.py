"""EBQM on attention residuals in compiled graphs and transforms, where the decision is data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from support.residuals import DIM, Residuals, by_hand, decide, loss_of, skipped, tokens
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import ela_kernels as ek


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_decisions_compile_nothing_anew() -> None:
    """Outputs and gradients of every decision, by one graph; the weights are padded with zeros."""
    model, ids = Residuals(3).double(), tokens()
    counter = CompileCounterWithBackend("aot_eager")

    def run() -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        history = ek.PositionHistory()
        return loss_of(model(ids, history), ids), history.weights, history.kl

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    parameters = list(model.parameters())
    for skip in itertools.product((False, True), repeat=4):
        chosen = {i for i, is_skipped in enumerate(skip) if is_skipped}
        decide(model, chosen)
        (found, weights, kl), (want, want_weights, want_kl) = compiled(), run()
        torch.testing.assert_close(found, want)
        assert weights is not None
        assert want_weights is not None
        depth = want_weights.shape[1]
        torch.testing.assert_close(weights[:, :depth], want_weights)
        assert not weights[:, depth:].any()
        assert kl is not None
        if want_kl is None:
            assert kl.isnan().all()
        else:
            torch.testing.assert_close(kl, want_kl)
        for a, b in zip(
            torch.autograd.grad(found, parameters),
            torch.autograd.grad(want, parameters, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    assert counter.frame_count == 1


def test_training_with_ebqm_is_one_graph() -> None:
    """It decides as eager training does, and sees a skipped module at every step."""
    settings = {"low": 0.1, "high": 0.2, "warmup": 4, "interval": 2, "probe_interval": 1}
    model, ids = Residuals(twins=3), tokens(8)
    twin = Residuals()
    twin.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    pairs = [(m, c, ek.EBQM(m, **settings)) for m, c in ((model, compiled), (twin, twin))]
    for step in range(16):
        for network, run, ebqm in pairs:
            loss_of(run(ids), ids).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
                        parameter.grad = None
                if step == 10:
                    network.mixes[3].query.neg_()
            ebqm.step()
        assert skipped(model) == skipped(twin)
        assert (3 in skipped(model)) == (step in range(3, 13)), step
    assert counter.frame_count == 1
    for a, b in zip(*(ebqm.report().layers for *_, ebqm in pairs), strict=True):
        assert (a.stage, a.place, a.reason) == (b.stage, b.place, b.reason)
        # float32, of weights after sixteen steps
        assert a.divergence == pytest.approx(b.divergence, rel=1e-3, abs=1e-4, nan_ok=True)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_pruned_and_compiled() -> None:
    model, ids = Residuals().eval(), tokens()
    model(ids)
    decide(model, {2, 3})
    ek.prune(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))


def test_a_list_where_it_is_skipped() -> None:
    mix = ek.AttentionResidual(DIM)
    mix.skipped = True
    compiled = torch.compile(mix, backend=CompileCounter())
    with pytest.raises(ValueError, match="values: got list with an AttentionResidual that is skip"):
        compiled([torch.randn(2, 3, DIM)])


def test_models_of_several_decisions_at_once() -> None:
    models = [Residuals(3).double().eval() for _ in range(3)]
    skips: list[set[int]] = [{1, 2}, set(), {3}]
    for model, skip in zip(models, skips, strict=True):
        decide(model, skip)
    parameters, buffers = torch.func.stack_module_state(models)
    ids, base = tokens(), models[0]

    def run(p: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(base, (p, b), (ids,))

    found = torch.func.vmap(run)(parameters, buffers)
    for out, model, skip in zip(found, models, skips, strict=True):
        torch.testing.assert_close(out, by_hand(model, ids, skip)[0])


def test_exported() -> None:
    model, ids = Residuals(3).eval(), tokens()
    decide(model, {1, 2})
    program = torch.export.export(model, (ids,))
    want = model(ids)
    torch.testing.assert_close(program.module()(ids), want)
    assert not nn.Module.state_dict(program.module())["mixes.0.decision"][0]
