"""Maps of more than 2^31 elements, and the memory that a stage takes. These tests need much of the device's memory."""

from __future__ import annotations

import gc

import pytest
import torch
from support.layer_stages import make_blocks, make_stage
from support.layers_on_gpu import on_device
from support.on_gpu import DEVICE

import ela_kernels as ek

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]


@pytest.fixture(autouse=True)
def released(gpu):
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def needs(free_bytes):
    if DEVICE.type != "cuda":
        return  # a dry run, on small maps
    free = torch.cuda.mem_get_info()[0]
    if free < free_bytes:
        pytest.skip(f"needs {free_bytes / 1e9:.0f} GB of free device memory; {free / 1e9:.0f} are")


# Batches whose later samples begin beyond 2^31 elements, and one sample that is larger than that by itself; with an
# odd number of positions no row but the first begins at an aligned address.
LARGE = {
    "batch": ((3, 16, 47_000_000), 2),
    "sample": ((1, 16, 140_000_003), 4),
}
BLOCK_SIZE = 8300
if DEVICE.type != "cuda":
    LARGE = {"batch": ((3, 16, 4700), 2), "sample": ((1, 16, 14_003), 4)}
    BLOCK_SIZE = 83
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
    assert elements > 2**31 or DEVICE.type != "cuda"
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


@pytest.mark.usefixtures("cuda_only")
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


@pytest.mark.usefixtures("cuda_only")
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


@pytest.mark.usefixtures("cuda_only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("depth", [3, 12, 23])
@pytest.mark.parametrize("is_block", [False, True], ids=["layers", "blocks"])
def test_a_stage_of_whole_layers(is_block, depth, memory_format, dtype):
    """Inputs and values, and of blocks what is normed: 2 T or 3 T maps; and output, its gradient, a layer's gradients.

    Those are of value and input, and of blocks one more; a map is left for vectors, weights and partial sums.
    """
    make = make_blocks if is_block else make_stage
    modules, x = make((16, 64, 32, 32), depth, 16, dtype, memory_format)
    modules, x = modules.to(DEVICE), on_device(x)
    dout = torch.randn_like(x)
    leaves = [x, *modules.parameters()]

    def step():
        history, y = ek.LayerHistory(), x
        for module in modules:
            y = module(y, history) if is_block else module(y, history, residual=True)
        return torch.autograd.grad(y, leaves, dout, allow_unused=True)

    gc.collect()
    others = torch.cuda.memory_allocated() - 2 * x.nbytes
    held = 3 * depth + 6 if is_block else 2 * depth + 5
    assert (peak_bytes(step) - others) / x.nbytes <= held


def looked_at_in_image(x, rows, columns):
    """`[B, C, n]` of a map at these places, in float64; zero outside of it."""
    height, width = x.shape[2:]
    is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    found = x.detach()[:, :, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return found.double() * is_inside


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_block_on_a_map_beyond_31_bits(memory_format):
    """One residual block, forward and backward, on two samples of which the second ends beyond 2^31 elements."""
    size = BLOCK_SIZE
    shape = (2, 16, size, size + 1)
    elements = torch.Size(shape).numel()
    assert elements // 2 < 2**31 < elements or DEVICE.type != "cuda"
    needs(2 * elements * 10)
    x = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16, memory_format=memory_format)
    x.normal_().requires_grad_()
    block = ek.ELA(16, head_dim=8).to(DEVICE, torch.bfloat16)
    block.norm.float().momentum = 1.0  # running statistics are then those of the batch
    history = ek.LayerHistory()
    out = block(x, history)
    (value,) = history.values  # the first layer retrieves it and nothing else
    del history

    edges = torch.tensor([0, 1, size - 2, size - 1], device=DEVICE)
    inside = torch.randint(0, size, (2, SAMPLED), device=DEVICE)
    rows = torch.cat((edges.repeat(4), inside[0]))
    columns = torch.cat((edges.repeat_interleave(4), inside[1]))
    filters = block.attn.Wv.weight.detach().double()
    neighbours = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    expected = sum(
        filters[:, 0, i + 1, j + 1, None] * looked_at_in_image(x, rows + i, columns + j)
        for i, j in neighbours
    )
    # One rounding to bfloat16, half an ulp.
    torch.testing.assert_close(
        looked_at_in_image(value, rows, columns), expected, rtol=2.0**-8, atol=1e-5
    )

    # Of every channel the norm's statistics, and what the backward of norm and activation takes the mean of.
    mean, variance, passed, kept = (
        torch.empty(16, device=DEVICE, dtype=torch.float64) for _ in range(4)
    )
    for c in range(16):
        plane = value[:, c].detach().float()
        variance[c], mean[c] = torch.var_mean(plane, correction=0)
        normed = (plane - mean[c].float()) * (variance[c].float() + block.norm.eps).rsqrt()
        passed[c], kept[c] = (normed > 0).float().mean(), normed.relu().mean()
        del plane, normed
    torch.testing.assert_close(block.norm.running_mean.double(), mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(block.norm.running_var.double(), variance, rtol=1e-3, atol=0)
    scale = (variance + block.norm.eps).rsqrt()[:, None]

    def normed_at(rows, columns):
        return (looked_at_in_image(value, rows, columns) - mean[:, None]) * scale

    # Roundings to bfloat16, in relative L2 norm: of what is normed, of its gradient and of the sum.
    want = looked_at_in_image(x, rows, columns) + normed_at(rows, columns).relu()
    found = looked_at_in_image(out, rows, columns)
    assert (found - want).norm() <= 2.0**-7 * want.norm()

    one = torch.ones((), device=DEVICE, dtype=out.dtype)
    (dx,) = torch.autograd.grad(out, x, one.expand(shape))
    want = torch.ones_like(found)
    for i, j in neighbours:
        r, c = rows - i, columns - j
        normed = normed_at(r, c)
        gradient = scale * ((normed > 0).double() - passed[:, None] - normed * kept[:, None])
        gradient = gradient * ((r >= 0) & (r < size) & (c >= 0) & (c < size + 1))
        want += filters[:, 0, i + 1, j + 1, None] * gradient
    found = looked_at_in_image(dx, rows, columns)
    assert (found - want).norm() <= 2.0**-7 * want.norm()
