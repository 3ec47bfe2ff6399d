"""What the report tells besides the divergence, by hand; and that it costs a layer nothing on other steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, Operations, batch, plant, train
from torch import nn

import ela_kernels as ek
from ela_kernels.ebqm.diagnostics import diagnosed


def run(network: Network, ebqm: ek.EBQM, steps: int, rate: float = 0.0) -> torch.Tensor:
    """Train; the last input."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    for _ in range(steps):
        x = batch()
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
        ebqm.step()
    return x


def test_both_by_hand() -> None:
    torch.manual_seed(0)
    network = Network((4,))
    ebqm = ek.EBQM(network, warmup=99, interval=3)
    run(network, ebqm, 2, rate=0.1)
    assert all(math.isnan(v) for r in ebqm.report().layers for v in (r.entropy, r.importance))
    # The step of a decision point: weights of its pass, gradients and parameters as they are after it.
    twin = copy.deepcopy(network)
    x = run(network, ebqm, 1, rate=0.1)
    history = ek.LayerHistory()
    for i, layer in enumerate(network.layers):
        row = ebqm.report().layers[i]
        x = twin.layers[i](x, history)
        w = history.weights.detach().double()
        if i == 0:
            assert math.isnan(row.entropy)
        else:
            want = -(w * w.log()).sum(-1).mean() / math.log(i + 1)
            assert row.entropy == pytest.approx(float(want), rel=1e-4)
        gamma, beta = layer.norm.weight, layer.norm.bias
        want = (gamma * gamma.grad + beta * beta.grad).square().mean()
        assert row.importance == pytest.approx(float(want), rel=1e-5)
        assert row.importance > 0
    before = [(r.entropy, r.importance) for r in ebqm.report().layers]
    run(network, ebqm, 2, rate=0.1)
    after = [(r.entropy, r.importance) for r in ebqm.report().layers]
    assert repr(after) == repr(before)  # of the last decision point


def test_the_first_order_change_of_the_loss() -> None:
    """What it is named after: all of a channel's scale and shift taken away, for small ones."""
    torch.manual_seed(0)
    network = Network((2,)).double()
    layer = network.layers[1]
    layer.act = nn.Identity()
    with torch.no_grad():
        layer.norm.weight.mul_(1e-5)
        layer.norm.bias.fill_(1e-5)
    ebqm = ek.EBQM(network, interval=1)
    x = batch().double()

    def loss() -> torch.Tensor:
        return network(x).square().mean()

    whole = loss()
    whole.backward()
    ebqm.step()
    changes = []
    for channel in range(CHANNELS):
        with torch.no_grad():
            kept = layer.norm.weight[channel].clone(), layer.norm.bias[channel].clone()
            layer.norm.weight[channel] = layer.norm.bias[channel] = 0.0
            changes.append(float(loss() - whole))
            layer.norm.weight[channel], layer.norm.bias[channel] = kept
    want = sum(c * c for c in changes) / CHANNELS
    assert ebqm.report().layers[1].importance == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("case", ["affine=False", "no shift", "frozen", "zeroed", "skipped"])
def test_what_there_is_nothing_of(case: str) -> None:
    network = Network((3,))
    layer = network.layers[1]
    if case == "affine=False":
        layer.norm = nn.BatchNorm2d(CHANNELS, affine=False)
    elif case == "no shift":
        layer.norm = nn.GroupNorm(1, CHANNELS)
        layer.norm.bias = None
    elif case == "frozen":
        layer.norm.requires_grad_(False)
    elif case == "skipped":
        layer.skip, layer.skipped = "retrieval", True
    ebqm = ek.EBQM(network, warmup=100, interval=2, probe_interval=100)
    run(network, ebqm, 1)
    network(batch()).sum().backward()
    if case == "zeroed":
        network.zero_grad()
    ebqm.step()
    row = ebqm.report().layers[1]
    if case == "no shift":
        want = (layer.norm.weight * layer.norm.weight.grad).square().mean()
        assert row.importance == pytest.approx(float(want), rel=1e-5)
    else:
        assert math.isnan(row.importance)
    assert math.isnan(row.entropy) == (case == "skipped")
    assert ebqm.report().layers[2].importance > 0 or case == "zeroed"
    assert " -  " in str(ebqm.report())


def test_a_step_that_was_not_taken_leaves_them() -> None:
    network = Network((3,))
    ebqm = ek.EBQM(network, warmup=100, interval=1)
    run(network, ebqm, 1)
    before = repr(ebqm.report().layers[1].importance)
    network(batch()).sum().backward()
    for p in network.parameters():
        p.grad.fill_(math.inf)
    ebqm.step(applied=False)
    assert repr(ebqm.report().layers[1].importance) == before
    assert all(layer.kept_weights is None for layer in network.layers)


def test_weights_of_ends() -> None:
    layers = Network((3,)).layers
    one_hot = torch.eye(4).reshape(1, 4, 4)
    even = torch.full((2, 2, 5), 0.2)
    found = diagnosed(layers, [one_hot, even, torch.ones(2, 2, 1)]).entropy
    assert found[:2] == [0.0, pytest.approx(1.0, rel=1e-6)]
    assert math.isnan(found[2])
    assert diagnosed(layers, [one_hot.bfloat16(), None, None]).entropy[0] == 0.0


def test_compiled_graphs_tell_no_entropy() -> None:
    torch._dynamo.reset()
    network = Network((3,))
    ebqm = ek.EBQM(network, warmup=100, interval=1)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(batch()).sum().backward()
        ebqm.step()
    rows = ebqm.report().layers
    assert all(math.isnan(row.entropy) for row in rows)
    assert all(row.importance > 0 for row in rows)


def test_other_steps_run_the_same_operations_as_without_it() -> None:
    network = Network((4,))
    plant(network, {2})
    ebqm = ek.EBQM(network, warmup=100, interval=10, probe_interval=100)
    train(network, ebqm, 1)
    counts: dict[int, list[int]] = {}
    for step in range(2, 12):
        with Operations() as forward:
            out = network(batch())
        kept = [layer.kept_weights is not None for layer in network.layers]
        assert kept == [step == 10] * 4
        out.sum().backward()
        with Operations() as after:
            ebqm.step()
        counts[step] = [len(forward.names), len(after.names)]
    forwards = {step: n for step, (n, _) in counts.items()}
    # At the decision point a tensor a layer is held on to.
    assert {n for step, n in forwards.items() if step != 10} == {forwards[2]}
    assert forwards[10] <= forwards[2] + 4
    assert {n for step, (_, n) in counts.items() if step != 10} == {counts[2][1]}
    assert counts[10][1] > counts[2][1]


def test_resumed_and_rearranged() -> None:
    network = Network((4,))
    ebqm = ek.EBQM(network, warmup=100, interval=2)
    run(network, ebqm, 2)
    want = [repr((r.entropy, r.importance)) for r in ebqm.report().layers]
    other: Any = ek.EBQM(copy.deepcopy(network), warmup=100, interval=2)
    other.load_state_dict(ebqm.state_dict())
    assert [repr((r.entropy, r.importance)) for r in other.report().layers] == want
    del network.stages[0][1]
    run(network, ebqm, 1)
    left = [repr((r.entropy, r.importance)) for r in ebqm.report().layers]
    assert left == [want[0], *want[2:]]
