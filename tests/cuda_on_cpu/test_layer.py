"""Launches of whole layers and whole blocks on the CUDA kernels, run on the CPU, in any order.

What they compute is tested in tests/conformance.
"""

from __future__ import annotations

import pytest
import torch
from support.cuda_on_cpu import launched
from support.layer_stages import FORMS, make_blocks, make_stage, step

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_depend_on_no_order_and_no_grid(dtype, form, kernels):
    blocks, x = make_blocks((2, 12, 9, 7), 2, 3, dtype, form)
    first = step(blocks, x)
    for order, limit in ((0, 0), (1, 0), (3, 0), (2, 2)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        for i, (a, b) in enumerate(zip(first, step(blocks, x), strict=True)):
            assert torch.equal(a, b), f"{i} in order {order} with a limit of {limit}"


def test_launches_of_a_layer(kernels):
    """Of the last of two layers: its producer and its attention, and backward the two of each, and one that gathers."""
    layers, x = make_stage((2, 8, 4, 4), 2, 4, torch.float32)
    history = ek.LayerHistory()
    y = layers[0](x, history, residual=True)
    kernels.take_launches()
    out = layers[1](y, history, residual=True)
    assert launched(kernels)[0] == "layer_producer_fwd"
    torch.autograd.grad(out, [y, *layers[1].parameters()], torch.ones_like(out))
    assert launched(kernels) == [
        "layer_attention_bwd_dots",
        "layer_attention_bwd_tail",
        "layer_attention_bwd_gather",
        "layer_producer_bwd",
        "layer_filters_bwd",
    ]


def test_warming_up(ran):
    ek.warmup([(2, 8, 3, 4)], depth=2, head_dim=4, device="cpu")
    assert ran.count("cuda layer backward") == 2 * (1 + 2 + 2)
