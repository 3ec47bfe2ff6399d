"""The light form: a gated value plus the decayed output of the layer before."""

from __future__ import annotations

import pytest
import torch

import ela_kernels as ek


def arguments(shape=(2, 12, 5, 7), dtype=torch.float32):
    return [
        torch.randn(shape[:2]).to(dtype),
        torch.randn(shape[:2]).to(dtype),
        torch.randn(shape).to(dtype),
        torch.randn(shape).to(dtype),
        torch.randn(shape[1], *[1] * (len(shape) - 2)).to(dtype),
    ]


def by_hand(q, k, v, prev_out, decay, heads, scale=None):
    """In float64, channel by channel."""
    q, k, v, prev_out, decay = (x.double() for x in (q, k, v, prev_out, decay))
    head_dim = q.shape[1] // heads
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty_like(v)
    for c in range(q.shape[1]):
        head = slice(c // head_dim * head_dim, (c // head_dim + 1) * head_dim)
        gate = 1 / (1 + (-scale * (q[:, head] * k[:, head]).sum(1)).exp())
        gate = gate.reshape(-1, *[1] * (v.dim() - 2))
        out[:, c] = gate * v[:, c] + decay.reshape(-1)[c] * prev_out[:, c]
    return out


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "shape", [(2, 12, 5, 7), (1, 12, 1, 1), (3, 12, 9), (2, 12, 2, 3, 4), (0, 12, 4, 4)], ids=str
)
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_formula(shape, heads, dtype):
    inputs = arguments(shape, dtype)
    out = ek.light_layer_attention(*inputs, heads)
    assert out.dtype == dtype
    assert out.shape == shape
    # float32 inside (12 terms in a score below 16, two products), then one rounding to the dtype.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(
        out.double(), by_hand(*inputs, heads), rtol=torch.finfo(dtype).eps, atol=64 * eps
    )


@pytest.mark.parametrize("scale", [0.0, 2.0, -0.5])
def test_scales(scale):
    inputs = arguments()
    out = ek.light_layer_attention(*inputs, 3, scale)
    torch.testing.assert_close(out.double(), by_hand(*inputs, 3, scale), rtol=1e-6, atol=1e-5)


def test_scale_zero_halves_the_value():
    q, k, v, prev_out, decay = arguments()
    out = ek.light_layer_attention(q, k, v, prev_out, torch.zeros_like(decay), 3, 0.0)
    assert torch.equal(out, v / 2)


def test_a_decay_of_one_dimension_is_the_same():
    q, k, v, prev_out, decay = arguments()
    expected = ek.light_layer_attention(q, k, v, prev_out, decay, 3)
    assert torch.equal(ek.light_layer_attention(q, k, v, prev_out, decay.flatten(), 3), expected)


def test_channels_last_maps():
    q, k, v, prev_out, decay = arguments()
    expected = ek.light_layer_attention(q, k, v, prev_out, decay, 3)
    v, prev_out = (x.to(memory_format=torch.channels_last) for x in (v, prev_out))
    out = ek.light_layer_attention(q, k, v, prev_out, decay, 3)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)


def test_derivatives():
    inputs = [x.requires_grad_() for x in arguments((2, 4, 3), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: ek.light_layer_attention(*x, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: ek.light_layer_attention(*x, 2), inputs)


def test_meta_tensors_carry_shapes():
    out = ek.light_layer_attention(*(x.to("meta") for x in arguments(dtype=torch.float16)), 3)
    assert out.is_meta
    assert (out.shape, out.dtype) == ((2, 12, 5, 7), torch.float16)
