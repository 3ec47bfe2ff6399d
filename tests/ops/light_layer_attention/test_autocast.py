"""The kernels of a whole light layer under autocast, against the same modules without them."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_stages import (
    FORMS,
    assert_as_close,
    assert_as_close_together,
    autocast_results,
    gradients,
    network_gradients,
    recorded_calls,
)
from support.light_layers import WithPrevious, make_blocks, make_layer, run_blocks
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.cpp import light as cpp_light
from ela_kernels.backends.dispatch import KERNELS, Refusal
from ela_kernels.backends.extension import extension
from ela_kernels.models import CifarResNet
from ela_kernels.modules import light
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

AUTOCAST = [torch.bfloat16, torch.float16]
IN_LAYER = ["light_layer", "light_layer_backward"]
IN_BLOCK = ["light_layer", "light_layer_backward", "norm backward"]


@pytest.fixture
def calls(monkeypatch):
    """What the compiled kernels of a light layer were called for."""
    made = recorded_calls(monkeypatch, KERNELS["cpp"], IN_LAYER)
    norm_backward_call = cpp_light.norm_backward_call

    def recorded(*args):
        made.append("norm backward")
        return norm_backward_call(*args)

    monkeypatch.setattr(cpp_light, "norm_backward_call", recorded)
    return made


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("prev_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *AUTOCAST], ids=str)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_a_layer(autocast, dtype, prev_dtype, form, calls):
    """Input and previous output in every dtype: as a convolution gave them, or as float32 from elsewhere."""
    layer, x, prev = make_layer((3, 12, 7, 9), 4, torch.float32, form)
    module = WithPrevious(layer, prev.detach().to(prev_dtype).requires_grad_())
    x = x.detach().to(dtype).requires_grad_()
    found, plain, exact = autocast_results(lambda m, x: ([m(x)], None), module, x, autocast)
    assert calls == IN_LAYER
    assert found[0].dtype == autocast
    assert_as_close(found, plain, exact, autocast)


def test_dtypes_of_the_gradients(calls):
    layer, x, prev = make_layer((2, 6, 4, 5), 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, prev).sum().backward()
    assert calls == IN_LAYER
    assert {t.grad.dtype for t in (x, prev, *layer.parameters())} == {torch.float32}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stage_of_blocks(dtype, training, form, calls):
    """One call a block where the stage's input has the dtype of autocast; else a layer's, and PyTorch's norm."""
    blocks, x = make_blocks((6, 12, 7, 9), 3, 4, form, dtype=torch.float32)
    for block in blocks:
        nn.init.uniform_(block.norm.running_mean, -1, 1)
        nn.init.uniform_(block.norm.running_var, 0.5, 2)
    blocks.train(training)
    x = x.detach().to(dtype).requires_grad_()
    results = autocast_results(lambda m, x: (run_blocks(m, x), None), blocks, x, torch.bfloat16)
    assert sorted(calls) == sorted(3 * (IN_BLOCK if dtype == torch.bfloat16 else IN_LAYER))
    assert {out.dtype for out in results[0][:3]} == {dtype}
    assert_as_close(*results, torch.bfloat16)


def test_the_same_samples_are_dropped(calls):
    blocks, x = make_blocks((8, 6, 4, 5), 2, 3, drop_path=0.5, dtype=torch.float32)
    x = x.detach().bfloat16()

    def dropped():
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out = run_blocks(copy.deepcopy(blocks), x)[0]
        return (out == x).flatten(1).all(1)

    found = dropped()
    with ek.use_backend("eager"):
        expected = dropped()
    assert calls == ["light_layer"] * 2
    assert 0 < int(found.sum()) < 8
    assert torch.equal(found, expected)


def test_float64_is_left_alone(calls):
    layer, x, prev = make_layer((2, 6, 4, 5), 3)
    expected = layer(x, prev)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, prev)
    assert torch.equal(found, expected)
    assert calls == ["light_layer"] * 2


def test_dtypes_that_autocast_does_not_bring_together_are_pytorchs_to_refuse():
    layer, x, prev = make_layer((2, 6, 4, 5), 3)
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.plan(x, prev).backend is KERNELS["cpp"]
        assert single.plan(x.float(), prev.float()).backend is KERNELS["cpp"]
        assert single.plan(x.float(), prev).obstacles
        assert layer.plan(x.float(), prev.float()).obstacles
        assert single.plan(x, prev).obstacles
    assert single.plan(x.bfloat16(), prev.bfloat16()).obstacles


def test_recomputed_blocks(calls):
    blocks, x = make_blocks((4, 6, 4, 5), 3, 3, dtype=torch.float32)
    x = x.detach().bfloat16().requires_grad_()

    def run(through):
        previous, out = PreviousOutput(), x
        with torch.autocast("cpu", torch.bfloat16):
            for block in blocks:
                out = through(block, out, previous)
        return gradients(out.float().square().sum(), [x, *blocks.parameters()])

    plain = run(lambda block, *args: block(*args))
    again = run(lambda block, *args: checkpoint(block, *args, use_reentrant=False))
    assert calls.count("light_layer") == 9
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)


def test_a_network(monkeypatch, calls):
    """Every attention of a residual network under autocast is one call of the kernels."""
    torch.manual_seed(1)
    network = CifarResNet((2, 2), (8, 16), attention="mrla_light", head_dim=4)
    images = torch.randn(4, 3, 12, 12)

    found = network_gradients(network, images)
    assert sorted(calls) == sorted(4 * IN_BLOCK)
    calls.clear()
    with monkeypatch.context() as patch:
        refusal = Refusal(("a test",), None)
        patch.setattr(light, "plan_light_layer", lambda *_, **__: refusal)
        plain = network_gradients(network, images)
        exact = network_gradients(network.double(), images.double(), autocast=False)
    assert not calls
    assert_as_close_together(found, plain, exact)


def test_the_kernels_are_asked_in_the_dtype_of_autocast(monkeypatch):
    seen = []
    real = KERNELS["cpp"].light_layer
    monkeypatch.setitem(
        vars(KERNELS["cpp"]),
        "light_layer",
        lambda *a: (seen.append((a[0].dtype, a[2].dtype)), real(*a))[1],
    )
    layer, x, prev = make_layer((2, 6, 4, 5), 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, prev)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
