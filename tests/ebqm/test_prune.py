"""prune(): nothing changes but the parameters that no longer serve."""

from __future__ import annotations

import copy

import pytest
import torch
from support.ela_models import Network, batch, plant, skipped, train

import ela_kernels as ek
from ela_kernels.ebqm import Reason

MODES = ["retrieval", "layer", "reuse"]


def made(mode: str, skip: set[int], depth: int = 6) -> Network:
    network = Network((depth, 3), skip=mode)
    network(batch(4))  # gives batch normalisation some statistics and the layers their places
    for i in skip:
        network.layers[i].skipped = True
    return network


def names(network: Network, layer: int) -> set[str]:
    return {name for name, _ in network.layers[layer].named_parameters()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip", [{2}, {2, 4, 7}, {4, 5, 8}, set()])
def test_output_is_the_same_bit_for_bit(mode: str, skip: set[int], backend: str) -> None:
    network, x = made(mode, skip).eval(), batch()
    want = network(x)
    before = sum(p.numel() for p in network.parameters())
    assert ek.prune(network) is network
    assert torch.equal(network(x), want)
    after = sum(p.numel() for p in network.parameters())
    assert (after < before) == bool(skip)
    assert skipped(network) == skip
    network.train()(x).sum().backward()


def test_which_parameters_go() -> None:
    network = made("retrieval", {2, 4, 5, 7})
    ek.prune(network)
    kept = {"attn.Wk.weight", "attn.Wv.weight"}
    assert names(network, 2) == kept  # layer 3 retrieves its value
    assert names(network, 4) == names(network, 5) == set()  # nothing after them retrieves
    assert names(network, 7) == kept
    assert names(network, 3) == {*kept, "attn.Wq.weight", "norm.weight", "norm.bias"}
    network = made("layer", {2})
    ek.prune(network)
    assert names(network, 2) == set()
    assert list(network.layers[2].state_dict()) == ["_extra_state"]


def test_values_are_kept_for_attention_layers_outside_of_ela() -> None:
    network = made("retrieval", {5})
    network.last = ek.LayerAttention(16, head_dim=8)  # may read the last stage's history
    ek.prune(network)
    assert names(network, 5) == {"attn.Wk.weight", "attn.Wv.weight"}


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_of_a_pruned_model(mode: str) -> None:
    network, x = ek.prune(made(mode, {2, 5, 7})).eval(), batch()
    want, state = network(x), network.state_dict()
    again = ek.prune(copy.deepcopy(network))  # twice is as good as once
    fresh = Network((6, 3), skip="retrieval").eval()
    for other in (again, fresh):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        other.load_state_dict(state)
        assert torch.equal(other(x), want)
        assert list(other.state_dict()) == list(state)


def test_a_pruned_layer_stays_skipped() -> None:
    network = ek.prune(made("retrieval", {2}))
    with pytest.raises(ValueError, match=r"^state_dict: .*was pruned"):
        network.load_state_dict(made("retrieval", set()).state_dict(), strict=False)
    network.layers[2].skipped = False
    with pytest.raises(RuntimeError, match="was pruned"):
        network(batch())


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on(mode: str) -> None:
    network = Network((6, 3), skip=mode)
    plant(network, {2, 7})
    ebqm = ek.EBQM(network, warmup=5, interval=5, probe_interval=2, smoothing=0.5)
    train(network, ebqm, 10)
    assert skipped(network) == {2, 7}
    ek.EBQM.prune(network)
    train(network, ebqm, 20)
    assert skipped(network) == {2, 7}
    report = ebqm.report()
    assert [report.layers[i].reason for i in (2, 7)] == [Reason.PRUNED] * 2
    assert "pruned" in str(report)


def test_unknown_stages_are_refused() -> None:
    network = Network((3,))
    network.layers[1].skipped = True
    with pytest.raises(
        ValueError, match=r"^model: got a skipped layer 'stages\.0\.1' that has never run"
    ):
        ek.prune(network)
    assert not network.layers[1].pruned
    with pytest.raises(ValueError, match=r"without an ela_kernels\.ELA layer"):
        ek.prune(torch.nn.Linear(2, 2))
