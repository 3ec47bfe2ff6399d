"""What an optimizer does to layers that are skipped: nothing, if it was told so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, batch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.ebqm import idle_parameters, spare_skipped

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}
PAIR = {"attn.Wk.weight", "attn.Wv.weight"}
NORM = {"norm.weight", "norm.bias"}


def idle_names(network: nn.Module) -> set[str]:
    idle = {id(p) for p in idle_parameters(network)}
    return {n.removeprefix("stages.0.") for n, p in network.named_parameters() if id(p) in idle}


def passes(network: nn.Module) -> None:
    """Two, so that the layers know who reads whom."""
    for _ in range(2):
        network(batch()).sum().backward()


@pytest.mark.parametrize(
    ("mode", "unused"),
    [
        ("reuse", {"attn.Wq.weight"}),
        ("retrieval", {"attn.Wq.weight", *NORM}),
        ("layer", {"attn.Wq.weight", *NORM, *PAIR}),
    ],
)
def test_which_parameters_are_idle(mode: str, unused: set[str]) -> None:
    network = Network((4,), skip=mode)
    assert idle_names(network) == set()
    network.layers[1].skipped = True
    passes(network)
    assert idle_names(network) == {f"1.{name}" for name in unused}
    network.layers[2].skipped = network.layers[3].skipped = True
    passes(network)
    # Nobody after the second layer retrieves.
    of_each = unused | PAIR
    assert idle_names(network) == {f"{i}.{name}" for i in (1, 2, 3) for name in of_each}


@pytest.mark.parametrize("mode", ["reuse", "retrieval", "layer"])
def test_idle_parameters_have_no_gradient(mode: str) -> None:
    """Gradients of all others are there: what is left alone is what the pass itself leaves alone."""
    network = Network((5,), skip=mode)
    network.layers[1].skipped = network.layers[4].skipped = True
    passes(network)
    network.zero_grad()
    passes(network)
    without = {n.removeprefix("stages.0.") for n, p in network.named_parameters() if p.grad is None}
    assert idle_names(network) == without


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("compiles", [False, True])
def test_a_skipped_layer_comes_back_as_it_was(name: str, compiles: bool) -> None:
    torch._dynamo.reset()
    network = Network((3,), skip="layer")
    moved = copy.deepcopy(network)
    for model, is_spared in ((network, True), (moved, False)):
        optimizer = OPTIMIZERS[name](model.parameters())
        if is_spared:
            spare_skipped(optimizer, model)
        run = torch.compile(model, backend="eager") if compiles else model
        run(batch()).square().sum().backward()
        optimizer.step()
        layer = model.layers[1]
        layer.skipped = True
        before = [p.detach().clone() for p in layer.parameters()]
        moments = copy.deepcopy([optimizer.state[p] for p in layer.parameters()])
        others = [p.detach().clone() for p in model.layers[2].parameters()]
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            run(batch()).square().sum().backward()
            optimizer.step()
        is_same = [torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)]
        assert all(is_same) if is_spared else not any(is_same)
        if is_spared:
            for state, p in zip(moments, layer.parameters(), strict=True):
                for key, value in state.items():
                    torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=0)
        assert not any(
            torch.equal(a, b) for a, b in zip(others, model.layers[2].parameters(), strict=True)
        )


def test_what_another_layer_has_too_goes_on() -> None:
    network = Network((3,), skip="layer")
    network.layers[1].attn = network.layers[2].attn
    network.layers[1].norm.weight = network.layers[0].norm.weight
    network.layers[1].skipped = True
    passes(network)
    assert idle_names(network) == {"1.norm.bias"}


def test_it_ends_when_it_is_told_to() -> None:
    network = Network((2,), skip="layer")
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    spare_skipped(optimizer, network).remove()
    passes(network)
    network.layers[1].skipped = True
    before = network.layers[1].attn.Wq.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, network.layers[1].attn.Wq.weight)


@pytest.mark.parametrize(
    ("optimizer", "model", "error", "sentence"),
    [
        ("x", Network((2,)), TypeError, "optimizer: got str; allowed is a torch.optim.Optimizer"),
        (torch.optim.SGD, Network((2,)), TypeError, "optimizer: got SGD; allowed is a torch.optim"),
        (None, "x", TypeError, "model: got str; allowed is a torch.nn.Module"),
        (None, None, TypeError, "model: got NoneType; allowed is a torch.nn.Module"),
        (None, nn.Linear(2, 2), ValueError, "model: got Linear without an ELA layer, so that ther"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    optimizer: Any, model: Any, error: type[Exception], sentence: str
) -> None:
    of_another = OPTIMIZERS["sgd"]([nn.Parameter(torch.zeros(2))])
    with pytest.raises(error) as caught:
        spare_skipped(of_another if optimizer is None else optimizer, model)
    assert str(caught.value).startswith(sentence)


def test_synchronised_norms() -> None:
    """In training they want a GPU; what a layer does with them is the same."""
    network, x = Network((4,)), batch()
    passes(network)
    network.layers[2].skipped = True
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 4
    assert [layer.skipped for layer in converted.layers] == [False, False, True, False]
    ebqm = ek.EBQM(converted)
    assert len(ebqm.report().layers) == 4
    found: Tensor = converted(x)
    # float32: PyTorch's norm after the kernels, and not in them
    torch.testing.assert_close(found, network.eval()(x), rtol=1e-4, atol=1e-5)
    assert found.shape[1] == CHANNELS
