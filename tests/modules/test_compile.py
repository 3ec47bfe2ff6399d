"""torch.compile of a stage: one graph, and no compiling anew at every step."""

from __future__ import annotations

import copy

import pytest
import torch
from support.ela_models import Network, batch
from torch._dynamo.testing import CompileCounter

import ela_kernels as ek


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


def test_a_decision_compiles_anew_and_is_right() -> None:
    network = Network((4,)).eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = batch()
    for skip, mode in ((False, "retrieval"), (True, "retrieval"), (True, "layer")):
        network.layers[2].skipped, network.layers[2].skip = skip, mode
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
