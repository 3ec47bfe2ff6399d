"""Whole layers, blocks and training steps: on the stream in force, without waiting, and replayed from CUDA graphs."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.layer_stages import FORMS, run_blocks
from support.on_gpu import DEVICE, captured, same_bits, serving
from torch import nn

import ela_kernels as ek
from ela_kernels.models import CifarResNet
from ela_kernels.models.blocks import MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("cuda_only", "backend", "exact_convolutions"),
]

_LONG = 1_000_000_000  # half a second at 2 GHz
SHAPE = (4, 32, 14, 14)


def make_blocks(form=FORMS[0], skip=()):
    torch.manual_seed(2)
    blocks = nn.ModuleList(ek.ELA(SHAPE[1], 8) for _ in range(4)).to(DEVICE)
    for i in skip:
        blocks[i].skipped = True
    return blocks, new_map(form).requires_grad_(), new_map(form)


def new_map(form, dtype=torch.float32):
    return torch.randn(SHAPE, device=DEVICE, dtype=dtype).contiguous(memory_format=form)


def block_step(blocks, x, dout, autocast=False):
    """Output, divergence, gradients; the running statistics move on."""
    with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        outs, history = run_blocks(blocks, x)
    leaves = [x, *(p for p in blocks.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(outs[-1], leaves, dout.to(outs[-1].dtype), allow_unused=True)
    return [outs[-1].detach(), history.kl.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_stage_of_blocks_replays_from_a_graph(autocast, form):
    """Changed inputs, one layer that only provides, and running statistics that move with every replay."""
    blocks, x, dout = make_blocks(form, skip=(2,))
    if autocast:
        x = x.detach().bfloat16().requires_grad_()
    replay, found = captured(lambda: block_step(blocks, x, dout, autocast))
    twin = copy.deepcopy(blocks)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            dout.copy_(torch.randn_like(dout))
            for result in found:
                result.fill_(float("nan"))
        replay()
        expected = block_step(twin, x, dout, autocast)
        for a, b in zip(found, expected, strict=True):
            assert not b.isnan().any()
            assert same_bits(a, b)
        for a, b in zip(blocks.buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b)
    assert int(blocks[0].norm.num_batches_tracked) == int(twin[0].norm.num_batches_tracked)


def test_a_stage_of_layers_replays_from_a_graph():
    torch.manual_seed(2)
    layers = nn.ModuleList(ek.LayerAttention(SHAPE[1], 8) for _ in range(4)).to(DEVICE)
    x, dout = new_map(FORMS[0]).requires_grad_(), new_map(FORMS[0])

    def step():
        history, y = ek.LayerHistory(), x
        for layer in layers:
            y = layer(y, history, residual=True)
        grads = torch.autograd.grad(y, [x, *layers.parameters()], dout, allow_unused=True)
        return [y.detach(), *(g for g in grads if g is not None)]

    replay, found = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    replay()
    for a, b in zip(found, step(), strict=True):
        assert same_bits(a, b)


@pytest.mark.usefixtures("light_backend")
def test_a_stage_of_light_layers_replays_from_a_graph():
    torch.manual_seed(2)
    blocks = nn.ModuleList(MRLALight(ek.LightLayerAttention(SHAPE[1], 8), 0.0) for _ in range(3))
    blocks, x, dout = blocks.to(DEVICE), new_map(FORMS[0]).requires_grad_(), new_map(FORMS[0])

    def step():
        previous, y = PreviousOutput(), x
        for block in blocks:
            y = block(y, previous)
        return [y.detach(), *torch.autograd.grad(y, [x, *blocks.parameters()], dout)]

    replay, found = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    replay()
    # Where eager PyTorch serves, its convolutions may take another way inside a graph.
    for a, b in zip(found, step(), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("attention", ["ela", "mrla", "mrla_light"])
def test_a_whole_training_step_replays_from_a_graph(attention, backend):
    """Forward, backward and the optimizer, in bfloat16 autocast and channels_last, as a training script captures it."""
    ek.use_backend(serving(backend, attention))
    torch.manual_seed(5)
    network = CifarResNet((2, 2), (16, 32), attention=attention, head_dim=8)
    network = network.to(DEVICE, memory_format=torch.channels_last).train()
    images = torch.randn(8, 3, 16, 16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (8,), device=DEVICE)
    twin = copy.deepcopy(network)

    def stepper(network):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        return step

    replay, (loss,) = captured(stepper(network), warmup=3)
    eager = stepper(twin)
    for _ in range(3):  # the warm-up of the capture was real steps
        eager()
    losses = []
    for seed in range(4):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        images.copy_(torch.randn(images.shape, device=DEVICE, generator=generator))
        replay()
        (expected,) = eager()
        losses.append((float(loss), float(expected)))
    # The same steps; PyTorch's convolutions in bfloat16 may add up in another order inside a graph.
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=0.02)
    for a, b in zip(network.buffers(), twin.buffers(), strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm() + 1e-3


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_blocks_run_on_the_current_stream(form):
    """The input is made late on a side stream: a kernel on any other stream would read what was there before."""
    blocks, x, dout = make_blocks(form)
    blocks.eval()  # no running statistics to move
    fresh = torch.randn_like(x)
    block_step(blocks, x, dout)  # compiles and loads, which may wait for the device
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(_LONG)
        with torch.no_grad():
            x.copy_(fresh)
        found = block_step(blocks, x, dout)
        event = side.record_event()
    # What dies with a call belongs to the side stream: the allocator may not give it away yet.
    noise = [torch.full(SHAPE, float("nan"), device=DEVICE) for _ in range(50)]
    assert not event.query(), "the host waited for the device"
    event.synchronize()
    torch.cuda.synchronize()
    assert noise[0].isnan().all()
    for a, b in zip(found, block_step(blocks, x, dout), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_never_waits_for_the_device(autocast, form):
    blocks, x, dout = make_blocks(form, skip=(1,))
    for block in blocks:
        block.drop_path.p = 0.2

    def both():
        block_step(blocks.train(), x, dout, autocast)
        with torch.no_grad():
            run_blocks(blocks.eval(), x)

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_of_the_tensors_and_not_the_current_one_is_used():
    blocks, x, dout = make_blocks()
    there = copy.deepcopy(blocks).to("cuda:1")
    moved = x.detach().to("cuda:1").requires_grad_()
    expected = block_step(blocks, x, dout)
    assert torch.cuda.current_device() == 0
    for a, b in zip(block_step(there, moved, dout.to("cuda:1")), expected, strict=True):
        assert a.device == moved.device
        assert same_bits(a.cpu(), b.cpu())
