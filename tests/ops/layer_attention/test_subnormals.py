"""Weights below the least normal number: they are kept, and count as none in sums over maps."""

from __future__ import annotations

import pytest
import torch

import ela_kernels as ek

TINY = torch.finfo(torch.float32).tiny
pytestmark = pytest.mark.usefixtures("kernels")


def distant_scores(requires_grad: bool = False) -> tuple[list[torch.Tensor], ...]:
    """Two layers; the first has a weight of about 1e-40 in every head."""
    torch.manual_seed(0)
    q = torch.ones(2, 8)
    keys = [torch.full((2, 8), -92.0 / 2**1.5), torch.zeros(2, 8)]
    values = [torch.randn(2, 8, 5, 7) for _ in keys]
    tensors = [q, *keys, *values]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)
    return [q], keys, values


def test_weights_keep_them():
    (q,), keys, values = distant_scores()
    with ek.use_backend("cpp"):
        r = ek.layer_attention(q, keys, values, heads=1)
    assert ((r.weights[..., 0] > 0) & (r.weights[..., 0] < TINY)).all()
    torch.testing.assert_close(r.out, values[1])


def test_gradients_are_those_of_eager():
    found = []
    for backend in ("cpp", "eager"):
        (q,), keys, values = distant_scores(requires_grad=True)
        with ek.use_backend(backend):
            out = ek.layer_attention(q, keys, values, heads=1).out
        found.append(torch.autograd.grad(out.square().sum(), [q, *keys, *values]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_they_count_as_none(form):
    """What such a weight would give, 2e-40 * 1e30 and more, is left out beside a value of zero."""
    (q,), keys, values = distant_scores()
    values = [torch.full((2, 8, 5, 7), x).contiguous(memory_format=form) for x in (1e30, 0.0)]
    with ek.use_backend("cpp"):
        out = ek.layer_attention(q, keys, values, heads=1).out
    assert torch.equal(out, torch.zeros_like(out))
