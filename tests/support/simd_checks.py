"""What every instruction set's kernels have to pass; run as a script, with ELA_KERNELS_SIMD naming the set.

The kernels are chosen once in a process, so the tests start one for each.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from support.cases import DTYPES, HALF_TYPES, evaluate, make_case
from support.layouts import channel_slice, channels_last, contiguous
from support.mixes import assert_mixed, make_mix
from support.mixes import evaluate as evaluate_mix
from support.oracle import assert_matches
from support.position import assert_position_matches, evaluate_position, make_position_case

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.extension import extension
from ela_kernels.models.blocks import MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, but any NaN is a NaN, and a sum that starts at +0 makes -0 a +0."""
    assert found.dtype == expected.dtype
    wrong = (found != expected) & ~(found.isnan() & expected.isnan())
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} numbers differ, the first {found[wrong][0]} for {expected[wrong][0]}"
    )


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; a processor's own conversion to bfloat16 takes what is subnormal in float32 for zero."""
    if dtype is torch.bfloat16 and extension().simd_level() == "avx512_bf16":
        x = torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.zeros_like(x), x)
    return x.to(dtype)


def check_widening_and_narrowing_back(dtype: torch.dtype) -> None:
    """A history of one layer has weight 1 and gives its value back: all 65 536 patterns, whole vectors and tails."""
    patterns = as_stored(every_pattern(dtype), dtype)
    ones = torch.ones(1, 1, dtype=dtype)
    assert_same(
        ek.layer_attention(ones, [ones], [patterns.view(1, 1, -1)], 1).out.view(-1), patterns
    )
    ones = torch.ones(1, 8, dtype=dtype)
    tails = torch.stack(
        [patterns[s : s + 65533 : 1][: 65528 - 1] for s in range(8)]
    )  # odd length, each shifted
    assert_same(ek.layer_attention(ones, [ones], [tails.unsqueeze(0)], 8).out[0], tails)
    wide = torch.ones(1, 61, dtype=dtype)  # tokens of an odd number of channels
    tokens = torch.cat([patterns, patterns[:3]])[: 61 * 1074].view(1, -1, 61)
    assert_same(ek.layer_attention(wide, [wide], [tokens], 1, channels_last=True).out, tokens)
    last = patterns[-61:].view(1, 1, 61)
    assert_same(ek.layer_attention(wide, [wide], [last], 1, channels_last=True).out, last)


