"""Histories that hold values in half precision, against float64 layers that read the very numbers that were held."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.ops.layer_attention import history as histories

HALVES = (torch.bfloat16, torch.float16)
# Of the nearest number with so many binary digits.
DIGITS = {torch.bfloat16: 8, torch.float16: 11}


def assert_is_rounding(held: Tensor, v: Tensor, dtype: torch.dtype) -> None:
    """`held` is `v` rounded to nearest, but for the error that a sum in float32 has before it is rounded."""
    assert held.dtype == dtype
    step = v.abs().clamp_min(2.0**-14) * 2.0 ** (1 - DIGITS[dtype])  # below, float16 is subnormal
    error = (held.double() - v).abs()
    assert (error <= 0.5 * step + 1e-5 * v.abs().max()).all()
    assert error.count_nonzero() != 0


@contextmanager
def replaying(held: Iterator[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Layers read what was held, in place of their own rounding, with the identity for its gradient."""

    def rounded(v: Tensor, to: torch.dtype) -> Tensor:
        found = next(held)
        assert to == dtype
        assert_is_rounding(found, v.detach(), dtype)
        return v + (found.to(v.dtype) - v).detach()

    with pytest.MonkeyPatch.context() as patch, ek.use_backend("eager"):
        patch.setattr(histories, "rounded", rounded)
        yield


Run = Callable[[nn.Module, Tensor, ek.LayerHistory], list[Tensor]]


def check_against_float64(
    run: Run, modules: nn.Module, x: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """`run(modules, x, history)` gives what float64 gives for the values that it held, which are returned.

    As nearly as eager PyTorch in the dtype of `x`, by a few times.
    """
    history = ek.LayerHistory(dtype=dtype)
    found = run(copy.deepcopy(modules), x, history)
    held = [v.detach() for v in history.values]
    assert {v.dtype for v in held} == {dtype}

    def again(to: torch.dtype) -> list[Tensor]:
        values = iter(held)
        other = x.detach().to(to).requires_grad_(x.requires_grad)
        with replaying(values, dtype):
            given = run(copy.deepcopy(modules).to(to), other, ek.LayerHistory(dtype=dtype))
        assert next(values, None) is None
        return given

    plain, exact = again(x.dtype), again(torch.float64)
    assert len(found) == len(exact)
    rounding = [(b.double() - truth).norm() for b, truth in zip(plain, exact, strict=True)]
    sizes = [truth.norm() for truth in exact]
    # A single number is a sum of many that may cancel to next to nothing: it is held to the largest of its kind.
    single = [i for i, truth in enumerate(exact) if truth.numel() == 1]
    for of_all in (rounding, sizes):
        largest = max((of_all[i] for i in single), default=None)
        for i in single:
            of_all[i] = largest
    for i, (a, b, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert a.dtype == b.dtype, i
        assert not a.isnan().any(), i
        error = (a.double() - truth).norm()
        # Rounded to float16 on its way, the least that is to be seen, a gradient would be off by 1e-4.
        allowed = 4 * rounding[i] + 1e-5 * sizes[i] + 1e-6
        assert error <= allowed, f"{i}: {error:.3g} from float64, allowed is {allowed:.3g}"
    return held
