"""LayerHistory on the device: the pull form's outputs and gradients against eager PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from support.on_gpu import (
    DEVICE,
    GPU_DTYPES,
    LeafStage,
    assert_as_close_as_rounding,
    same_bits,
)

import ela_kernels as ek
from ela_kernels.backends.dispatch import BACKENDS as DISPATCHED

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend", "poisoned_memory")]

CPU = torch.device("cpu")
FORMATS = {"planar": torch.contiguous_format, "interleaved": torch.channels_last}


def assert_right(stage, backend, dtype, used=None):
    expected = stage.results(CPU, "eager", torch.float64, used)
    found = stage.results(DEVICE, backend, used=used)
    assert_as_close_as_rounding(found, expected, dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "heads"), [((3, 12, 5, 7), 3), ((2, 37, 9, 8), 37), ((2, 32, 14, 14), 2)], ids=str
)
def test_outputs_and_gradients(shape, heads, dtype, memory_format, backend):
    stage = LeafStage(shape, 2, heads, dtype, FORMATS[memory_format])
    assert_right(stage, backend, dtype)


@pytest.mark.parametrize("depth", [1, 2, 3, 31, 33])
def test_depths(depth, backend):
    assert_right(LeafStage((2, 8, 3, 5), depth, 2, torch.float32), backend, torch.float32)


@pytest.mark.usefixtures("cuda_only")
def test_the_deepest_history(backend):
    stage = LeafStage((2, 8, 3, 5), DISPATCHED[backend].max_depth, 2, torch.float32)
    assert_right(stage, backend, torch.float32)


@pytest.mark.parametrize("shape", [(2, 9, 12), (2, 5, 3, 12)], ids=str)
def test_tokens(shape, backend):
    stage = LeafStage(shape, 3, 2, torch.float32, channels_last=True)
    assert_right(stage, backend, torch.float32)


@pytest.mark.parametrize("used", [(0,), (4,), (1, 3), (0, 2, 4)])
def test_outputs_that_the_loss_does_not_use(used, backend):
    stage = LeafStage((2, 12, 5, 3), 5, 3, torch.float32)
    assert_right(stage, backend, torch.float32, used)


@pytest.mark.parametrize("skip", [(1,), (0,), (2, 3), (4,)])
def test_layers_that_only_provide(skip, backend):
    stage = LeafStage((2, 12, 5, 3), 5, 3, torch.float32, skip=skip)
    assert_right(stage, backend, torch.float32)


def test_the_same_stage_gives_the_same_bits(backend):
    stage = LeafStage((4, 32, 14, 14), 6, 2, torch.bfloat16)
    first = stage.results(DEVICE, backend)
    for _ in range(3):
        for a, b in zip(stage.results(DEVICE, backend), first, strict=True):
            assert same_bits(a, b)


def test_each_layer_runs_once_in_each_direction(kernels_ran, backend):
    LeafStage((2, 12, 5, 3), 3, 3, torch.float32).results(DEVICE, backend)
    assert kernels_ran == ["forward"] * 3 + ["backward", "gather"] * 3


def test_expanded_and_strided_output_gradients(backend):
    stage = LeafStage((2, 12, 6, 4), 3, 3, torch.float32)

    def gradients(device, name, dtype):
        values = [v.to(device, dtype, copy=True).requires_grad_() for v in stage.values]
        history = ek.LayerHistory()
        with ek.use_backend(name):
            total = 0.0
            for q, k, v in zip(stage.queries, stage.keys, values, strict=True):
                out = history.attend(q.to(device, dtype), k.to(device, dtype), v, heads=3)
                total = total + out.sum() + out.transpose(2, 3)[:, :, ::2].square().sum()
            return [g.double().cpu() for g in torch.autograd.grad(total, values)]

    expected = gradients(CPU, "eager", torch.float64)
    assert_as_close_as_rounding(gradients(DEVICE, backend, torch.float32), expected, torch.float32)


def test_a_second_backward_over_a_retained_graph(backend):
    stage = LeafStage((2, 12, 5, 3), 4, 3, torch.float32)
    leaves = [v.to(DEVICE, copy=True).requires_grad_() for v in stage.values]
    history = ek.LayerHistory()
    outs = [
        history.attend(q.to(DEVICE), k.to(DEVICE), v, heads=3)
        for q, k, v in zip(stage.queries, stage.keys, leaves, strict=True)
    ]
    douts = [d.to(DEVICE) for d in stage.douts]
    first = torch.autograd.grad(outs, leaves, douts, retain_graph=True)
    part = torch.autograd.grad(outs[1], leaves[:2], douts[1], retain_graph=True)
    again = torch.autograd.grad(outs, leaves, douts)
    for a, b in zip(first, again, strict=True):
        assert same_bits(a, b)
    with ek.use_backend("eager"):
        kept = [v.detach().requires_grad_() for v in leaves[:2]]
        alone = ek.layer_attention(
            stage.queries[1].to(DEVICE), [k.to(DEVICE) for k in stage.keys[:2]], kept, 3
        ).out
        expected = torch.autograd.grad(alone, kept, douts[1])
    assert_as_close_as_rounding(
        [g.double().cpu() for g in part], [g.double().cpu() for g in expected], torch.float32
    )


def test_a_recomputed_layer_finds_its_place(backend):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(ek.LayerAttention(16, head_dim=8) for _ in range(4)).to(DEVICE)
    x = torch.randn(2, 16, 6, 5, device=DEVICE, requires_grad=True)

    def gradients(checkpointing):
        history, y = ek.LayerHistory(), x
        for layer in layers:
            if checkpointing:
                y = y + torch.utils.checkpoint.checkpoint(layer, y, history, use_reentrant=False)
            else:
                y = y + layer(y, history)
        # Not the depthwise filters: cuDNN may add their gradients up in another order every time.
        return torch.autograd.grad(y.square().sum(), [x, layers[0].Wq.weight, layers[3].Wk.weight])

    plain, checkpointed = gradients(False), gradients(True)
    assert_as_close_as_rounding(
        [g.double().cpu() for g in checkpointed],
        [g.double().cpu() for g in plain],
        torch.float32,
    )