def check_narrowing(dtype: torch.dtype) -> None:
    """Any float32 to two bytes as PyTorch rounds it: ties, just beside them, overflow, subnormals, infinities, NaN."""
    finite = every_pattern(dtype)
    finite = finite[finite.isfinite()].float().sort().values
    middle = (
        (finite[1:].double() + finite[:-1].double()).div(2).float()
    )  # exact: one bit more than two bytes hold
    up, down = (torch.nextafter(middle, torch.tensor(x)) for x in (torch.inf, -torch.inf))
    bits = (
        torch.randint(-(2**31), 2**31, (2**17,), dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    special = torch.tensor(
        [0.0, torch.inf, -torch.inf, torch.nan, 65519.996, 65520.0, 3.4028235e38, 1e-45, 2.0**-25]
    )
    floats = torch.cat([finite, middle, up, down, bits, special, -special])
    expected = as_stored(floats, dtype)
    # What is narrowed is factor * query and factor * dout. A factor may not be subnormal, which would count as none.
    small = floats.abs() < 1
    factors = torch.where(small, floats * 2.0**20, floats).view(1, -1, 1)
    heads = floats.numel()
    queries = torch.where(small, 2.0**-20, 1.0).to(dtype).view(1, heads)
    cpp = KERNELS["cpp"]
    contribution = cpp.contribution(queries, factors, factors, None, False)
    found, _ = cpp.gather([contribution], 0, heads, False, True, False)
    assert_same(found[0], expected)
    dout = queries.unsqueeze(2).repeat(1, 1, 49)  # two vectors of 4, 8 or 16, one, and a tail
    contribution = cpp.contribution(queries, factors, factors, dout, False)
    found = cpp.gather([contribution], 0, heads, False, False, True)[1][0]
    assert_same(found, expected.unsqueeze(1).expand_as(found))


def check_products(dtype: torch.dtype) -> None:
    """weight * value in float32, rounded once, forward and backward: every pattern with sixteen weights."""
    patterns = every_pattern(dtype).expand(1, 16, -1).contiguous().requires_grad_()
    q = torch.linspace(-3, 3, 16).view(1, 16).to(dtype)
    zeros = torch.zeros_like(patterns)
    r = ek.layer_attention(q, [torch.ones_like(q), torch.zeros_like(q)], [patterns, zeros], 16)
    expected = as_stored(r.weights[0, :, :1] * patterns[0].detach().float(), dtype)
    assert_same(r.out.detach()[0], expected)
    (grad,) = torch.autograd.grad(r.out, patterns, patterns.detach())
    assert_same(grad[0], expected)


def check_calls(dtype: torch.dtype) -> None:
    for shape, depth, heads, layout, tokens in (
        ((2, 12, 7, 9), 5, 3, contiguous, False),
        ((2, 37, 3, 5), 3, 37, channels_last, False),
        ((2, 12, 7, 9), 9, 2, channel_slice, False),
        ((1, 2, 45, 101), 2, 1, contiguous, False),
        ((2, 13, 22), 4, 2, contiguous, True),
        ((1, 1, 1), 1, 1, contiguous, False),
    ):
        case = make_case(shape, depth, heads, dtype, layout, channels_last=tokens)
        assert_matches(evaluate(case), case)


def check_mixes(dtype: torch.dtype) -> None:
    """Sums by given weights, of rows as short as a vector and of single channels, in every form of map."""
    for layout in (contiguous, channels_last, channel_slice):
        for shape, heads in (((2, 12, 5, 7), 3), ((1, 18, 33, 67), 2), ((2, 37, 5, 3), 37)):
            for depth in (1, 5):
                mix = make_mix(shape, depth, heads, dtype, layout)
                assert_mixed(evaluate_mix(mix), mix)


def check_positions(dtype: torch.dtype) -> None:
    """Attention over depth at every position: odd sizes, both forms, queries and keys given and not."""
    for shape, layout, tokens in (
        ((2, 12, 7, 9), contiguous, False),
        ((2, 37, 3, 5), channels_last, False),
        ((1, 70, 9, 16), channel_slice, False),
        ((2, 13, 67), contiguous, True),
        ((1, 1, 1), contiguous, True),
    ):
        for given in (False, True):
            # More depths than are read before the next: a planar tile's sum is then rescaled.
            for depth in (3, 10):
                case = make_position_case(
                    shape, depth, dtype, layout, channels_last=tokens, map_query=given, keys=given
                )
                assert_position_matches(evaluate_position(case), case)


def check_layers(dtype: torch.dtype, tolerance: float) -> None:
    """A residual block of each form against the same modules in float64 and eager PyTorch; odd sizes."""
    for shape, head_dim, form, act in (
        ((2, 12, 7, 19), 4, torch.contiguous_format, "gelu"),
        ((2, 37, 5, 3), 37, torch.channels_last, None),
        ((1, 70, 9, 16), 1, torch.channels_last, "gelu_tanh"),
        ((2, 13, 5, 4), 13, torch.contiguous_format, None),
    ):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=form)
        layer = ek.LightLayerAttention(shape[1], head_dim, value_act=act)
        light = MRLALight(layer, 0.0).to(dtype)
        base = ek.ELA(shape[1], head_dim).to(dtype)
        for block, new in ((light, PreviousOutput), (base, ek.LayerHistory)):
            found = _gradients(copy.deepcopy(block), x, new())
            with ek.use_backend("eager"):
                expected = _gradients(copy.deepcopy(block).double(), x.double(), new())
            if (
                dtype in HALF_TYPES
            ):  # gradients through norms and cancelling sums say little at eight bits
                found, expected = found[:1], expected[:1]
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == dtype
                assert (a.double() - b).norm() <= tolerance * b.norm()


def check_widths(dtype: torch.dtype) -> None:
    """Planes of every width up to some vectors: a layer that retrieves from itself alone gives its value.

    Against PyTorch's convolution in float64. Of three planes the second is not finite, which the others do not see.
    """
    finfo = torch.finfo(dtype)
    for width in range(1, 41):
        height = 1 + width * 7 % 13
        layer = ek.LayerAttention(3, 1).to(dtype)
        (wv,) = (p for p in layer.parameters() if p.dim() == 4)
        x, dout = (torch.randn(2, 3, height, width).to(dtype) for _ in range(2))
        wide_x, wide_wv = (t.detach().double().requires_grad_() for t in (x, wv))
        expected = F.conv2d(wide_x, wide_wv, padding=1, groups=3)
        wanted = torch.autograd.grad(expected, (wide_x, wide_wv), dout.double())
        x.requires_grad_()
        found = layer(x, ek.LayerHistory())
        got = torch.autograd.grad(found, (x, wv), dout)
        # A rounding is half an eps at most. Sums are of nine products, and for a tap of all positions of the batch.
        allowed = finfo.eps if dtype in HALF_TYPES else 16 * finfo.eps
        for a, b in zip((found, *got), (expected, *wanted), strict=True):
            assert (a.double() - b).norm() <= allowed * b.norm() + finfo.tiny, (width, height)
        spoilt = x.detach().clone()
        spoilt[:, 1, ::2] = torch.inf
        spoilt[:, 1, 1::2] = torch.nan
        out = layer(spoilt, ek.LayerHistory())
        assert torch.equal(out[:, ::2], found[:, ::2])
        assert not out[:, 1].isfinite().any()


def _gradients(block: torch.nn.Module, x: Tensor, history: object) -> list[Tensor]:
    x = x.requires_grad_()
    out = block(block(x, history), history)
    loss = (out.double() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
    return [out, *torch.autograd.grad(loss, [x, *block.parameters()])]


# Rounding to each type, through two layers whose norms magnify it.
LAYER_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-4,
    torch.bfloat16: 0.03,
    torch.float16: 0.004,
}


def main() -> None:
    kernels = extension()
    assert kernels is not None
    assert kernels.simd_level() == os.environ["ELA_KERNELS_SIMD"]
    torch.manual_seed(0)
    ek.use_backend("cpp")
    for dtype in HALF_TYPES:
        check_widening_and_narrowing_back(dtype)
        check_narrowing(dtype)
        check_products(dtype)
    for dtype in DTYPES:
        check_calls(dtype)
        check_mixes(dtype)
        check_positions(dtype)
        check_layers(dtype, LAYER_TOLERANCE[dtype])
        check_widths(dtype)
    print(f"passed on {kernels.simd_level()}")


if __name__ == "__main__":
    main()
