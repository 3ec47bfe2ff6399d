"""What a tolerance leaves out: chosen, overwritten with what must not be read, and compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from support.cases import Case
from support.oracle import oracle
from torch import Tensor

NUMBERS = (torch.nan, torch.inf, -torch.inf)
"""What must not reach a result."""


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], note: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(bits(x), bits(expected[name])), f"{name} {note}"


def assert_near(name: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    info = torch.finfo(found.dtype)
    subnormal = info.smallest_normal * info.eps if found.dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=info.eps,
        atol=allowed + subnormal,
        msg=lambda text: f"{name}: {text}",
    )


def by_channel(of_heads: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """`[B, G]` for every element of a map."""
    channel_dim = like.dim() - 1 if channels_last else 1
    shape = [like.shape[0]] + [1] * (like.dim() - 1)
    shape[channel_dim] = like.shape[channel_dim]
    heads = of_heads.shape[1]
    return of_heads.repeat_interleave(like.shape[channel_dim] // heads, 1).reshape(shape)


def poison(x: Tensor, left_out: Tensor, channels_last: bool, number: float) -> None:
    """`number` wherever the head and sample leave `x` out, `[B, G]`; in its own memory, so that it lies as it did."""
    x.masked_fill_(by_channel(left_out, x, channels_last), number)


def middle(weights: Tensor, share: float = 0.5) -> float:
    """A tolerance, as exact in float32, that leaves out about that share of the weights and does not all."""
    tolerance = weights.flatten().sort().values[int(share * (weights.numel() - 1))].item()
    assert (weights < tolerance).any()
    assert not (weights < tolerance).all()
    return tolerance


def between(weights: Iterable[Tensor]) -> float:
    """A tolerance that a good part of the weights is below, as far from all of them as can be.

    Weights in another dtype are then on the same side of it.
    """
    every = torch.cat([w.detach().double().cpu().flatten() for w in weights]).clamp_min(1e-30)
    sorted_logs = every.sort().values.log()
    low, high = len(sorted_logs) // 4, max(3 * len(sorted_logs) // 4, len(sorted_logs) // 4 + 2)
    gaps = sorted_logs[low + 1 : high] - sorted_logs[low : high - 1]
    at = low + int(gaps.argmax())
    assert gaps.max() > 1e-3, "the weights lie too close"
    return float(((sorted_logs[at] + sorted_logs[at + 1]) / 2).exp())


def spread(case: Case) -> Case:
    """The case with weights from nearly one to nearly nothing, and a tolerance among them."""
    per_head = case.q.shape[1] // case.heads
    case.scale = 3 * per_head**-0.5
    case.tolerance = between([oracle(case)["weights"]])
    return case
