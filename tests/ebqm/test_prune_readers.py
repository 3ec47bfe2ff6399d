"""prune(): who may read a pair, where not every layer ran, or came back after the pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from support.ela_models import CHANNELS, Network, batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek


def made(skip: Sequence[int], depth: int = 4) -> Network:
    network = Network((depth,)).eval()
    for i in skip:
        network.layers[i].skipped = True
    return network


def assert_unchanged(network: nn.Module, x: Tensor) -> None:
    """By what the network gives before and after; a copy runs first, so that nothing is learnt by it."""
    want = copy.deepcopy(network)(x)
    ek.prune(network)
    assert torch.equal(network(x), want)


@pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
@torch.no_grad()
def test_a_layer_that_comes_back_after_the_last_pass_reads(mode: str) -> None:
    network, x = made([1, 2, 3]), batch()
    network.layers[2].skip = mode
    network(x)
    network.layers[2].skipped = False
    assert_unchanged(network, x)
    assert network.layers[1].attn is not None


@pytest.mark.parametrize("by", [copy.deepcopy, "state"])
@torch.no_grad()
def test_a_copy_of_a_copy_knows_no_more_than_the_first(by: object) -> None:
    def copied(network: Network) -> Network:
        if callable(by):
            return by(network)
        other = made([])
        other.load_state_dict(network.state_dict())
        return other

    network, x = made([1, 2, 3]), batch()
    network(x)
    first = copied(network)
    first.layers[2].skipped = False
    second = copied(first)
    assert_unchanged(second, x)
    assert second.layers[1].attn is not None


@torch.no_grad()
def test_a_reader_put_in_after_the_pass() -> None:
    network, x = made([1, 2, 3]), batch()
    network(x)
    network.stages[0][3] = ek.ELA(CHANNELS, head_dim=8).eval()
    assert_unchanged(copy.deepcopy(network), x)
    assert_unchanged(network, x)


@torch.no_grad()
def test_a_part_of_a_loaded_network_ran() -> None:
    network, x = made([1]), batch()
    network(x)
    loaded = made([])
    loaded.load_state_dict(network.state_dict())
    history = ek.LayerHistory()
    loaded.layers[1](loaded.layers[0](x, history), history)
    again = made([])
    again.load_state_dict(loaded.state_dict())
    assert_unchanged(loaded, x)
    assert_unchanged(again, x)


@pytest.mark.parametrize("compiled", [[2, 3], [0, 2, 3]])
@torch.no_grad()
def test_some_layers_are_compiled(compiled: list[int]) -> None:
    torch._dynamo.reset()
    network, x = made([1]), batch()
    for i in compiled:
        network.layers[i].compile(backend="eager")
    want = network(x)
    ek.prune(network)
    assert torch.equal(network(x), want)


@torch.no_grad()
def test_a_compiled_reader_of_another_kind() -> None:
    torch._dynamo.reset()
    layers, x = made([1]).layers, batch()

    @torch.compile(backend="eager")
    def read(x: Tensor, history: ek.LayerHistory) -> Tensor:
        q = x.mean((2, 3))
        return history.attend(q, q, x, heads=2)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers[:2])

        def forward(self, x: Tensor) -> Tensor:
            history = ek.LayerHistory()
            for layer in self.layers:
                x = layer(x, history)
            return read(x, history)

    network = Reads()
    want = network(x)
    ek.prune(network)
    assert torch.equal(network(x), want)


@torch.no_grad()
def test_weights_asked_of_the_history_are_a_reader() -> None:
    network, x = made([1], 2), batch()

    def weights() -> Tensor:
        history, y = ek.LayerHistory(), x
        for layer in network.layers:
            y = layer(y, history)
        q, k = network.layers[0].attn.query_key(y)
        return history.probe(q, k, heads=2).weights

    want = weights()
    ek.prune(network)
    assert torch.equal(weights(), want)


def test_what_nobody_reads_goes_from_a_checkpointed_network_too() -> None:
    network = made([3]).train()
    network.wrap = lambda layer, x, history: checkpoint(layer, x, history, use_reentrant=False)
    network(batch().requires_grad_()).sum().backward()
    ek.prune(network)
    assert network.layers[3].attn is None


class TestSharedAttention:
    @torch.no_grad()
    def test_with_a_layer_that_retrieves(self) -> None:
        network, x = made([1]), batch()
        network.layers[1].skip = "retrieval"
        network.layers[1].attn = network.layers[2].attn
        want = network(x)
        ek.prune(network)
        assert torch.equal(network(x), want)
        assert network.layers[1].norm is None
        loaded = made([])
        loaded.layers[1].attn = loaded.layers[2].attn
        loaded.load_state_dict(network.state_dict())
        assert torch.equal(loaded(x), want)

    @torch.no_grad()
    def test_with_one_that_is_skipped_too(self) -> None:
        network, x = made([1, 2]), batch()
        network.layers[1].attn = network.layers[2].attn
        want = network(x)
        ek.prune(network)
        assert torch.equal(network(x), want)
        assert network.layers[1].attn.Wq is None

    @torch.no_grad()
    def test_with_a_place_outside(self) -> None:
        network, x = made([1]), batch()
        network.outside = network.layers[1].attn
        want, own = network(x), network.outside(x, ek.LayerHistory())
        ek.prune(network)
        assert torch.equal(network(x), want)
        assert torch.equal(network.outside(x, ek.LayerHistory()), own)
