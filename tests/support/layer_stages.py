"""Stages of layers and of whole blocks, as the kernels of a layer are tested on them."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

import ela_kernels as ek
from ela_kernels.models.blocks import MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

FORMS = [torch.contiguous_format, torch.channels_last]


def make_stage(shape, depth=3, head_dim=None, dtype=torch.float64, form=FORMS[0]):
    torch.manual_seed(1)
    channels = shape[1]
    layers = nn.ModuleList(
        ek.LayerAttention(channels, head_dim or channels) for _ in range(depth)
    ).to(dtype)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=form)
    return layers, x.requires_grad_()


def run_stage(layers, x, residual=True, skip=(), through=lambda f, *a: f(*a)):
    history, outs = ek.LayerHistory(), []
    for i, layer in enumerate(layers):
        if i in skip:
            layer.provide(x, history)
            continue
        x = through(layer, x, history, residual)
        outs.append(x)
    return outs, history


def make_blocks(shape, depth=3, head_dim=None, dtype=torch.float64, form=FORMS[0], **options):
    torch.manual_seed(2)
    channels = shape[1]
    blocks = nn.ModuleList(
        ek.ELA(channels, head_dim or channels, **options) for _ in range(depth)
    ).to(dtype)
    for block in blocks:
        if getattr(block.norm, "weight", None) is not None:
            nn.init.normal_(block.norm.weight, 1.0, 0.5)
            nn.init.normal_(block.norm.bias)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=form)
    return blocks, x.requires_grad_()


def run_blocks(blocks, x, through=lambda f, *a: f(*a)):
    history, outs = ek.LayerHistory(), []
    for block in blocks:
        x = through(block, x, history)
        outs.append(x)
    return outs, history


def gradients(loss, inputs, **kwargs):
    found = torch.autograd.grad(loss, inputs, allow_unused=True, **kwargs)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def step(blocks, x):
    """Outputs, gradients and the blocks' buffers of a forward and backward pass on copies of the blocks."""
    blocks = copy.deepcopy(blocks)
    torch.manual_seed(5)  # of the drop path
    outs, history = run_blocks(blocks, x)
    loss = outs[-1].square().sum() + outs[0].sin().sum()
    if history.kl is not None:
        loss = loss + history.kl.sum() + history.weights.square().sum()
    parameters = [p for p in blocks.parameters() if p.requires_grad]
    buffers = [b.double() for b in blocks.buffers()]
    return [*outs, *gradients(loss, [x, *parameters]), *buffers]


def assert_as_close(found, plain, exact, dtype, factor=4, names=None):
    """`found` is as close to float64 as `plain`, what the same modules give in that dtype without the kernels.

    Several times, since a filter's gradient is three numbers, sums of hundreds with cancellation, whose errors scatter.
    """
    names = itertools.count() if names is None else names
    for i, a, b, truth in zip(names, found, plain, exact, strict=False):
        scale = truth.norm() * torch.finfo(dtype).eps
        assert a.dtype == b.dtype, i
        error, allowed = (a.double() - truth).norm(), factor * (b.double() - truth).norm() + scale
        assert error <= allowed, f"{i}: {error:.3g} from float64, allowed is {allowed:.3g}"


def autocast_results(run, modules, x, dtype):
    """Outputs, divergence, gradients and buffers under autocast: of the kernels, without them, and in float64 proper.

    `run` is :func:`run_stage`, :func:`run_blocks`, or what gives outputs alone and None for a history.
    """

    def results(modules, x, enabled):
        modules = copy.deepcopy(modules)
        with torch.autocast(x.device.type, dtype, enabled=enabled):
            outs, history = run(modules, x)
        loss = outs[-1].double().square().sum() + outs[0].double().sin().sum()
        attended = []
        if history is not None:
            loss = loss + history.kl.sum()
            attended = [history.weights, history.kl]
        inputs = [t for t in (x, *modules.parameters()) if t.requires_grad]
        buffers = [b.double() for b in modules.buffers()]
        return [*outs, *attended, *gradients(loss, inputs), *buffers]

    found = results(modules, x, True)
    with ek.use_backend("eager"):
        plain = results(modules, x, True)
        leaf = x.detach().double().requires_grad_(x.requires_grad)
        exact = results(copy.deepcopy(modules).double(), leaf, False)
    return found, plain, exact


