"""identity_init=True: attention in a trained network changes nothing at first, and learns from the first step on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.models import ResNet, build_model, load_weights, resnet20

needs_kernels = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")
BACKENDS = ["eager", pytest.param("cpp", marks=needs_kernels)]
ATTENTIONS = ["mrla", "mrla_light", "ela"]
VARIANTS = ["ours", "published"]


def images() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(8, 3, 12, 12)


def inserted(attention: str, variant: str, dtype: torch.dtype) -> tuple[ResNet, ResNet]:
    """A plain network that is not as it was initialised, and the same with attention in it."""
    torch.manual_seed(1)
    plain = resnet20().to(dtype)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    model = resnet20(attention=attention, variant=variant, identity_init=True).to(dtype)
    report = load_weights(model, plain.state_dict())
    assert {name.split(".")[0] for name in report.missing} == {"attentions"}
    assert len(report.loaded) == len(plain.state_dict())
    return plain, model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nothing_changes_at_first(
    attention: str, variant: str, dtype: torch.dtype, backend: str
) -> None:
    plain, model = inserted(attention, variant, dtype)
    x = images().to(dtype)
    with ek.use_backend(backend), torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
        assert torch.equal(model.train()(x), plain.train()(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_learns_from_the_first_step_on(
    attention: str, variant: str, backend: str
) -> None:
    _, model = inserted(attention, variant, torch.float64)
    x = images().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    layers = [layer for stage in model.attentions for layer in stage]

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8)).backward()

    with ek.use_backend(backend):
        step()
        for layer in layers:
            assert layer.norm.weight.grad.all()  # of every channel
            assert layer.norm.bias.grad.all()
        optimizer.step()
        step()
    without = {
        name
        for name, p in model.attentions.named_parameters()
        if p.grad is None or not p.grad.any()
    }
    # With one pair held the first layer's weights are 1 whatever its query is.
    firsts = {f"{i}.0.attn.Wq.weight" for i in range(3)}
    assert without == (set() if attention == "mrla_light" else firsts)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_gradients_are_those_of_the_formula(attention: str) -> None:
    """A zero scale must not be divided by: kernels and eager PyTorch agree. float64, sums in another order."""
    if extension() is None:
        pytest.skip("needs the compiled kernels")
    _, model = inserted(attention, "ours", torch.float64)
    other = copy.deepcopy(model)
    x = images().double()
    for network, backend in ((model, "cpp"), (other, "eager")):
        with ek.use_backend(backend):
            network(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_whole_blocks_are_served(attention: str, variant: str) -> None:
    model = build_model("resnet20", attention=attention, variant=variant, identity_init=True)
    found = ek.explain(model, images())
    assert [(e.backend, e.form, e.reasons) for e in found] == [("cpp", "block", {})] * 9


def test_its_own_checkpoint_loads_into_the_same_model_alone() -> None:
    _, model = inserted("mrla", "ours", torch.float32)
    again = resnet20(attention="mrla", identity_init=True)
    report = load_weights(again, model.state_dict())
    assert "identity_init" in report.notes[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), model.eval()(images()))
