"""torch.func, forward-mode derivatives and tracing: a kernel, which reads memory, must not pass them by in silence."""

from __future__ import annotations

import pytest
import torch
from support.layer_stages import make_blocks, make_light_blocks, make_stage, run_blocks, run_stage
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


class Stage(nn.Module):
    def __init__(self, kind):
        super().__init__()
        make = {"layer": make_stage, "block": make_blocks, "light_block": make_light_blocks}[kind]
        self.layers, self.x = make((2, 6, 4, 5), 2, 3)
        self.x = self.x.detach()
        self.kind = kind
        self.eval()

    def forward(self, x):
        if self.kind == "light_block":
            previous = PreviousOutput()
            for layer in self.layers:
                x = layer(x, previous)
            return x
        run = run_stage if self.kind == "layer" else run_blocks
        return run(self.layers, x)[0][-1]


def forward_mode(stage):
    with forward_ad.dual_level():
        out = stage(forward_ad.make_dual(stage.x, stage.x.cos()))
        return list(forward_ad.unpack_dual(out))


def forward_mode_of_a_weight(stage):
    name, weight = next(iter(stage.named_parameters()))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
        out = functional_call(stage, {name: dual}, (stage.x,))
        return [forward_ad.unpack_dual(out).tangent]


def many_weights(stage):
    weights = {n: torch.stack((p, 2 * p)).detach() for n, p in stage.named_parameters()}
    return [vmap(lambda w: functional_call(stage, w, (stage.x,)))(weights)]


def traced(stage):
    run = torch.jit.trace(stage, stage.x, check_trace=False)
    return [run(stage.x.sin())]


TRANSFORMS = {
    "forward mode": forward_mode,
    "forward mode of a weight": forward_mode_of_a_weight,
    "jvp": lambda stage: jvp(stage, (stage.x,), (stage.x.cos(),)),
    "vmap": lambda stage: [vmap(stage)(torch.stack((stage.x, stage.x.sin())))],
    "vmap over weights": many_weights,
    "grad": lambda stage: [grad(lambda x: stage(x).square().sum())(stage.x)],
    "trace": traced,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("kind", ["layer", "block", "light_block"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_run_in_pytorch(transform, kind, with_grad):
    stage = Stage(kind)
    with torch.set_grad_enabled(with_grad):
        found = TRANSFORMS[transform](stage)
        with ek.use_backend("eager"):
            expected = TRANSFORMS[transform](stage)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_forced_backend_refuses(transform):
    stage = Stage("layer")
    with torch.no_grad(), ek.use_backend("cpp"), pytest.raises(ValueError, match=r"torch\.func"):
        TRANSFORMS[transform](stage)


@pytest.mark.parametrize("kind", ["layer", "block", "light_block"])
def test_batched_gradients_are_refused(kind):
    stage = Stage(kind)
    x = stage.x.requires_grad_()
    out = stage(x)
    many = torch.stack((torch.ones_like(out), out.detach()))
    with pytest.raises(RuntimeError, match=r"batched gradients.*use_backend\('eager'\)"):
        torch.autograd.grad(out, x, many, is_grads_batched=True)


def _values() -> list[torch.Tensor]:
    return [torch.randn(2, 6, 4, requires_grad=True) for _ in range(3)]


def _of_op(values):
    keys = [v.mean(2) for v in values]
    prev = torch.ones(2, 2, 1)
    found = ek.layer_attention(keys[-1], keys, values, heads=2, prev_weights=prev)
    return found.out, found.weights, found.kl


def _of_history(values):
    history = ek.LayerHistory()
    outs = [history.attend(v.mean(2), v.mean(2), v, heads=2) for v in values]
    return outs[-1], history.weights, history.kl


def _of_positions(values):
    found = ek.position_attention(torch.ones(4), values, prev_weights=torch.ones(2, 1, 6))
    return found.out, found.weights, found.kl, found.kl_mean


def _of_position_history(values):
    history = ek.PositionHistory()
    for v in values:
        history.append(v)
        out = history.attend(torch.ones(4))
    return out, history.weights, history.kl


OPS = {
    "layer_attention": _of_op,
    "LayerHistory": _of_history,
    "depth_mix": lambda values: (ek.depth_mix(torch.ones(3, requires_grad=True), values),),
    "position_attention": _of_positions,
    "PositionHistory": _of_position_history,
}


@pytest.mark.parametrize("op", OPS)
def test_batched_gradients_of_each_output_are_refused(op):
    values = _values()
    with ek.use_backend("cpp"):
        outputs = OPS[op](values)
        for out in outputs:
            many = torch.stack((torch.ones_like(out), out.detach()))
            with pytest.raises(RuntimeError, match=r"batched gradients.*use_backend\('eager'\)"):
                torch.autograd.grad(out, values[0], many, is_grads_batched=True, retain_graph=True)