def make_light_blocks(shape, depth=3, head_dim=None, dtype=torch.float64, drop_path=0.0):
    torch.manual_seed(2)
    channels = shape[1]
    blocks = nn.ModuleList(
        MRLALight(ek.LightLayerAttention(channels, head_dim or channels), drop_path)
        for _ in range(depth)
    ).to(dtype)
    for block in blocks:
        nn.init.normal_(block.norm.weight, 1.0, 0.5)
        nn.init.normal_(block.norm.bias)
    return blocks, torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def light_step(blocks, x):
    """As :func:`step`, of light blocks."""
    blocks = copy.deepcopy(blocks)
    torch.manual_seed(5)  # of the drop path
    previous, outs, y = PreviousOutput(), [], x
    for block in blocks:
        y = block(y, previous)
        outs.append(y)
    loss = outs[-1].square().sum() + outs[0].sin().sum()
    wanted = [t for t in (x, *blocks.parameters()) if t.requires_grad]
    return [*outs, *gradients(loss, wanted), *(b.double() for b in blocks.buffers())]


def layer_step(layers, x, residual=True, skip=()):
    """Outputs, weights and gradients of a forward and backward pass."""
    outs, history = run_stage(layers, x, residual, skip)
    loss = outs[-1].square().sum() + outs[0].sin().sum() + history.weights.square().sum()
    if history.kl is not None:
        loss = loss + history.kl.sum()
    wanted = [t for t in (x, *layers.parameters()) if t.requires_grad]
    return [*outs, history.weights, *gradients(loss, wanted)]


# Float32 against float64: sums of a few hundred products of order one and their gradients through at most five layers.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: `factor` of assert_as_close in bfloat16.
INTERPRETED = 32


def check(run, modules, x, factor=4):
    """`run(modules, x)` on the kernels gives what eager PyTorch gives in float64; in half precision as nearly as it."""
    found = run(copy.deepcopy(modules), x)
    with ek.use_backend("eager"):
        plain = run(copy.deepcopy(modules), x)
        exact_x = x.detach().double().requires_grad_(x.requires_grad)
        exact = run(copy.deepcopy(modules).double(), exact_x)
    if x.dtype == torch.float32:
        for i, (a, b, truth) in enumerate(zip(found, plain, exact, strict=True)):
            assert a.dtype == b.dtype, i
            torch.testing.assert_close(
                a.double(), truth, **TOLERANCE, msg=lambda m, i=i: f"{i}: {m}"
            )
    else:
        assert_as_close(found, plain, exact, x.dtype, factor)


def recorded_calls(monkeypatch, kernels, names):
    """What the methods of a backend are called for from now on, in order."""
    made = []
    for name in names:
        real = getattr(kernels, name)
        # Not setattr(): of an instance it would leave a bound method behind.
        monkeypatch.setitem(
            vars(kernels), name, lambda *a, n=name, r=real, **k: (made.append(n), r(*a, **k))[1]
        )
    return made


def network_gradients(network, images, autocast=True):
    """Of the parameters of a copy of a classifier, in bfloat16 where autocast has it so."""
    network = copy.deepcopy(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = network(images).float().logsumexp(1).sum()
    loss.backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def assert_as_close_together(found, plain, exact):
    """Gradients of a network: errors of a few bits at each of ten layers, in one draw each."""
    together = [torch.cat([g.double().flatten() for g in gs])[None] for gs in (found, plain, exact)]
    assert_as_close([together[0]], [together[1]], [together[2]], torch.bfloat16)
