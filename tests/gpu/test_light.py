"""The light form on the device: layers and blocks against float64, whichever kernels or PyTorch itself serve them."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.layer_stages import FORMS
from support.layers_on_gpu import assert_right, on_device
from support.on_gpu import DEVICE
from torch import nn

import ela_kernels as ek
from ela_kernels.explaining import explain
from ela_kernels.models.blocks import MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("light_backend", "poisoned_memory", "exact_convolutions"),
]

SHAPES = [((2, 6, 1, 1), 2), ((2, 37, 7, 7), 37), ((3, 24, 9, 33), 8), ((2, 64, 56, 56), 32)]


def make_blocks(shape, head_dim, dtype, form, depth=3, act=None):
    torch.manual_seed(2)
    layers = [ek.LightLayerAttention(shape[1], head_dim, value_act=act) for _ in range(depth)]
    blocks = nn.ModuleList(MRLALight(layer, 0.0) for layer in layers).to(dtype)
    for block in blocks:
        nn.init.normal_(block.norm.weight, 1.0, 0.5)
        nn.init.normal_(block.norm.bias)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=form)
    return blocks, x.requires_grad_()


def block_step(blocks, x, autocast=None):
    """As :func:`support.layers_on_gpu.layers_step`."""
    blocks = copy.deepcopy(blocks)
    scope = contextlib.nullcontext()
    if autocast is not None:
        scope = torch.autocast(x.device.type, autocast)
    previous, outs = PreviousOutput(), []
    with scope:
        for block in blocks:
            outs.append(block(outs[-1] if outs else x, previous))
    loss = outs[-1].double().square().sum() + outs[0].double().sin().sum()
    named = {"block.x": x} | dict(blocks.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    kinds = {f"output {i}": [out.detach()] for i, out in enumerate(outs)}
    for name, grad in zip(named, grads, strict=True):
        kinds.setdefault("gradients of " + name.partition(".")[2], []).append(grad)
    for name, buffer in blocks.named_buffers():
        kinds.setdefault(name.rpartition(".")[2], []).append(buffer)
    return {k: torch.cat([t.double().cpu().flatten() for t in ts]) for k, ts in kinds.items()}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES, ids=str)
def test_a_stage_of_blocks(shape, head_dim, is_training, form, light_backend):
    blocks, x = make_blocks(shape, head_dim, torch.float32, form)
    assert_right(blocks.train(is_training), x, light_backend, block_step)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_an_activation_of_the_value(act, dtype, form, light_backend):
    blocks, x = make_blocks((4, 32, 13, 16), 8, dtype, form, act=act)
    assert_right(blocks, x, light_backend, block_step)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype, form, light_backend):
    assert_right(*make_blocks((4, 32, 13, 16), 8, dtype, form), light_backend, block_step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, light_backend):
    blocks, x = make_blocks((4, 32, 13, 16), 8, torch.float32, FORMS[0])
    x = x.detach().to(dtype).requires_grad_()
    assert_right(blocks, x, light_backend, block_step, autocast=torch.bfloat16)


def test_the_same_step_gives_the_same_bits(light_backend):
    blocks, x = make_blocks((8, 32, 28, 28), 8, torch.bfloat16, FORMS[0])
    first, again = (
        assert_right(blocks, x, light_backend, block_step),
        assert_right(blocks, x, light_backend, block_step),
    )
    for kind, want in first.items():
        assert torch.equal(again[kind], want), kind


def test_the_named_backend_serves_the_whole_block(backend, light_backend):
    """One that has no kernels of the light form says so."""
    blocks, x = make_blocks((2, 12, 6, 7), 4, torch.float32, FORMS[0], depth=1)
    block, x = blocks[0].to(DEVICE), on_device(x)
    if light_backend == backend:
        (found,) = explain(block, x, PreviousOutput())
        assert (found.form, found.backend) == ("block", backend)
        return
    with (
        ek.use_backend(backend),
        pytest.raises(ValueError, match=f"backend '{backend}' was forced .* light_layer"),
    ):
        block(x, PreviousOutput())
