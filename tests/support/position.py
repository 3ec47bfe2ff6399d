"""One call of attention over depth at every position, and the same written once more, from its formulas in float64.

The oracle shares no code with the package, so that a mistake in the package's own reference shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from support.cases import Maker
from support.gradients import assert_within, largest, with_gradients
from support.layouts import contiguous
from torch import Tensor

import ela_kernels as ek

OUTPUTS = ("out", "weights", "kl", "kl_mean")


@dataclass
class PositionCase:
    query: Tensor
    values: list[Tensor]
    keys: list[Tensor] | None = None
    norm_weight: Tensor | None = None
    eps: float = 1e-6
    scale: float | None = None
    prev_weights: Tensor | None = None
    channels_last: bool = False
    arriving: dict[str, Tensor] = field(default_factory=dict)
    """The gradients of the outputs, by their names."""
    wanted: list[str] = field(default_factory=list)

    def inputs(self) -> dict[str, Tensor]:
        named = {"query": self.query}
        named |= {f"values[{t}]": v for t, v in enumerate(self.values)}
        named |= {f"keys[{t}]": k for t, k in enumerate(self.keys or ())}
        if self.norm_weight is not None:
            named["norm_weight"] = self.norm_weight
        return named if self.prev_weights is None else named | {"prev_weights": self.prev_weights}

    def with_gradients(
        self, outputs: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """:func:`support.gradients.with_gradients` of this case."""
        return with_gradients(outputs, inputs, self.wanted, self.arriving)

    def __str__(self) -> str:
        value = self.values[0]
        return (
            f"T={len(self.values)} values {list(value.shape)} strides {value.stride()} {value.dtype} query "
            f"{list(self.query.shape)} keys={self.keys is not None} norm_weight={self.norm_weight is not None} "
            f"channels_last={self.channels_last}"
        )


def make_position_case(
    shape: Sequence[int] = (2, 12, 5, 3),
    depth: int = 3,
    dtype: torch.dtype = torch.float32,
    makers: Maker | Sequence[Maker] = contiguous,
    *,
    map_query: bool = False,
    keys: bool = False,
    norm_weight: bool = True,
    scale: float | None = None,
    prev_depth: int | None = -1,
    channels_last: bool = False,
    dout: Maker | None = contiguous,
    through: str = "out weights kl kl_mean",
    vector_dtype: torch.dtype | None = None,
) -> PositionCase:
    """A random call; `makers` lay values, keys and query out in turn. `prev_depth` -1 means depth - 1."""
    makers = [makers] if callable(makers) else list(makers)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[-1 if channels_last else 1]
    places = list(shape)
    del places[-1 if channels_last else 1]
    if prev_depth == -1:
        prev_depth = depth - 1 or None

    def maps(first: int) -> list[Tensor]:
        return [makers[(first + t) % len(makers)](shape, dtype) for t in range(depth)]

    vector = vector_dtype or dtype
    case = PositionCase(
        # Scores of order one.
        query=(torch.randn(shape if map_query else (channels,)) / channels**0.5).to(
            dtype if map_query else vector
        ),
        values=maps(0),
        keys=maps(1) if keys else None,
        norm_weight=(1 + torch.randn(channels) / 4).to(vector) if norm_weight else None,
        scale=scale,
        channels_last=channels_last,
    )
    if map_query:
        case.query = makers[0](shape, dtype) * channels**-0.5
    if prev_depth is not None:
        prev = torch.randn(places[0], prev_depth, *places[1:], dtype=accumulate)
        case.prev_weights = prev.softmax(1)
    if "out" in through.split() and dout is not None:
        case.arriving["out"] = dout(shape, dtype)
    if "weights" in through.split():
        case.arriving["weights"] = torch.randn(places[0], depth, *places[1:], dtype=accumulate)
    if prev_depth is not None and "kl" in through.split():
        case.arriving["kl"] = torch.randn(places, dtype=accumulate)
    if prev_depth is not None and "kl_mean" in through.split():
        case.arriving["kl_mean"] = torch.randn(places[0], dtype=accumulate)
    case.wanted = [*case.inputs()]
    return case


def evaluate_position(
    case: PositionCase,
    op: Callable[..., Any] = ek.position_attention,
    put: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    """Outputs and wanted gradients by name, through the package."""
    inputs = {n: put(x.detach()).requires_grad_(n in case.wanted) for n, x in case.inputs().items()}
    depth = range(len(case.values))
    result = op(
        inputs["query"],
        [inputs[f"values[{t}]"] for t in depth],
        None if case.keys is None else [inputs[f"keys[{t}]"] for t in depth],
        norm_weight=inputs.get("norm_weight"),
        eps=case.eps,
        scale=case.scale,
        prev_weights=inputs.get("prev_weights"),
        channels_last=case.channels_last,
    )
    assert result.out.dtype == case.values[0].dtype
    outputs = {n: x for n, x in zip(OUTPUTS, result, strict=True) if x is not None}
    arriving = case.arriving
    case.arriving = {n: put(x) for n, x in arriving.items()}
    try:
        return {n: x.cpu() for n, x in case.with_gradients(outputs, inputs).items()}
    finally:
        case.arriving = arriving


def position_oracle(case: PositionCase) -> dict[str, Tensor]:
    """Outputs and gradients in float64, named as :func:`evaluate_position` names them."""
    inputs = {n: x.detach().double().requires_grad_() for n, x in case.inputs().items()}
    depth, dim = range(len(case.values)), -1 if case.channels_last else 1

    def flat(x: Tensor) -> Tensor:  # [N of all samples, C]
        return x.movedim(dim, -1).reshape(-1, x.shape[dim])

    value = case.values[0]
    channels = value.shape[dim]
    v = torch.stack([flat(inputs[f"values[{t}]"]) for t in depth])  # [T, N, C]
    given = case.keys is not None
    k = torch.stack([flat(inputs[f"keys[{t}]"]) for t in depth]) if given else v
    if not given or case.norm_weight is not None:
        k = k / ((k * k).sum(-1, keepdim=True) / channels + case.eps).sqrt()
    if case.norm_weight is not None:
        k = k * inputs["norm_weight"]
    query = inputs["query"]
    q = flat(query) if query.dim() > 1 else query.expand(v.shape[1], channels)
    scores = torch.einsum("nc,tnc->tn", q, k) * (1.0 if case.scale is None else case.scale)
    weights = scores.softmax(0)
    out = torch.einsum("tn,tnc->nc", weights, v)
    places = list(value.shape)
    del places[dim]
    batch, *spatial = places

    def planes(x: Tensor) -> Tensor:  # [T, N] to [B, T, *positions]
        return x.reshape(x.shape[0], batch, *spatial).movedim(0, 1)

    found = {
        "out": out.reshape(*places, channels).movedim(-1, dim),
        "weights": planes(weights),
    }
    if case.prev_weights is not None:
        prev = inputs["prev_weights"]
        shared = planes(scores.log_softmax(0))[:, : prev.shape[1]]
        zero = prev == 0
        positive = torch.where(zero, 1.0, prev)
        kl = torch.where(zero, 0.0, positive * (positive.log() - shared)).sum(1)
        found |= {"kl": kl, "kl_mean": kl.flatten(1).mean(1) if kl.dim() > 1 else kl}
    return case.with_gradients(found, inputs)


def position_tolerances(case: PositionCase) -> dict[str, float]:
    """Largest absolute difference from the oracle that rounding in the accumulation type explains, for every name.

    As :func:`support.oracle.tolerances`, with C terms to a score and to a dot product: a score is off by u times the
    sum of its terms' absolute values, and by the rounding of its root mean square; a weight by a factor of that and of
    the sum over T, `factor`; a score's gradient by that and by the error of `<dout, v>`, twice. A gradient of a key is
    a score's gradient times the query over the RMS, less a part of the key, and each product is rounded. Gradients of
    vectors are sums over all positions and depths, whose errors are independent: their root, four times.
    """
    u = (
        torch.finfo(torch.float64 if case.values[0].dtype == torch.float64 else torch.float32).eps
        / 2
    )
    dim = -1 if case.channels_last else 1
    value = case.values[0]
    channels, depth = value.shape[dim], len(case.values)
    scale = abs(1.0 if case.scale is None else case.scale)
    if not value.numel():
        return dict.fromkeys([*OUTPUTS, *("d " + n for n in case.inputs())], 0.0)

    def by_channel(x: Tensor) -> Tensor:
        return (
            x.double()
            if x.dim() > 1
            else x.double().reshape(
                [-1 if d == dim % value.dim() else 1 for d in range(value.dim())]
            )
        )

    q = scale * by_channel(case.query)
    w = 1.0 if case.norm_weight is None else by_channel(case.norm_weight)
    keys = case.values if case.keys is None else case.keys
    normed = case.keys is None or case.norm_weight is not None
    inverse = [
        (k.double().square().mean(dim, keepdim=True) + case.eps).rsqrt()
        if normed
        else torch.ones(1)
        for k in keys
    ]
    r = largest(inverse)
    products = [(q * w * k.double() * i).abs().sum(dim) for k, i in zip(keys, inverse, strict=True)]
    score = largest(products)
    factor = 2 * u * (depth**0.5 + 3 + 2 * score)
    dots = dots_error = 0.0
    dout = case.arriving.get("out")
    if dout is not None:
        for v in case.values:
            product = dout.double() * v.double()
            dots = max(dots, largest([product.sum(dim)]))
            dots_error = max(dots_error, u * product.square().mean().sqrt().item() * channels * 2)
    dots += largest([case.arriving.get("weights")])
    logs, dkl = 1 + score, 0.0
    if case.prev_weights is not None:
        prev = case.prev_weights[case.prev_weights != 0].double()
        logs += largest([prev.log()])
        dkl = largest([case.arriving.get("kl")]) + largest([case.arriving.get("kl_mean")])
    size = 2 * (dots + dkl)
    dscore = 2 * dots_error + 4 * factor * size + 4 * u * size
    q_max, w_max, k_max = largest([q]), w if isinstance(w, float) else largest([w]), largest(keys)
    towards_key = r * q_max * w_max + r * r * score / channels * k_max
    towards_row = r * k_max
    terms = value.numel() / channels * depth
    of_sum = 4 * terms**0.5
    dkey = (dscore + 4 * u * size) * towards_key
    allowed = {
        "out": factor * largest(case.values),
        "weights": factor,
        "kl": factor * logs,
        "kl_mean": factor * logs,
        "d prev_weights": dkl * factor * logs,
        "d query": dscore
        * towards_row
        * w_max
        * scale
        * (depth if case.query.dim() > 1 else of_sum),
        "d norm_weight": dscore * towards_row * q_max * of_sum,
    }
    for t in range(depth):
        own = dkey if case.keys is None else 0.0
        allowed[f"d values[{t}]"] = factor * largest([dout]) + own
        allowed[f"d keys[{t}]"] = dkey
    return allowed


def assert_position_matches(
    found: dict[str, Tensor], case: PositionCase, expected: dict[str, Tensor] | None = None
) -> None:
    """Every output and gradient in `found` equals the oracle's within :func:`position_tolerances`."""
    expected = position_oracle(case) if expected is None else expected
    # A mean over no position is NaN; so is a result without elements, of which nothing is compared.
    assert_within(found, expected, position_tolerances(case), case, may_be_nan=["kl_mean"])
