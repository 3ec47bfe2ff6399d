"""What a tolerance leaves out of whole layers and histories of the Triton kernels, and what warming compiles."""

from __future__ import annotations

import pytest
import torch
from support.triton_tolerance import (
    SOME_MAPS,
    TOLERANCE,
    assert_near,
    left_out,
    make_call,
    names,
    product,
    spoil,
)
from torch import Tensor

import ela_kernels as ek
from build_tools import triton_launches
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.types import RESIDUAL, Filters, NormAct

pytestmark = pytest.mark.usefixtures("few_programs", "told")


@pytest.mark.parametrize("epilogue", ["none", "residual", "norm"])
@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_a_whole_layer(maps, epilogue):
    """Forward and backward, with an earlier layer's values spoilt where they are left out."""
    (_, channels, *_), heads, maker, dtype = maps
    kernels, call = KERNELS["triton"], make_call(maps)
    x = maker(maps[0], dtype)
    row = torch.randn(1, 1, 3).to(dtype)
    filters = Filters(row, row, torch.randn(channels, 1, 3, 3).to(dtype))
    gamma = torch.ones(channels, dtype=dtype)
    following = {
        "none": None,
        "residual": RESIDUAL,
        "norm": NormAct(gamma, gamma, None, None, 1e-5, False),
    }[epilogue]
    of_call = x, filters, call.keys, call.values, heads, 4 * call.scale, None, following
    weights = kernels.layer(*of_call).weights
    assert weights is not None
    below = left_out(call._replace(weights=weights))
    for j, value in enumerate(call.values):
        spoil(value, below[..., j])
    made = kernels.layer(*of_call, tolerance=TOLERANCE)
    assert made.q is not None
    values = [*call.values, made.v]
    retrieved = torch.stack(
        [product(weights[..., j], below[..., j], v) for j, v in enumerate(values)]
    ).sum(0)
    if epilogue == "none":
        assert_near(made.out, retrieved)
    elif epilogue == "residual":
        assert_near(made.out, retrieved + x.double())
    else:
        assert_near(made.retrieved, retrieved)
        kept = made.retrieved.double()
        mean, variance = kept.mean((0, 2, 3)), kept.var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(
            made.statistics.double(), torch.stack([mean, variance]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_layers_of_several_tolerances_in_a_history(maps):
    """Gradients of the pull form against eager PyTorch: each layer's own tolerance, also in the sum of a value's."""
    shape, heads, maker, dtype = maps
    inputs = [torch.randn(shape[:2]).to(dtype) for _ in range(8)]
    inputs += [maker(shape, dtype) for _ in range(4)]
    douts = [maker(shape, dtype) for _ in range(4)]

    def run(backend: str, tolerances: tuple[float | None, ...]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with ek.use_backend(backend):
            history = ek.LayerHistory(tolerance=0.01)
            outs = [
                history.attend(
                    leaves[t], leaves[4 + t], leaves[8 + t], heads=heads, scale=2.0, tolerance=one
                )
                for t, one in enumerate(tolerances)
            ]
            torch.autograd.backward(outs, douts)
        return [*outs, *(x.grad for x in leaves if x.grad is not None)]

    tolerances = (None, 0.2, 0.0, 0.4)
    found, expected = run("triton", tolerances), run("eager", tolerances)
    other = run("eager", (0.0,) * 4)
    assert len(found) == len(expected) == 16
    bounds = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **bounds)
    assert any(
        not torch.allclose(a, b, **bounds) for a, b in zip(expected, other, strict=True)
    )  # something was left out


@pytest.mark.parametrize("tolerance", [0.0, 0.25])
def test_warming_compiles_the_kernels_of_its_tolerance(tolerance):
    with triton_launches.recorded() as launches:
        ek.warmup([(1, 4, 2, 3)], 2, 2, device="cpu", tolerance=tolerance)
    asked = {
        (launch.kernel.fn.__name__.split("_", 2)[2], launch.options["LEAVES_OUT"])
        for launch in launches
        if "LEAVES_OUT" in launch.options
    }
    of_pairs = {
        (name, tolerance > 0) for name in ("fwd_kernel", "bwd_dots_kernel", "bwd_gather_kernel")
    }
    # A mix takes two of the kernels too, and knows no tolerance.
    of_mix = {("fwd_kernel", False), ("bwd_dots_kernel", False)}
    assert asked == of_pairs | of_mix
