"""Whole networks of dynamic layer attention, converted: no map is written anew, and nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.published.networks import NETWORKS
from ela_kernels.backends.extension import extension
from ela_kernels.ops.layer_attention.observer import observed_by


def step(network: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Output, gradients and buffers of a step."""
    network.train(training)
    network.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = network(x)
    out.square().sum().backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads, *(b.double() for b in network.buffers())]


@pytest.fixture
def dynamic() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network of dynamic layer attention in float64, a converted copy, and images."""
    torch.manual_seed(0)
    published = NETWORKS["dynamic base"]
    theirs = published.make().double()
    ours = copy.deepcopy(theirs)
    ek.convert(ours, strict=True)
    return theirs, ours, torch.randn(published.shape, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_dynamic_layer_attention_writes_no_map_anew(
    dynamic: tuple[nn.Module, nn.Module, Tensor], training: bool, made: list[tuple[int, ...]]
) -> None:
    theirs, ours, x = dynamic
    found = step(ours, x, training)
    assert made == []
    for a, b in zip(found, step(theirs, x, training), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")
def test_explain(dynamic: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, ours, x = dynamic
    found = ek.explain(ours, x)
    assert [f"{e.backend} {e.form}" for e in found] == [
        *("cpp block", "cpp mix", "cpp mix"),
        *("cpp block", "cpp mix"),
    ]
    assert "multiplies values" in found[1].reasons["block"][0]
    with ek.use_backend("eager"):
        assert {e.form for e in ek.explain(ours, x)} == {"eager"}


def test_parts_with_hooks_are_called(
    dynamic: tuple[nn.Module, nn.Module, Tensor], made: list[tuple[int, ...]]
) -> None:
    theirs, ours, x = dynamic
    seen: list[str] = []
    attention = ours.stages[0].attention
    attention[1].bn_layer_attention.register_forward_hook(lambda *_: seen.append("norm"))
    attention[2].layer_attention.layer_attention.Wv.register_forward_hook(
        lambda *_: seen.append("value")
    )
    for a, b in zip(step(ours, x, True), step(theirs, x, True), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    assert seen == ["norm", "value"]
    assert made == []


def test_retrievals_that_can_be_skipped_make_the_maps() -> None:
    torch.manual_seed(0)
    published = NETWORKS["dynamic base"]
    theirs = published.make().double()
    ours = copy.deepcopy(theirs)
    ek.convert(ours, to="ela", strict=True)
    x = torch.randn(published.shape, dtype=torch.float64)
    for a, b in zip(step(ours, x, False)[:2], step(theirs, x, False)[:2], strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_whoever_looks_on_sees_every_retrieval(
    dynamic: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    theirs, ours, x = dynamic
    seen: list[int] = []

    class Collector:
        def came_by(self, history: Any, caller: Any, before: Any, after: Any) -> None:
            assert after.weights is not before.weights
            seen.append(after.weights.shape[-1])

        def probed(self, history: Any, found: Any) -> None:
            raise AssertionError

    with torch.no_grad(), observed_by(Collector()):
        found = ours.eval()(x)
    assert seen == [1, 2, 3, 1, 2]
    with torch.no_grad():
        torch.testing.assert_close(found, theirs.eval()(x), rtol=1e-10, atol=1e-10)
