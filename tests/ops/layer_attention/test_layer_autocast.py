"""The kernels of a whole layer and of a whole block under autocast, against the same modules without them."""

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
    make_blocks,
    make_stage,
    network_gradients,
    run_blocks,
    run_stage,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS, Refusal
from ela_kernels.backends.extension import extension
from ela_kernels.backends.types import NormAct
from ela_kernels.models import CifarResNet

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

AUTOCAST = [torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch):
    """What the kernels of a layer, and of a block, were called for."""
    made = []
    attend, provide = ek.LayerHistory.attend_layer, ek.LayerHistory.provide_layer

    def attended(*args, **options):
        is_block = isinstance(options.get("epilogue"), NormAct)
        made.append("attend_block" if is_block else "attend_layer")
        return attend(*args, **options)

    def provided(*args, **options):
        made.append("provide_layer")
        return provide(*args, **options)

    monkeypatch.setattr(ek.LayerHistory, "attend_layer", attended)
    monkeypatch.setattr(ek.LayerHistory, "provide_layer", provided)
    return made


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *AUTOCAST], ids=str)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_a_stage(autocast, dtype, form, calls):
    """The stage's input in every dtype: as a convolution gave it, or as float32 from elsewhere."""
    layers, x = make_stage((3, 12, 7, 9), 3, 4, torch.float32, form)
    x = x.detach().to(dtype).requires_grad_()
    found, plain, exact = autocast_results(run_stage, layers, x, autocast)
    assert calls[0] == "attend_layer"
    assert found[0].dtype == torch.promote_types(dtype, autocast)
    assert_as_close(found, plain, exact, autocast)


@pytest.mark.parametrize("residual", [True, False])
def test_dtypes_of_what_a_layer_gives(residual, calls):
    layers, x = make_stage((2, 6, 4, 5), 2, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs, history = run_stage(layers, x, residual)
    assert outs[0].dtype == (torch.float32 if residual else torch.bfloat16)
    assert history.values[0].dtype == history.keys[0].dtype == torch.bfloat16
    assert history.weights.dtype == history.kl.dtype == torch.float32
    outs[-1].sum().backward()
    assert {p.grad.dtype for p in layers.parameters()} == {torch.float32}
    assert x.grad.dtype == torch.float32
    assert calls


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stage_of_blocks(dtype, training, form, calls):
    """One call a block where the stage's input has the dtype of autocast; else a layer's, and PyTorch's norm."""
    blocks, x = make_blocks((6, 12, 7, 9), 3, 4, torch.float32, form, drop_path=0.0)
    blocks[1].skip, blocks[1].skipped = "retrieval", True
    for block in blocks:
        nn.init.uniform_(block.norm.running_mean, -1, 1)
        nn.init.uniform_(block.norm.running_var, 0.5, 2)
    blocks.train(training)
    x = x.detach().to(dtype).requires_grad_()
    found, plain, exact = autocast_results(run_blocks, blocks, x, torch.bfloat16)
    name = "attend_block" if dtype == torch.bfloat16 else "attend_layer"
    assert calls == [name, "provide_layer", name]
    assert_as_close(found, plain, exact, torch.bfloat16)


def test_the_same_samples_are_dropped(calls):
    blocks, x = make_blocks((8, 6, 4, 5), 2, 3, torch.float32, drop_path=0.5)
    x = x.detach().bfloat16()

    def dropped():
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out = run_blocks(copy.deepcopy(blocks), x)[0][0]
        return (out == x).flatten(1).all(1)

    found = dropped()
    with ek.use_backend("eager"):
        expected = dropped()
    assert calls == ["attend_block"] * 2
    assert 0 < int(found.sum()) < 8
    assert torch.equal(found, expected)


def test_float64_is_left_alone(calls):
    layers, x = make_stage((2, 6, 4, 5), 2, 3)
    expected = run_stage(layers, x)[0][-1]
    with torch.autocast("cpu", torch.bfloat16):
        found = run_stage(layers, x)[0][-1]
    assert torch.equal(found, expected)
    assert calls == ["attend_layer"] * 4


def test_dtypes_that_autocast_does_not_bring_together_are_pytorchs_to_refuse(calls):
    layers, x = make_stage((2, 6, 4, 5), 2, 3)

    def obstacles(x):
        found = layers[0].plan(x, ek.LayerHistory())
        assert isinstance(found, Refusal)
        return found.obstacles

    with torch.autocast("cpu", torch.bfloat16):
        assert (
            "torch.float64, and the layer is computed in torch.bfloat16" in obstacles(x.float())[0]
        )
        layers.float()
        assert "torch.float32, and the layer is computed in torch.float64" in obstacles(x)[0]
    assert (
        "torch.float32, and the layer is computed in torch.bfloat16" in obstacles(x.bfloat16())[0]
    )
    assert not calls


def test_a_layer_outside_of_autocast_reads_what_is_held_in_its_own_dtype():
    layers, x = make_stage((2, 6, 4, 5), 2, 3, torch.float32)
    history = ek.LayerHistory()
    with torch.autocast("cpu", torch.bfloat16):
        layers[0](x, history)
    found = layers[1](x, history)
    promoted = ek.LayerHistory()
    promoted.provide(history.keys[0].float(), history.values[0].float(), heads=layers[0].heads)
    torch.testing.assert_close(found, layers[1](x, promoted), rtol=1e-5, atol=1e-5)


def test_recomputed_layers(calls):
    layers, x = make_stage((2, 6, 4, 5), 3, 3, torch.float32)

    def recomputed(f, *args):
        return checkpoint(f, *args, use_reentrant=False)

    def run(through):
        with torch.autocast("cpu", torch.bfloat16):
            out = run_stage(layers, x, through=through)[0][-1]
        return gradients(out.square().sum(), [x, *layers.parameters()])

    plain, again = run(lambda f, *args: f(*args)), run(recomputed)
    assert calls.count("attend_layer") >= 9
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)


def test_a_network(monkeypatch, calls):
    """Every attention of a residual network under autocast is one call of the kernels."""
    torch.manual_seed(1)
    network = CifarResNet((2, 2), (8, 16), attention="ela", head_dim=4)
    images = torch.randn(4, 3, 12, 12)

    found = network_gradients(network, images)
    assert calls == ["attend_block"] * 4
    with monkeypatch.context() as patch:
        patch.setattr(ek.LayerHistory, "plan_layer", lambda *a, **k: Refusal(("a test",), None))
        plain = network_gradients(network, images)
    exact = network_gradients(network.double(), images.double(), autocast=False)
    assert len(calls) == 8  # the float64 network's
    assert_as_close_together(found, plain, exact)


def test_the_extension_is_asked_in_the_dtype_of_autocast(monkeypatch):
    seen = []
    real = KERNELS["cpp"].layer
    monkeypatch.setitem(
        vars(KERNELS["cpp"]), "layer", lambda *a, **k: (seen.append(a[0].dtype), real(*a, **k))[1]
    )
    layers, x = make_stage((2, 6, 4, 5), 1, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        run_stage(layers, x)
    assert seen == [torch.bfloat16]
