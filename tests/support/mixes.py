"""Calls of the mix by given weights, and what they give in float64 by another formula, channel by channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from support.cases import Maker
from support.gradients import assert_within, largest
from support.layouts import contiguous
from torch import Tensor

import ela_kernels as ek

WEIGHTS = ["[B, G, T]", "[G, T]", "[T]"]
"""The forms of weights that the op takes, as its docstring writes them."""


@dataclass
class Mix:
    weights: Tensor
    values: list[Tensor]
    channels_last: bool = False
    dout: Tensor | None = None
    wanted: list[str] = field(default_factory=list)

    def inputs(self) -> dict[str, Tensor]:
        return {"weights": self.weights} | {f"values[{t}]": v for t, v in enumerate(self.values)}

    def __str__(self) -> str:
        value = self.values[0]
        return (
            f"weights {list(self.weights.shape)} {self.weights.dtype} values {list(value.shape)} strides "
            f"{value.stride()} {value.dtype} channels_last={self.channels_last} wanted={self.wanted}"
        )


def make_mix(
    shape: Sequence[int] = (2, 12, 5, 3),
    depth: int = 3,
    heads: int = 3,
    dtype: torch.dtype = torch.float32,
    makers: Maker | Sequence[Maker] = contiguous,
    *,
    form: str = "[B, G, T]",
    wide: bool = True,
    channels_last: bool = False,
    dout: Maker = contiguous,
) -> Mix:
    """A random call with weights of either sign.

    Args:
        makers: lay the values out, repeated in turn.
        form: of the weights.
        wide: weights in the accumulation dtype, or in that of the values.
    """
    makers = [makers] if callable(makers) else list(makers)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = {"[B, G, T]": (shape[0], heads, depth), "[G, T]": (heads, depth), "[T]": (depth,)}
    weights = torch.randn(sizes[form], dtype=accumulate).to(accumulate if wide else dtype)
    values = [makers[t % len(makers)](shape, dtype) for t in range(depth)]
    mix = Mix(weights, values, channels_last, dout(shape, dtype))
    mix.wanted = list(mix.inputs())
    return mix


def put_mix(mix: Mix, put: Callable[[Tensor], Tensor]) -> Mix:
    """The call with its tensors where `put` puts them."""
    return dataclasses.replace(
        mix,
        weights=put(mix.weights),
        values=[put(v) for v in mix.values],
        dout=None if mix.dout is None else put(mix.dout),
    )


def evaluate(mix: Mix, op: Callable[..., Tensor] = ek.depth_mix) -> dict[str, Tensor]:
    """The sum and the wanted gradients by name, through the package."""
    inputs = {n: x.detach().requires_grad_(n in mix.wanted) for n, x in mix.inputs().items()}
    weights, *values = inputs.values()
    out = op(weights, values, channels_last=mix.channels_last)
    assert (out.shape, out.dtype) == (mix.values[0].shape, mix.values[0].dtype)
    found = {"out": out.detach()}
    if mix.wanted:
        assert mix.dout is not None
        gradients = torch.autograd.grad(out, [inputs[n] for n in mix.wanted], mix.dout)
        for name, gradient in zip(mix.wanted, gradients, strict=True):
            assert gradient.dtype == inputs[name].dtype
            found["d " + name] = gradient
    return found


def by_hand(mix: Mix) -> dict[str, Tensor]:
    """The same in float64, with the gradients by their formulas."""
    weights, depth = mix.weights.double(), len(mix.values)
    values = [v.double().movedim(-1, 1) if mix.channels_last else v.double() for v in mix.values]
    assert mix.dout is not None
    dout = mix.dout.double().movedim(-1, 1) if mix.channels_last else mix.dout.double()
    batch, channels = dout.shape[:2]
    by_head = weights.reshape(1, 1, depth) if weights.dim() == 1 else weights
    by_head = by_head.expand(batch, -1, -1)
    head_dim = channels // by_head.shape[1]
    out, dby_head = torch.zeros_like(dout), torch.zeros_like(by_head)
    dvalues = [torch.zeros_like(dout) for _ in values]
    for c in range(channels):
        for t, value in enumerate(values):
            factor = by_head[:, c // head_dim, t].reshape(-1, *[1] * (dout.dim() - 2))
            out[:, c] += factor * value[:, c]
            dvalues[t][:, c] = factor * dout[:, c]
            products = (dout[:, c] * value[:, c]).unsqueeze(-1)
            dby_head[:, c // head_dim, t] += products.flatten(1).sum(1)
    dweights = dby_head if weights.dim() == 3 else dby_head.sum(0)
    found = {"out": out, "d weights": dweights.reshape(weights.shape)}
    found |= {f"d values[{t}]": d for t, d in enumerate(dvalues)}
    if mix.channels_last:
        for name, x in found.items():
            found[name] = x if name == "d weights" else x.movedim(1, -1)
    return found


def assert_mixed(found: dict[str, Tensor], mix: Mix) -> None:
    """What was found is :func:`by_hand`, up to rounding in the accumulation dtype and of the result.

    With unit roundoff u: a sum of T products takes u for each product and each sum, of numbers that are at most T times
    the largest product. A weight's gradient is a sum of n products, of root mean square r, in lanes and blocks, with an
    error of u r n at most; shared by the batch it is one of B such sums. A value's gradient is one product.
    """
    expected = by_hand(mix)
    assert found.keys() == {"out", *("d " + name for name in mix.wanted)}
    u = (
        torch.finfo(torch.float64 if mix.values[0].dtype == torch.float64 else torch.float32).eps
        / 2
    )
    depth, batch = len(mix.values), max(1, mix.values[0].shape[0])
    assert mix.dout is not None
    products = [(mix.dout.double() * v.double()).square() for v in mix.values]
    rms = max((p.mean().sqrt().item() for p in products if p.numel()), default=0.0)
    count = mix.values[0].numel() // batch * (1 if mix.weights.dim() == 3 else batch)
    largest_product = largest([mix.weights]) * largest(mix.values)
    allowed = dict.fromkeys(found, u * largest([mix.weights]) * largest([mix.dout]))
    allowed["out"] = u * (depth + 1) * depth * largest_product
    allowed["d weights"] = 2 * u * rms * count
    assert_within(found, {name: expected[name] for name in found}, allowed, mix)
