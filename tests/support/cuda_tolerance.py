"""Calls of the CUDA kernels with a tolerance, and what they have to give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.cases import Case, Maker, make_case
from support.cuda_on_cpu import off_by
from support.layouts import channel_slice, channels_last, contiguous
from support.left_out import (
    NUMBERS,
    assert_near,
    assert_same_bits,
    bits,
    by_channel,
    poison,
)
from support.oracle import oracle, tolerances
from torch import Tensor

from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.gpu_tables import GpuContribution
from ela_kernels.backends.types import Gradients, Saved
from ela_kernels.ops.layer_attention.reference import (
    aggregate_reference,
    layer_attention_backward_reference,
)


def varied_case(
    shape: Sequence[int],
    depth: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
    layout: Maker = contiguous,
    channels_last: bool = False,
) -> Case:
    """A call whose weights are of many sizes."""
    case = make_case(shape, depth, heads, dtype, layout, channels_last=channels_last)
    case.scale = 1.5 * (case.q.shape[1] // heads) ** -0.5
    return case


def attend(case: Case, tolerance: float) -> dict[str, Tensor]:
    assert case.scale is not None
    found = cuda.attend(
        *(case.q, case.keys, case.values, case.heads, case.scale, case.prev_weights),
        *(case.channels_last, tolerance),
    )
    names = ("out", "weights", "kl")
    return {n: x for n, x in zip(names, found, strict=True) if x is not None}


def backward(
    case: Case, weights: Tensor, tolerance: float, need_values: Sequence[bool]
) -> Gradients:
    """`need_values`: of which values the gradient is written in the same pass, or ()."""
    assert case.scale is not None
    saved = Saved(
        *(case.q, case.keys, case.values, case.heads, case.scale, case.prev_weights),
        *(weights, case.channels_last, tolerance),
    )
    need_keys = [True] * len(need_values)
    arriving = case.dout, case.dweights, case.dkl
    return cuda.attend_backward(
        saved, *arriving, True, case.dkl is not None, need_keys, need_values
    )


def named(found: Gradients) -> dict[str, Tensor]:
    lists = {f"dkeys[{j}]": x for j, x in enumerate(found.dkeys)}
    lists |= {f"dvalues[{j}]": x for j, x in enumerate(found.dvalues)}
    all_of_it = {"dscores": found.dscores, "dq": found.dq, "dprev": found.dprev, **lists}
    return {name: x for name, x in all_of_it.items() if x is not None}


def check_forward(case: Case, tolerance: float) -> dict[str, Tensor]:
    """Poisons the values of `case` where they are left out, and compares; returns what it found."""
    clean = attend(case, tolerance)
    values = [v.double() for v in case.values]
    weights = clean["weights"]
    exact, allowed = oracle(case), tolerances(case)
    expected = aggregate_reference(weights.double(), values, case.channels_last, tolerance)
    assert_near("out", clean["out"], expected, allowed["out"])
    for name in clean.keys() - {"out"}:
        assert_near(name, clean[name], exact[name].detach(), allowed[name])
    for j, value in enumerate(case.values):
        left_out = weights[..., j] < tolerance
        poison(value, left_out, case.channels_last, NUMBERS[j % len(NUMBERS)])
    assert_same_bits(attend(case, tolerance), clean, "with something else where it is not read")
    return clean


def check_backward(
    case: Case, weights: Tensor, tolerance: float, need_values: Sequence[bool]
) -> None:
    """As :func:`check_forward`, of values that are clean."""
    clean = named(backward(case, weights, tolerance, need_values))
    allowed = tolerances(case)
    exact = [x if x is None else x.double() for x in (case.dout, case.dweights, case.dkl)]
    prev = None if case.prev_weights is None else case.prev_weights.double()
    assert case.scale is not None
    dq, dkeys, dvalues, dprev = layer_attention_backward_reference(
        case.q.double(),
        [k.double() for k in case.keys],
        [v.double() for v in case.values],
        *(case.heads, case.scale, prev, weights.double(), *exact, case.channels_last, tolerance),
    )
    assert_near("dq", clean["dq"], dq, allowed["d q"])
    if dprev is not None:
        assert_near("dprev", clean["dprev"], dprev, allowed["d prev_weights"])
    for j, needed in enumerate(need_values):
        assert_near(f"dkeys[{j}]", clean[f"dkeys[{j}]"], dkeys[j], allowed[f"d keys[{j}]"])
        assert needed == (f"dvalues[{j}]" in clean)
        if not needed:
            continue
        left_out = weights[..., j] < tolerance
        dvalue = clean[f"dvalues[{j}]"]
        assert_near(f"dvalues[{j}]", dvalue, dvalues[j], allowed[f"d values[{j}]"])
        zero = by_channel(left_out, dvalue, case.channels_last).expand_as(dvalue)
        assert not bits(dvalue)[zero].any()
    for j, value in enumerate(case.values):
        left_out = weights[..., j] < tolerance
        poison(value, left_out, case.channels_last, NUMBERS[j % len(NUMBERS)])
    again = named(backward(case, weights, tolerance, need_values))
    assert_same_bits(again, clean, "with something else where it is not read")


# Several blocks to a head, several rows and heads to a block, chunks that end within a vector, strips, heads that a
# block's boundary cuts, vectors that span heads, single elements, and threads with nothing to do.
PLANS = {
    "rows": ((2, 12, 5, 7), 5, 3, contiguous, False),
    "chunks": ((1, 6, 37, 41), 5, 2, contiguous, False),
    "one head": ((1, 3, 61, 53), 6, 1, contiguous, False),
    "many rows": ((2, 32, 2, 2), 9, 16, contiguous, False),
    "gaps": ((2, 12, 23, 20), 3, 3, channel_slice, False),
    "off": ((1, 8, 23, 21), 3, 4, off_by(1, contiguous), False),
    "strips": ((1, 272, 9, 5), 3, 2, channels_last, False),
    "positions": ((1, 16, 33, 31), 5, 1, channels_last, False),
    "channel-wise": ((2, 40, 9, 9), 7, 40, channels_last, False),
    "spanning": ((2, 36, 17, 9), 7, 6, channels_last, False),
    "spanning, narrow": ((2, 24, 3, 3), 10, 12, channels_last, False),
    "off, interleaved": ((1, 24, 17, 9), 4, 6, off_by(3, channels_last), False),
    "wide": ((1, 1100, 5, 3), 3, 2, channels_last, False),
    "tokens": ((2, 50, 64), 33, 4, contiguous, True),
}


def plan_case(name: str, dtype: torch.dtype) -> Case:
    shape, depth, heads, layout, last = PLANS[name]
    return varied_case(shape, depth, heads, dtype, layout, last)


def contributions(
    shape: Sequence[int],
    depths: Sequence[int],
    heads: int,
    dtype: torch.dtype,
    layout: Maker,
    channels_last: bool,
    given: Sequence[float],
) -> list[GpuContribution]:
    """What layers of some depths left, with the tolerances in turn."""
    batch, channels = shape[0], shape[-1 if channels_last else 1]
    return [
        GpuContribution(
            torch.randn(batch, channels).to(dtype),
            (2 * torch.randn(batch, heads, depth)).softmax(-1),
            torch.randn(batch, heads, depth),
            layout(shape, dtype),
            channels_last,
            given[m % len(given)],
        )
        for m, depth in enumerate(depths)
    ]


def gather_all(
    left: list[GpuContribution], index: int, heads: int, last: bool
) -> dict[str, Tensor]:
    dkey, dvalue = cuda.gather(left, index, heads, last, True, True)
    assert dkey is not None
    assert dvalue is not None
    return {"dkey": dkey, "dvalue": dvalue}
