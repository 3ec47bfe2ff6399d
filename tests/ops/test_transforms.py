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
