"""position_attention where its gradients are so large that they are stored past the caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ela_kernels as ek

STORED_PAST_CACHES = 8 * 2**20  # bytes, as in csrc/cpu/position_backward.h
DEPTH = 5


def gradients(
    query: Tensor, values: list[Tensor], dout: Tensor, channels_last: bool, given_keys: bool
) -> list[Tensor]:
    """Of the values, and of keys where they are given."""
    leaves = [v.detach().requires_grad_() for v in values]
    keys = [v.detach().requires_grad_() for v in values] if given_keys else None
    r = ek.position_attention(query, leaves, keys, channels_last=channels_last)
    return [*torch.autograd.grad(r.out, [*leaves, *(keys or ())], dout)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("given_keys", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        # Channels and positions that make whole lines of cache, and some that make none.
        ((8, 512, 128), "tokens"),
        ((8, 500, 131), "tokens"),
        ((8, 64, 32, 32), "planar"),
        ((8, 67, 31, 33), "planar"),
        ((8, 67, 31, 33), "channels_last"),
    ],
)
def test_large_gradients_are_those_of_each_sample_alone(shape, form, dtype, given_keys):
    torch.manual_seed(0)
    tokens = form == "tokens"

    def new() -> Tensor:
        batch = shape[0] * 4 // dtype.itemsize  # as many bytes in half precision
        made = torch.randn(batch, *shape[1:]).to(dtype)
        return (
            made.contiguous(memory_format=torch.channels_last) if form == "channels_last" else made
        )

    values = [new() for _ in range(DEPTH)]
    dout = torch.randn_like(values[0])
    query = torch.randn(shape[-1 if tokens else 1], dtype=dtype)
    total = sum(v.nbytes for v in values)
    assert total >= STORED_PAST_CACHES > (1 + given_keys) * total / len(dout)
    whole = gradients(query, values, dout, tokens, given_keys)
    for b in range(len(dout)):
        one = [v[b : b + 1] for v in values]
        alone = gradients(query, one, dout[b : b + 1], tokens, given_keys)
        for got, want in zip(whole, alone, strict=True):
            assert torch.equal(got[b : b + 1], want)
