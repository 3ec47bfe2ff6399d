"""depth_mix under autocast, in inference mode and under torch.func."""

from __future__ import annotations

import pytest
import torch
from support.mixes import WEIGHTS, Mix, assert_mixed, evaluate, make_mix
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import ela_kernels as ek


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", WEIGHTS)
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(form, dtype):
    mix = make_mix(form=form)
    weights, *values = (x.requires_grad_() for x in mix.inputs().values())
    with torch.autocast("cpu", dtype=dtype):
        out = ek.depth_mix(weights, values)
    assert out.dtype == dtype
    # What autocast does by hand: the same call on rounded values; weights stay as wide as sums are.
    half = Mix(
        mix.weights.detach(), [v.detach().to(dtype) for v in values], dout=mix.dout.to(dtype)
    )
    half.wanted = mix.wanted
    expected = evaluate(half)
    assert torch.equal(out, expected["out"])
    gradients = torch.autograd.grad(out, [weights, *values], half.dout)
    for (name, x), g in zip(mix.inputs().items(), gradients, strict=True):
        assert g.dtype == x.dtype == torch.float32
        assert torch.equal(g, expected["d " + name].float()), name


@pytest.mark.usefixtures("backend")
def test_autocast_leaves_float64_alone():
    mix = make_mix(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_mixed(evaluate(mix), mix)


@pytest.mark.usefixtures("backend")
def test_inference_mode():
    mix = make_mix()
    expected = evaluate(mix)["out"]
    with torch.inference_mode():
        assert torch.equal(ek.depth_mix(mix.weights, mix.values), expected)


def transformed(name: str, mix: Mix) -> list[Tensor]:
    weights, values = mix.weights, mix.values
    if name == "vmap":
        return [
            vmap(lambda w, *v: ek.depth_mix(w, v))(
                torch.stack((weights, 2 * weights)), *(torch.stack((v, v.sin())) for v in values)
            )
        ]
    if name == "vmap over weights":
        return [vmap(lambda w: ek.depth_mix(w, values))(torch.stack((weights, 2 * weights)))]
    if name == "grad":
        return [grad(lambda w: ek.depth_mix(w, values).square().sum())(weights)]
    if name == "jvp":
        return list(jvp(lambda w: ek.depth_mix(w, values), (weights,), (weights.cos(),)))
    with forward_ad.dual_level():
        value = forward_ad.make_dual(values[0], values[0].cos())
        return list(forward_ad.unpack_dual(ek.depth_mix(weights, [value, *values[1:]])))


TRANSFORMS = ["vmap", "vmap over weights", "grad", "jvp", "forward mode"]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("wide", [True, False])
def test_transforms_run_in_pytorch(name, wide):
    mix = make_mix(dtype=torch.float32 if wide else torch.bfloat16, wide=wide)
    found = transformed(name, mix)
    with ek.use_backend("eager"):
        expected = transformed(name, mix)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_forced_backend_refuses_transforms(name):
    with ek.use_backend("cpp"), pytest.raises(ValueError, match=r"torch\.func"):
        transformed(name, make_mix())
