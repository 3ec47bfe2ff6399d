"""Whole layers and whole residual blocks on the device: one call a layer and direction, against float64."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from support.layer_stages import FORMS, make_blocks, make_stage, run_blocks, run_stage
from support.layers_on_gpu import assert_right, layers_step, on_device
from support.on_gpu import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("backend", "poisoned_memory", "exact_convolutions"),
]

HALF = [torch.bfloat16, torch.float16]

# One position, one channel, odd lengths, channel-wise heads, one head, several patches, several strips of channels.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 6, 1, 1), 2),
    ((2, 37, 7, 7), 37),
    ((3, 24, 9, 33), 8),
    ((2, 12, 14, 14), 1),
    ((2, 64, 56, 56), 16),
]


def float32_stage(make, shape, head_dim, form, depth=2):
    return make(shape, depth, head_dim, torch.float32, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES, ids=str)
def test_a_stage(shape, head_dim, form, layers_ran, backend):
    assert_right(*float32_stage(make_stage, shape, head_dim, form), backend)
    assert layers_ran == ["layer"] * 2 + ["layer_backward"] * 2


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES[1:], ids=str)
def test_a_stage_of_blocks(shape, head_dim, is_training, form, layers_ran, backend):
    blocks, x = float32_stage(make_blocks, shape, head_dim, form)
    for block in blocks:
        nn.init.uniform_(block.norm.running_mean, -1, 1)
        nn.init.uniform_(block.norm.running_var, 0.5, 2)
    assert_right(blocks.train(is_training), x, backend)
    assert layers_ran == ["layer"] * 2 + ["layer_backward"] * 2


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("make", [make_stage, make_blocks], ids=["layers", "blocks"])
def test_half_types(make, dtype, form, backend):
    modules, x = make((4, 32, 13, 16), 3, 8, dtype, form)
    assert_right(modules, x, backend)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [make_stage, make_blocks], ids=["layers", "blocks"])
def test_autocast(make, dtype, form, layers_ran, backend):
    """Float32 parameters; the stage's input from a convolution under autocast, or float32 from elsewhere."""
    modules, x = make((4, 32, 13, 16), 3, 8, torch.float32, form)
    x = x.detach().to(dtype).requires_grad_()
    assert_right(modules, x, backend, autocast=torch.bfloat16)
    assert layers_ran == ["layer"] * 3 + ["layer_backward"] * 3


@pytest.mark.parametrize("depth", [1, 3, 5, 33])
def test_depths(depth, backend):
    assert_right(*make_stage((2, 8, 3, 5), depth, 4, torch.float32), backend)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("skip", [(0,), (1, 2), (3,)])
def test_layers_that_only_provide(skip, form, layers_ran, backend):
    layers, x = float32_stage(make_stage, (2, 12, 6, 10), 4, form, depth=4)
    assert_right(layers, x, backend, skip=skip)
    assert layers_ran.count("layer") == 4


# More programs or channels than one grid's dimension or one strip holds.
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [((66000, 2, 1, 3), 2), ((700, 100, 1, 2), 1), ((1, 2, 149, 131), 2), ((1, 2100, 5, 3), 700)],
    ids=str,
)
def test_beyond_blocks_and_grids(shape, head_dim, form, backend):
    assert_right(*float32_stage(make_stage, shape, head_dim, form), backend)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_sizes_of_the_filters_over_channels(size, backend):
    torch.manual_seed(3)
    layers = nn.ModuleList(ek.LayerAttention(12, 4, size) for _ in range(2))
    assert_right(layers, torch.randn(2, 12, 6, 7, requires_grad=True), backend)


def test_gradients_that_are_not_wanted(backend):
    layers, x = make_stage((2, 12, 6, 7), 4, 4, torch.float32)
    layers[0].Wv.weight.requires_grad_(False)
    layers[1].Wq.weight.requires_grad_(False)
    layers[2].Wk.weight.requires_grad_(False)
    layers[3].requires_grad_(False)
    assert_right(layers, x, backend)
    assert_right(layers, x.detach(), backend)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_maps_laid_out_otherwise(form, backend):
    """A slice as input, and output gradients that are expanded, transposed or sliced."""
    layers, _ = make_stage((2, 12, 6, 8), 3, 4, torch.float32)
    wide = torch.randn(2, 15, 6, 8).contiguous(memory_format=form).requires_grad_()

    def step(layers, wide, **_):
        outs, _ = run_stage(layers, wide[:, 1:13], residual=False)
        loss = outs[0].double().sum() + outs[1].transpose(2, 3).contiguous().double().square().sum()
        loss = loss + outs[2][:, ::2].double().sum()
        found = torch.autograd.grad(loss, [wide, *layers.parameters()])
        kinds = {"x": found[:1], "wq, wk": found[1::3] + found[2::3], "wv": found[3::3]}
        return {k: torch.cat([g.double().cpu().flatten() for g in gs]) for k, gs in kinds.items()}

    assert_right(layers, wide, backend, step)


