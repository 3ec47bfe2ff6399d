"""One call of layer attention with everything that belongs to it: inputs, output gradients, what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from support.gradients import with_gradients
from support.layouts import contiguous
from torch import Tensor

import ela_kernels as ek

HALF_TYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF_TYPES)

Maker = Callable[[Sequence[int], torch.dtype], Tensor]


@dataclass
class Case:
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    heads: int
    scale: float | None = None
    prev_weights: Tensor | None = None
    channels_last: bool = False
    tolerance: float = 0.0
    dout: Tensor | None = None
    dweights: Tensor | None = None
    dkl: Tensor | None = None
    wanted: list[str] = field(default_factory=list)

    def inputs(self) -> dict[str, Tensor]:
        named = {"q": self.q}
        named |= {f"keys[{j}]": key for j, key in enumerate(self.keys)}
        named |= {f"values[{j}]": value for j, value in enumerate(self.values)}
        return named if self.prev_weights is None else named | {"prev_weights": self.prev_weights}

    def with_gradients(
        self, outputs: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """:func:`support.gradients.with_gradients` of this case."""
        arriving = {"out": self.dout, "weights": self.dweights, "kl": self.dkl}
        return with_gradients(outputs, inputs, self.wanted, arriving)

    def __str__(self) -> str:
        value = self.values[0]
        return (
            f"T={len(self.keys)} heads={self.heads} values {list(value.shape)} strides {value.stride()} {value.dtype} "
            f"channels_last={self.channels_last} tolerance={self.tolerance:.3g}"
        )


def make_case(
    shape: Sequence[int] = (2, 12, 5, 3),
    depth: int = 3,
    heads: int = 3,
    dtype: torch.dtype = torch.float32,
    makers: Maker | Sequence[Maker] = contiguous,
    *,
    scale: float | None = None,
    prev_depth: int | None = -1,
    channels_last: bool = False,
    dout: Maker | None = contiguous,
    through: str = "out weights kl",
) -> Case:
    """A random call; `makers` lay the values out (repeated in turn), `dout` the output gradient.

    `prev_depth` -1 means depth - 1, which is what a network has; None means no previous weights. `through` names
    the outputs at which a gradient arrives.
    """
    makers = [makers] if callable(makers) else list(makers)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    batch, channels = shape[0], shape[-1 if channels_last else 1]
    if prev_depth == -1:
        prev_depth = depth - 1 or None
    case = Case(
        q=torch.randn(batch, channels).to(dtype),
        keys=[torch.randn(batch, channels).to(dtype) for _ in range(depth)],
        values=[makers[j % len(makers)](shape, dtype) for j in range(depth)],
        heads=heads,
        scale=scale,
        channels_last=channels_last,
    )
    case.wanted = [
        "q",
        *(f"keys[{j}]" for j in range(depth)),
        *(f"values[{j}]" for j in range(depth)),
    ]
    if prev_depth is not None:
        case.prev_weights = torch.randn(batch, heads, prev_depth, dtype=accumulate).softmax(-1)
        case.wanted.append("prev_weights")
    if "out" in through and dout is not None:
        case.dout = dout(shape, dtype)
    if "weights" in through:
        case.dweights = torch.randn(batch, heads, depth, dtype=accumulate)
    if "kl" in through and prev_depth is not None:
        case.dkl = torch.randn(batch, heads, dtype=accumulate)
    return case


def evaluate(
    case: Case, op: Callable[..., ek.LayerAttentionOutput] = ek.layer_attention
) -> dict[str, Tensor]:
    """Outputs and wanted gradients by name, through the package."""
    inputs = {n: x.detach().requires_grad_(n in case.wanted) for n, x in case.inputs().items()}
    depth = range(len(case.keys))
    options = {"tolerance": case.tolerance} if case.tolerance else {}
    result = op(
        inputs["q"],
        [inputs[f"keys[{j}]"] for j in depth],
        [inputs[f"values[{j}]"] for j in depth],
        heads=case.heads,
        scale=case.scale,
        prev_weights=inputs.get("prev_weights"),
        channels_last=case.channels_last,
        **options,
    )
    assert result.out.dtype == case.values[0].dtype
    return case.with_gradients({n: x for n, x in result._asdict().items() if x is not None}, inputs)
