"""Stages on channels_last maps of every size that the CPU kernels treat differently, against eager PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_stages import assert_as_close, gradients, make_stage, run_stage

import ela_kernels as ek
from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

# Shape and channels of a head. A line of the convolution is a row; rows come sixteen at a time, channels in strips that
# are wider the fewer positions there are.
SIZES = [
    ((2, 5, 7, 1), 5),
    ((2, 5, 1, 7), 1),
    ((1, 33, 1, 1), 11),
    ((3, 36, 2, 3), 9),
    ((2, 100, 17, 6), 20),  # a second block of one row
    ((1, 45, 40, 3), 15),  # three blocks
    ((1, 70, 18, 33), 7),  # several strips, the last of six channels
    ((1, 1090, 4, 4), 109),  # more channels than the widest strip has
    ((2, 2050, 1, 2), 1025),
]


def results(layers, x):
    outs, history = run_stage(layers, x)
    loss = outs[-1].double().square().sum() + outs[0].double().sin().sum()
    loss = loss + history.kl.double().sum()
    return [*outs, history.weights, *gradients(loss, [x, *layers.parameters()])]


def compared(shape, head_dim, dtype, depth):
    layers, x = make_stage(shape, depth, head_dim, dtype, torch.channels_last)
    found = results(layers, x)
    with ek.use_backend("eager"):
        plain = results(layers, x)
        exact = results(copy.deepcopy(layers).double(), x.detach().double().requires_grad_())
    return found, plain, exact


@pytest.mark.parametrize(("shape", "head_dim"), SIZES, ids=str)
def test_float64(shape, head_dim):
    """Nine layers: a value's gradient is gathered from one source to nine."""
    found, plain, _ = compared(shape, head_dim, torch.float64, 9)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SIZES[3:7], ids=str)
def test_other_dtypes(shape, head_dim, dtype):
    found, plain, exact = compared(shape, head_dim, dtype, 2)
    assert_as_close(found, plain, exact, dtype)
