"""What the layers that retrieved one layer leave for it, added up: the kernels by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from support.backends import WITH_KERNELS, Backend, on, over, words
from support.cases import Maker
from support.cuda_on_cpu import off_by
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
)
from support.pairs import pairs
from torch import Tensor

FORMS = (contiguous, channels_last)


class Left(NamedTuple):
    """Of one layer."""

    q: Tensor
    weights: Tensor
    dscores: Tensor
    dout: Tensor | None
    channels_last: bool


def contributions(
    backend: Backend,
    shape: Sequence[int],
    depths: Sequence[int],
    heads: int,
    dtype: torch.dtype,
    makers: Maker | Sequence[Maker] = contiguous,
    channels_last: bool = False,
) -> list[Left]:
    """What layers of some depths have left; `makers` lay their output gradients out, repeated in turn."""
    makers = [makers] if callable(makers) else list(makers)
    batch, channels = shape[0], shape[-1 if channels_last else 1]
    accumulate = torch.promote_types(dtype, torch.float32)
    return [
        Left(
            backend.put(torch.randn(batch, channels).to(dtype)),
            backend.put(torch.randn(batch, heads, depth, dtype=accumulate).softmax(-1)),
            backend.put(torch.randn(batch, heads, depth, dtype=accumulate)),
            backend.put(makers[m % len(makers)](shape, dtype)),
            channels_last,
        )
        for m, depth in enumerate(depths)
    ]


def assert_sum(backend: Backend, found: Tensor, terms: Sequence[Tensor]) -> None:
    """`found` is the sum of the float64 `terms`.

    A product and each of the M additions, in whatever order, err by at most half an ulp of the accumulation
    type of what they round, which no partial sum of absolute values exceeds: (M + 1) u sum |term|. The result is
    rounded once more.
    """
    exact = torch.stack(list(terms)).sum(0)
    info = torch.finfo(found.dtype)
    u = torch.finfo(torch.promote_types(found.dtype, torch.float32)).eps / 2
    allowed = (len(terms) + 1) * u * torch.stack(list(terms)).abs().sum(0)
    rounded = (exact.abs() + allowed) * backend.rounding(
        found.dtype
    ) + info.smallest_normal * info.eps
    error = (found.double() - exact).abs()
    assert not error.isnan().any()
    assert (error <= allowed + rounded).all(), (error - allowed - rounded).max()


def check_gather(
    backend: Backend,
    left: list[Left],
    index: int,
    heads: int,
    channels_last: bool = False,
    need: str = "key value",
) -> tuple[Tensor | None, Tensor | None]:
    dkey, dvalue = backend.gather(
        [backend.contribution(*one) for one in left],
        index,
        heads,
        channels_last,
        "key" in need,
        "value" in need,
    )
    per_head = left[0].q.shape[1] // heads

    def column(x: Tensor) -> Tensor:
        return x[..., index].double().repeat_interleave(per_head, 1)  # [B, C]

    assert (dkey is not None) == ("key" in need)
    if dkey is not None:
        assert dkey.dtype == left[0].q.dtype
        assert_sum(backend, dkey, [column(r.dscores) * r.q.double() for r in left])
    given = [r for r in left if r.dout is not None]
    assert (dvalue is not None) == ("value" in need and bool(given))
    if dvalue is not None:
        channel = -1 if channels_last else 1
        terms = []
        for r in given:
            dout = r.dout.double().movedim(channel, 1)
            factor = column(r.weights).reshape(*dout.shape[:2], *[1] * (dout.dim() - 2))
            terms.append((factor * dout).movedim(1, channel))
        assert dvalue.shape == given[0].dout.shape
        assert_sum(backend, dvalue, terms)
    return dkey, dvalue


@over(
    "pair",
    lambda backend: pairs(
        {
            "layout": MAP_LAYOUTS,
            "dtype": backend.dtypes,
            "size": [((3, 12, 5, 7), 3), ((2, 16, 4, 8), 2)],
        }
    ),
    WITH_KERNELS,
    ids=words,
)
def test_maps(backend, pair):
    shape, heads = pair["size"]
    left = contributions(backend, shape, (3, 4, 6), heads, pair["dtype"], pair["layout"])
    check_gather(backend, left, 2, heads)


@over(
    "pair",
    lambda backend: pairs(
        {
            "layout": TOKEN_LAYOUTS,
            "dtype": backend.dtypes,
            "size": [((2, 9, 12), 2), ((2, 5, 32), 2)],
        }
    ),
    WITH_KERNELS,
    ids=words,
)
def test_tokens(backend, pair):
    shape, heads = pair["size"]
    left = contributions(backend, shape, (1, 2, 5), heads, pair["dtype"], pair["layout"], True)
    check_gather(backend, left, 0, heads, True)


@on(WITH_KERNELS)
@pytest.mark.parametrize("turn", range(4))
def test_each_gradient_laid_out_otherwise(backend, turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    makers = mixed[turn:] + mixed[:turn]
    left = contributions(backend, (2, 6, 4, 5), (3, 4, 5, 6), 2, torch.float32, makers)
    check_gather(backend, left, 1, 2)


@over(
    "pair",
    lambda backend: pairs(
        {
            "count": [c for c in (1, 2, 3, 5, 8, 31, 32, 33, 65, 256) if c <= max(backend.depths)],
            "layout": FORMS,
        }
    ),
    WITH_KERNELS,
    ids=words,
)
def test_many_layers(backend, pair):
    count = pair["count"]
    if count > (backend.max_depth or count):
        pytest.skip(f"{backend} serves fewer layers, and refuses more")
    depths = range(1, count + 1)
    left = contributions(backend, (2, 16, 3, 5), depths, 2, torch.float32, pair["layout"])
    check_gather(backend, left, 0, 2)


SIZES = [
    ((1, 1, 1, 1), 1),
    ((2, 37, 7, 7), 37),
    ((2, 24, 4, 4), 4),
    ((3, 8, 1, 1), 8),
    ((1, 6, 37, 41), 2),
    ((1, 272, 3, 3), 2),
    ((1, 1100, 2, 4), 2),
    ((2, 16, 33, 31), 2),
]


@over(
    "pair",
    lambda backend: pairs({"size": SIZES, "layout": FORMS, "dtype": backend.dtypes}),
    WITH_KERNELS,
    ids=words,
)
def test_sizes(backend, pair):
    shape, heads = pair["size"]
    left = contributions(backend, shape, (2, 3), heads, pair["dtype"], pair["layout"])
    check_gather(backend, left, 1, heads)


@over(
    "pair",
    lambda backend: pairs({"elements": [1, 4, 7], "layout": FORMS, "one": [False, True]}),
    WITH_KERNELS,
    ids=words,
)
def test_addresses_off_the_vectors_boundary(backend, pair):
    off = off_by(pair["elements"], pair["layout"])
    makers = [pair["layout"], off] if pair["one"] else off
    left = contributions(backend, (2, 16, 4, 4), (2, 3), 2, torch.bfloat16, makers)
    check_gather(backend, left, 0, 2)


@over(
    "pair",
    lambda backend: pairs(
        {
            "need": ["key", "value", "key value"],
            "without": [(), (0,), (1, 2), (0, 1, 2)],
            "layout": FORMS,
        }
    ),
    WITH_KERNELS,
    ids=words,
)
def test_a_part(backend, pair):
    """Of keys or values alone, and of layers whose output no gradient came through."""
    left = contributions(backend, (2, 12, 5, 3), (2, 3, 4), 3, torch.float32, pair["layout"])
    left = [one._replace(dout=None) if m in pair["without"] else one for m, one in enumerate(left)]
    check_gather(backend, left, 1, 3, need=pair["need"])
