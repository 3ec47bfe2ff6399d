"""Maps of more than 2^31 elements, and the memory that a stage takes. These tests need much of the device's memory."""

from __future__ import annotations

import gc

import pytest
import torch
from support.on_gpu import DEVICE

import ela_kernels as ek

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_only", "backend")]


@pytest.fixture(autouse=True)
def released(cuda_only):
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def needs(free_bytes):
    free = torch.cuda.mem_get_info()[0]
    if free < free_bytes:
        pytest.skip(f"needs {free_bytes / 1e9:.0f} GB of free device memory; {free / 1e9:.0f} are")


# Batches whose later samples begin beyond 2^31 elements, and one sample that is larger than that by itself; with an
# odd number of positions no row but the first begins at an aligned address.
LARGE = {
    "batch": ((3, 16, 47_000_000), 2),
    "sample": ((1, 16, 140_000_003), 4),
}
SAMPLED = 4096  # positions looked at, the first and the last among them


def positions_to_look_at(count):
    inside = torch.randint(0, count, (SAMPLED,), device=DEVICE)
    edges = torch.arange(64, device=DEVICE)
    return torch.cat((edges, inside, count - 1 - edges)).sort().values


def new_map(shape, interleaved):
    """Normal numbers; `[B, C, N]` with the channels of a position together where `interleaved`."""
    if interleaved:
        return torch.randn(shape[0], shape[2], shape[1], device=DEVICE, dtype=torch.bfloat16).mT
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def looked_at(x, places):
    return x.detach()[:, :, places].double()


def dots(dout, value, heads):
    """`<dout, value>` of each sample and head, in float64 over pieces that fit."""
    batch, channels, count = dout.shape
    total = torch.zeros(batch, heads, dtype=torch.float64, device=DEVICE)
    step = 2**22
    for start in range(0, count, step):
        piece = slice(start, start + step)
        product = dout[:, :, piece].float() * value[:, :, piece].float()
        total += product.reshape(batch, heads, channels // heads, -1).sum(
            (2, 3), dtype=torch.float64
        )
    return total


@pytest.mark.parametrize("interleaved", [False, True], ids=["planar", "interleaved"])
@pytest.mark.parametrize("name", LARGE)
def test_a_map_beyond_31_bits(name, interleaved):
    shape, heads = LARGE[name]
    batch, channels, count = shape
    elements = batch * channels * count
    assert elements > 2**31
    needs(
        2 * elements * 9
    )  # two values, output, its gradient, two values' gradients, and room for three more
    q, *keys = (torch.randn(batch, channels, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    values = [new_map(shape, interleaved) for _ in range(2)]
    dout = new_map(shape, interleaved)
    leaves = [x.requires_grad_() for x in (q, *keys, *values)]
    r = ek.layer_attention(q, keys, values, heads)
    dq, _, dk, *dvalues = torch.autograd.grad(r.out, leaves, dout)
    places = positions_to_look_at(count)
    by_head = [k.detach().double().view(batch, heads, -1) for k in keys]
    query = q.detach().double().view(batch, heads, -1)
    scale = (channels // heads) ** -0.5
    scores = scale * torch.stack([(query * k).sum(-1) for k in by_head], -1)
    weights = scores.softmax(-1)  # [B, G, 2]
    torch.testing.assert_close(r.weights.double(), weights, rtol=1e-5, atol=1e-6)
    per_channel = weights.repeat_interleave(channels // heads, dim=1)[..., None]  # [B, C, 2, 1]
    expected = sum(per_channel[:, :, j] * looked_at(values[j], places) for j in range(2))
    # One rounding to bfloat16, half an ulp; the sum of two products is a thousand times more exact.
    rounding = {"rtol": 2.0**-8, "atol": 1e-6}
    torch.testing.assert_close(looked_at(r.out, places), expected, **rounding)
    for j, dvalue in enumerate(dvalues):
        want = per_channel[:, :, j] * looked_at(dout, places)
        torch.testing.assert_close(looked_at(dvalue, places), want, **rounding)
    products = torch.stack([dots(dout, v.detach(), heads) for v in values], -1)
    dscores = weights * (products - (weights * products).sum(-1, keepdim=True))
    want_dq = scale * sum(dscores[..., j, None] * by_head[j] for j in range(2))
    want_dk = scale * dscores[..., 1, None] * query
    # A dot product of n normal pairs has size sqrt(n) and is added up in float32 by parts: 1e-3 of the largest result
    # is far above its rounding, and a part of the map that was left out or read twice shows.
    for got, want in ((dq, want_dq), (dk, want_dk)):
        off = (got.double().view_as(want) - want).abs().max()
        assert off <= (2.0**-8 + 1e-3) * want.abs().max()


@pytest.mark.parametrize("interleaved", [False, True], ids=["planar", "interleaved"])
def test_a_gathered_map_beyond_31_bits(interleaved):
    shape, heads = LARGE["batch"]
    batch, channels, count = shape
    needs(2 * batch * channels * count * 10)
    history, values, outs = ek.LayerHistory(), [], []
    for _ in range(2):
        q, k = (torch.randn(batch, channels, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        values.append(new_map(shape, interleaved).requires_grad_())
        outs.append(history.attend(q, k, values[-1], heads=heads))
    weights = history.weights.detach().double()
    dout = new_map(shape, interleaved)
    first, second = torch.autograd.grad(outs, values, [dout, dout])
    places = positions_to_look_at(count)
    per_channel = weights.repeat_interleave(channels // heads, dim=1)[..., None]
    seen = looked_at(dout, places)
    rounding = {"rtol": 2.0**-8, "atol": 1e-6}
    # The first layer gives itself all its weight.
    torch.testing.assert_close(
        looked_at(first, places), seen * (1 + per_channel[:, :, 0]), **rounding
    )
    torch.testing.assert_close(looked_at(second, places), seen * per_channel[:, :, 1], **rounding)


def peak_bytes(step):
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("depth", [3, 12, 23])
def test_the_attention_part_of_a_stage_takes_two_maps_a_layer(depth, memory_format):
    """Values and their gradients, 2 T maps; and x, what is retrieved, their sum, the output's gradient."""
    gc.collect()
    others = (
        torch.cuda.memory_allocated()
    )  # of earlier tests: cuBLAS keeps its workspaces, for instance
    shape = (16, 64, 32, 32)
    x, dout, *values = (
        torch.randn(shape, device=DEVICE).contiguous(memory_format=memory_format)
        for _ in range(depth + 2)
    )
    rows = [torch.randn(shape[:2], device=DEVICE, requires_grad=True) for _ in range(2 * depth)]
    values = [v.requires_grad_() for v in values]

    def step():
        history, y = ek.LayerHistory(), x
        for q, k, v in zip(rows[:depth], rows[depth:], values, strict=True):
            y = y + history.attend(q, k, v, heads=4)
        return torch.autograd.grad(y, [*rows, *values], dout, allow_unused=True)

    assert (peak_bytes(step) - others) / (4 * x.numel()) <= 2 * depth + 4


def test_what_a_step_takes_is_given_back():
    x = torch.randn(8, 32, 16, 16, device=DEVICE, requires_grad=True)
    rows = torch.randn(8, 32, device=DEVICE)

    def step():
        history = ek.LayerHistory()
        outs = [history.attend(rows, rows, x, heads=2) for _ in range(4)]
        torch.autograd.grad(outs, x, [x.detach()] * 4)

    step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
