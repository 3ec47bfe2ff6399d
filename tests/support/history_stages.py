"""Stages of layers that share a LayerHistory, run on the kernels and on the reference, and compared."""

import torch
from torch import nn

import ela_kernels as ek

HEADS, CHANNELS, BATCH, SIDE = 2, 6, 3, 4


class Layer(nn.Module):
    """A layer whose query, key and value all depend on the map before it."""

    def __init__(self, retrieves=True, scale=None, dtype=torch.float64):
        super().__init__()
        self.wq, self.wk = (
            nn.Parameter(torch.randn(CHANNELS, CHANNELS, dtype=dtype)) for _ in range(2)
        )
        self.wv = nn.Parameter(torch.randn(CHANNELS, 1, 1, dtype=dtype))
        self.retrieves, self.scale = retrieves, scale

    def forward(self, x, history):
        y = x.flatten(2).mean(-1)
        k, v = y @ self.wk, (x * self.wv).tanh()
        if not self.retrieves:
            history.provide(k, v, heads=HEADS, caller=self)
            return x
        out = history.attend(y @ self.wq, k, v, heads=HEADS, scale=self.scale, caller=self)
        return x + out


def make_layers(depth, skip=(), scales=None, dtype=torch.float64):
    torch.manual_seed(7)
    layers = nn.ModuleList(
        Layer(i not in skip, None if scales is None else scales[i], dtype) for i in range(depth)
    )
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE + 1, dtype=dtype, requires_grad=True)
    return layers, x


def assert_same(found, expected, rtol=1e-12, atol=1e-12):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), f"gradient {i}: {a} against {b}"
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, i=i: f"{i}: {m}")


def chained(backend, depth, *args):
    """:func:`make_layers` where a backend runs, in the widest dtype that it serves."""
    layers, x = make_layers(depth, *args, dtype=backend.exact)
    return layers.to(backend.device), x.detach().to(backend.device).requires_grad_()


def compare(backend, run):
    """`run()` on the kernels and on the reference; compares everything it returns."""
    found = run()
    with ek.use_backend("eager"):
        expected = run()
    assert_same(found, expected, **backend.tolerance)
    return found


def all_inputs(layers, x):
    return [x, *layers.parameters()]


def run_stage(layers, x, history=None, through=lambda f, *args: f(*args)):
    history = ek.LayerHistory() if history is None else history
    outs, weights, kls = [], [], []
    for layer in layers:
        x = through(layer, x, history)
        outs.append(x)
        weights.append(history.weights)
        kls.append(history.kl)
    return outs, weights, kls


def grads(loss, inputs, **kwargs):
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, **kwargs))