def test_memory_formats_of_the_layers_in_turns(backend):
    layers, x = make_stage((2, 16, 6, 8), 3, 4, torch.float32)

    def step(layers, x, **_):
        history, y = ek.LayerHistory(), x
        for i, layer in enumerate(layers):
            y = layer(y.contiguous(memory_format=FORMS[i % 2]), history, residual=True)
        found = torch.autograd.grad(y.double().square().sum(), [x, *layers.parameters()])
        kinds = {"out": [y], "x": found[:1], "filters": found[1:]}
        return {k: torch.cat([g.double().cpu().flatten() for g in gs]) for k, gs in kinds.items()}

    assert_right(layers, x, backend, step)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_samples_are_dropped(form, backend):
    blocks, x = make_blocks((16, 12, 6, 7), 3, 4, torch.float32, form, drop_path=0.4)
    blocks, x = blocks.to(DEVICE), on_device(x)
    found = layers_step(blocks, x)
    with ek.use_backend("eager"):  # in the same dtype on the same device: others draw others
        expected = layers_step(blocks, x)
    for kind, want in expected.items():
        assert (found[kind] - want).norm() <= 1e-4 * want.norm() + 1e-5, kind
    first = found["output 0"].view(16, -1) == x.detach().double().cpu().flatten(1)
    assert 0 < int(first.all(1).sum()) < 16


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [make_stage, make_blocks], ids=["layers", "blocks"])
def test_the_same_step_gives_the_same_bits(make, dtype, form):
    modules, x = make((8, 32, 28, 28), 3, 8, dtype, form)
    modules, x = modules.to(DEVICE), on_device(x)
    first = layers_step(modules, x)
    for _ in range(3):
        again = layers_step(modules, x)
        for kind, want in first.items():
            assert torch.equal(again[kind], want), kind


def test_a_second_backward_and_accumulated_gradients(backend):
    layers, x = make_stage((2, 12, 6, 7), 3, 4, torch.float32)
    layers, x = layers.to(DEVICE), on_device(x)
    outs, _ = run_stage(layers, x)
    leaves = [x, *layers.parameters()]
    loss = outs[-1].square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    part = torch.autograd.grad(outs[1].square().sum(), leaves[:4], retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = torch.autograd.grad(run_stage(layers[:2], x)[0][1].square().sum(), leaves[:4])
    assert all(torch.equal(a, b) for a, b in zip(part, alone, strict=True))
    for _ in range(2):
        run_stage(layers, x)[0][-1].square().sum().backward()
    for leaf, once in zip(leaves, first, strict=True):
        assert torch.equal(leaf.grad, 2 * once)


@pytest.mark.parametrize("make", [make_stage, make_blocks], ids=["layers", "blocks"])
def test_recomputed_layers(make, layers_ran):
    modules, x = make((2, 12, 6, 7), 3, 4, torch.float32)
    modules, x = modules.to(DEVICE), on_device(x)
    run = run_stage if make is make_stage else run_blocks

    def gradients(through):
        outs, _ = run(copy.deepcopy(modules), x, through=through)
        return torch.autograd.grad(outs[-1].square().sum(), x)[0]

    plain = gradients(lambda f, *args: f(*args))
    assert torch.equal(gradients(partial(checkpoint, use_reentrant=False)), plain)
    assert layers_ran.count("layer") == 9


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, form, layers_ran):
    blocks, x = make_blocks((2, 12, 6, 7), 3, 4, torch.float32, form)
    blocks, x = blocks.to(DEVICE).eval(), on_device(x)
    expected = run_blocks(blocks, x)[0][-1].detach()
    layers_ran.clear()
    with mode():
        outs, history = run_blocks(blocks, x.detach())
        # The same sums in the same order; a block may be ended in another launch.
        torch.testing.assert_close(outs[-1], expected, rtol=1e-5, atol=1e-5)
        held = [weakref.ref(v) for v in history.values]
        del history
    gc.collect()
    assert all(value() is None for value in held)
    assert layers_ran == ["layer"] * 3


def test_hooks_on_the_parts_are_called(backend):
    layers, x = make_stage((2, 12, 6, 7), 2, 4, torch.float32)
    called = []
    layers[0].Wv.register_forward_hook(lambda *a: called.append("hook"))
    layers, x = layers.to(DEVICE), on_device(x)
    run_stage(layers, x)[0][-1].sum().backward()
    assert called == ["hook"]
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_statistics_of_values_far_from_zero(form, backend):
    """A difference of two large sums would lose the variance: 1e4 squared times a float's precision is ten."""
    block = ek.ELA(16, 8).to(DEVICE)
    block.norm.momentum = 1.0  # running statistics are then those of the batch
    with torch.no_grad():
        block.attn.Wv.weight.zero_()[:, :, 1, 1] = 1.0
    x = (1e4 + torch.randn(4, 16, 10, 15, device=DEVICE)).contiguous(memory_format=form)
    block(x, ek.LayerHistory())
    variance, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(block.norm.running_mean.double(), mean, rtol=1e-6, atol=0)
    # The values themselves are rounded to 1e-3.
    torch.testing.assert_close(block.norm.running_var.double(), variance, rtol=1e-3, atol=0)


def test_numbers_that_are_none_pass_through(backend):
    block = ek.ELA(16, 8).to(DEVICE).eval()
    x = torch.randn(2, 16, 5, 6, device=DEVICE)
    x[0, 3, 2, 2] = torch.nan
    out = block(x, ek.LayerHistory())
    assert out[0].isnan().any()
    assert not out[1].isnan().any()
