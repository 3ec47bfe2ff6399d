"""analyze() of attention residuals: weights and divergences over depth at every position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.ebqm import Reason

C, DEPTH = 6, 4


class Residuals(nn.Module):
    """Layers of which each is given what an attention residual retrieves from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(DEPTH))
        self.mixes = nn.ModuleList(ek.AttentionResidual(C) for _ in range(DEPTH))

    def forward(self, x: Tensor, kept: list[Any] | None = None) -> Tensor:
        history = ek.PositionHistory()
        history.append(x)
        for layer, mix in zip(self.layers, self.mixes, strict=True):
            history.append(layer(mix(history)))
            if kept is not None:
                kept.append((history.weights, history.kl))
        return history.values[-1]


def model(seed: int = 3) -> Residuals:
    torch.manual_seed(seed)
    found = Residuals().double()
    for mix in found.mixes:
        nn.init.normal_(mix.query)
    return found


def tokens(sizes: tuple[int, ...] = (2, 3, 2)) -> list[Tensor]:
    """Batches of other sizes, with sequences of other lengths."""
    torch.manual_seed(4)
    return [2 * torch.randn(n, 3 + i, C, dtype=torch.float64) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_weights_and_divergences_by_hand(backend: str) -> None:
    network, batches, passes = model(), tokens(), []
    with ek.use_backend(backend):
        found = ek.analyze(network, batches, smoothing=0.5)
        for x in batches:
            kept: list[Any] = []
            network(x, kept)
            passes.append(kept)
    assert [layer.name for layer in found.layers] == [f"mixes.{i}" for i in range(DEPTH)]
    assert not found.left
    for t, layer in enumerate(found.layers):
        assert (layer.stage, layer.place, layer.retrieves, layer.samples) == (0, t, True, 7)
        weights = torch.cat([kept[t][0].mean(2) for kept in passes]).mean(0)
        torch.testing.assert_close(torch.tensor(layer.weights), weights.float())
        if t:
            kl = torch.cat([kept[t][1].mean(1) for kept in passes]).mean()
            assert layer.kl == pytest.approx(kl.item(), rel=1e-6)


def test_as_an_ebqm_decides_that_has_seen_the_same() -> None:
    network, batches = model(), tokens()
    found = ek.analyze(network, batches, low=0.9, high=0.95)
    ebqm = ek.EBQM(network, warmup=len(batches), interval=1, low=0.9, high=0.95)
    for x in batches:
        network(x)
        ebqm.step()
    report = ebqm.report().layers
    for ours, theirs in zip(found.layers, report, strict=True):
        assert (ours.skipped, ours.reason) == (theirs.skipped, theirs.reason)
        if ours.place:
            assert ours.divergence == pytest.approx(theirs.divergence, rel=1e-5)
            assert ours.score == pytest.approx(theirs.score, rel=1e-5)
    assert found.layers[0].reason is Reason.FIRST
    assert any(layer.skipped for layer in found.layers)


def test_a_skipped_one_is_asked_and_nothing_stays() -> None:
    network, batches = model(), tokens((2,))
    ebqm = ek.EBQM(network)
    network.mixes[2].skipped = True
    before = {n: t.clone() for n, t in network.state_dict().items() if isinstance(t, Tensor)}
    found = ek.analyze(network, batches)
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in before.items())
    skipped = found.layers[2]
    assert not skipped.retrieves
    assert len(skipped.weights) == 3
    with torch.no_grad():
        history = ek.PositionHistory()
        history.append(batches[0])
        for layer, mix in zip(network.layers[:2], network.mixes[:2], strict=True):
            history.append(layer(mix(history)))
        own = network.mixes[2]
        kl = history.probe(own.query, own.norm_weight, own.eps, own.scale)
    assert kl is not None
    assert skipped.kl == pytest.approx(kl.mean().item(), rel=1e-6)
    assert network.mixes[2].watched
    assert not network.mixes[2].observations
    ebqm.step()
    assert "mixes.2" in str(found)


def test_maps_samples_without_positions_and_pruned_ones() -> None:
    torch.manual_seed(5)
    mixes = nn.ModuleList(ek.AttentionResidual(C) for _ in range(2))

    def run(of: nn.Module, x: Tensor) -> None:
        history = ek.PositionHistory()
        for mix in mixes:
            history.append(x)
            mix(history)

    for shape in ((2, C), (2, C, 3, 4)):
        found = ek.analyze(mixes, [torch.randn(shape)], forward=run)
        assert found.layers[1].weights == pytest.approx((0.5, 0.5))
        assert found.layers[1].kl == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    run(mixes, torch.randn(2, C))
    mixes[1].skipped = True
    ek.prune(mixes)
    last = ek.analyze(mixes, [torch.randn(2, C)], forward=run).layers[1]
    assert (last.weights, last.reason) == ((), Reason.PRUNED)


def test_one_that_is_given_a_list_is_left() -> None:
    network = nn.ModuleList([model(), ek.AttentionResidual(C).double()])

    def run(of: nn.Module, x: Tensor) -> None:
        network[0](x)
        network[1]([x])

    found = ek.analyze(network, tokens((2,)), forward=run)
    assert "did not come by with a PositionHistory" in found.left["1"]
