"""analyze() leaves a model, an EBQM and random numbers as they were, also when a batch raises."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.models import CifarResNet

np = pytest.importorskip("numpy")


class Busy(nn.Module):
    """Between the blocks of a network, and does whatever modules do to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.last = 0, [], None
        self.by_size: dict[int, Tensor] = {}
        self.total = torch.zeros(1)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.shape)
        self.total += 1
        self.by_size[self.calls] = self.last = x
        if self.calls == 1:
            self.late = nn.Linear(2, 2)
        with torch.enable_grad():  # as a model that wants gradients of its own
            noise = torch.rand_like(x) * random.random() * np.random.rand()
        return x + noise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.busy = Busy()
        self.net = CifarResNet((2, 2), (8, 16), attention="ela", head_dim=4, drop_path=0.3)

    def train(self, mode: bool = True) -> Net:
        assert self.net.head is not None
        self.net.head.requires_grad_(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.net(self.busy(x))


def ela_layers(model: nn.Module) -> list[ek.ELA]:
    return [m for m in model.modules() if isinstance(m, ek.ELA)]


def random_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def plain_state(model: nn.Module) -> list[Any]:
    """All attributes that can be compared, of all modules."""
    kinds = (bool, int, float, str, list, dict, type(None))
    return [
        (name, key, repr(value) if not key.startswith("_") else sorted(map(str, value)))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, kinds)
        and not isinstance(value, type(None))
        and hasattr(value, "__iter__")
    ] + [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
    ]


def readers(model: nn.Module) -> list[Any]:
    return [
        (layer.readers, layer.readers.known, layer.readers.others, len(layer.readers._layers))
        for layer in ela_layers(model)
    ]


def fails_in_the_loader(model: Net) -> Iterator[Tensor]:
    yield torch.randn(2, 3, 8, 8)
    raise OSError("the disk is gone")


def fails_in_the_model(model: Net) -> Iterator[Tensor]:
    yield torch.randn(2, 3, 8, 8)
    yield torch.randn(2, 5, 8, 8)


def works(model: Net) -> Iterator[Tensor]:
    for _ in range(3):
        yield torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("loader", [works, fails_in_the_loader, fails_in_the_model])
def test_all_is_as_it_was(
    loader: Callable[[Net], Iterator[Tensor]], training: bool | None, has_run: bool
) -> None:
    torch.manual_seed(1)
    model = Net()
    ebqm = ek.EBQM(model, warmup=0, interval=1, probe_interval=1)
    if has_run:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        ebqm.step()
        layers = ela_layers(model)
        layers[1].skipped = layers[3].skipped = True
        layers[3].skip = "layer"
        # A step under way: its observations are still to be taken, and its backward still to come.
        loss = model(torch.randn(2, 3, 8, 8)).sum()
    model.net.stages[0].eval()
    next(model.parameters()).requires_grad_(False)
    tensors = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    wanted = [p.requires_grad for p in model.parameters()]
    parts = list(model.modules())
    state, watched, numbers = plain_state(model), copy.deepcopy(ebqm.state_dict()), random_state()
    total = model.busy.total.clone()
    observed = [list(layer.observations) for layer in ela_layers(model)]
    read = readers(model)

    if loader is works:
        assert len(ek.analyze(model, loader(model), training=training).layers) == 4
    else:
        with pytest.raises((OSError, RuntimeError)):
            ek.analyze(model, loader(model), training=training)

    assert random_state() == numbers
    assert list(model.modules()) == parts
    assert plain_state(model) == state
    assert torch.equal(model.busy.total, total)
    assert readers(model) == read
    assert [p.requires_grad for p in model.parameters()] == wanted
    for now, before in zip(ela_layers(model), observed, strict=True):
        assert len(now.observations) == len(before)
        assert all(a is b for a, b in zip(now.observations, before, strict=True))
    torch.testing.assert_close(model.state_dict(), tensors, rtol=0, atol=0)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    torch.testing.assert_close(
        ebqm.state_dict()["statistics"], watched["statistics"], rtol=0, atol=0
    )
    assert str(ebqm.state_dict()["decisions"]) == str(watched["decisions"])
    if has_run:
        loss.backward()
        ebqm.step()
    history = ek.LayerHistory()
    assert not history.is_observed


def test_ebqm_takes_no_note() -> None:
    """Also of what would be added up apart, since no list can be put back there."""
    model, watched = Net(), []
    ek.EBQM(model)
    for layer in ela_layers(model):
        layer.register_forward_hook(lambda layer, *_: watched.append(layer.watched))
    ek.analyze(model, works(model))
    assert watched == [False] * 12
    assert all(layer.watched for layer in ela_layers(model))


def test_the_next_training_step_is_the_same() -> None:
    def step(analyzes: bool) -> list[Tensor]:
        torch.manual_seed(2)
        random.seed(2)
        np.random.seed(2)
        model = Net()
        ebqm = ek.EBQM(model, warmup=0, interval=1)
        if analyzes:
            ek.analyze(model, works(model))
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
            ebqm.step()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(step(True), step(False), rtol=0, atol=0)
