"""What every operation is compared by: the gradients that were asked for, and how far from exact a number may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def with_gradients(
    outputs: dict[str, Tensor],
    inputs: Mapping[str, Tensor],
    wanted: Sequence[str],
    arriving: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """`outputs`, and the gradient of each wanted input as `d <input>`, zero where autograd gives None.

    Args:
        arriving: the gradients of the outputs; those without one have none.
    """
    roots = [n for n, o in outputs.items() if o.requires_grad and arriving.get(n) is not None]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if roots and wanted:
        given = [arriving[n].to(outputs[n].dtype) for n in roots]
        grads = torch.autograd.grad(
            [outputs[n] for n in roots], [inputs[n] for n in wanted], given, allow_unused=True
        )
    found = {n: o.detach() for n, o in outputs.items()}
    for name, g in zip(wanted, grads, strict=True):
        found["d " + name] = torch.zeros_like(inputs[name]) if g is None else g
    return found


def largest(tensors: Sequence[Tensor | None]) -> float:
    return max(
        (x.double().abs().max().item() for x in tensors if x is not None and x.numel()), default=0.0
    )


def assert_within(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    allowed: Mapping[str, float],
    of: object,
    may_be_nan: Sequence[str] = (),
) -> None:
    """Every result equals the one expected, in float64, within what is allowed for it and its last rounding.

    `may_be_nan`: names of results that may be NaN where NaN is expected.
    """
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.shape == expected[name].shape, name
        # Results are rounded once more, to their own type: half an ulp, or half of the smallest subnormal. Twice that.
        info = torch.finfo(x.dtype)
        subnormal = info.smallest_normal * info.eps if x.dtype == torch.float16 else 0.0
        torch.testing.assert_close(
            x.double(),
            expected[name],
            rtol=info.eps,
            atol=allowed[name] + subnormal,
            equal_nan=name in may_be_nan,
            msg=lambda text, name=name: f"{name} of {of}: {text}",
        )
