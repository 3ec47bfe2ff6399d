"""The sizes, depths and layouts that operations over lists of maps are run with, as decorators of their tests."""

from __future__ import annotations

from typing import Any

import torch
from support.backends import WITH_KERNELS, over, words
from support.layouts import channels_last, contiguous
from support.pairs import pairs

FORMS = (contiguous, channels_last)


def one_is_usual(pair: Any) -> bool:
    """Two layouts meet where one of them is contiguous or channels_last."""
    if set(pair) != {"layout", "dout"}:
        return True
    return bool({*pair.values()} & {*FORMS})


over_sizes = over(
    "pair",
    lambda backend: pairs({"size": backend.sizes, "layout": FORMS, "dtype": backend.dtypes}),
    ids=words,
)
over_sizes_of_tokens = over(
    "pair",
    lambda backend: pairs({"size": backend.token_sizes, "dtype": backend.dtypes}),
    ids=words,
)
over_depths = over(
    "pair",
    lambda backend: pairs(
        {"depth": backend.depths, "layout": FORMS, "dtype": backend.dtypes},
        lambda pair: "dtype" not in pair or pair.get("depth", 3) in (1, 3, 31, 33, 65),
    ),
    ids=words,
)
# Maps larger than what is worked on at a time, and more of them than the dimensions of a grid hold.
over_sizes_beyond_all_pieces = over(
    "pair",
    lambda backend: [
        {"size": (shape, heads), "layout": layout, "dtype": dtype}
        for shape, heads, layout in backend.beyond
        for dtype in (torch.float32, torch.bfloat16)
    ],
    [backend for backend in WITH_KERNELS if backend.beyond],
    ids=words,
)
