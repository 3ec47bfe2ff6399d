"""Blocks that take over an earlier retrieval: one call a block, against the same modules in eager PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from support.backends import WITH_KERNELS, Backend, over, words
from support.layer_checks import FORMS, check, forward_only, leaf, make, step
from support.pairs import pairs
from torch import nn

import ela_kernels as ek

# Which of the blocks are skipped: the last, two on end, one before any retrieval, with retrievals around it.
PATTERNS = ("01", "011", "10", "010")


def reusing(pair: dict[str, Any], dtype: torch.dtype, **options: Any) -> tuple[nn.ModuleList, Any]:
    """Blocks of a pattern, and their input."""
    shape, head_dim = pair["size"]
    pattern = pair["pattern"]
    blocks, x = make(
        "block",
        shape,
        len(pattern),
        head_dim,
        dtype,
        pair["form"],
        skip="reuse",
        provides=pair["provides"],
        **options,
    )
    for block, mark in zip(blocks, pattern, strict=True):
        block.skipped = mark == "1"
    return blocks.train(pair["training"]), x


def sizes(backend: Backend) -> list[Any]:
    """Of one position and sample there is no variance."""
    return [(shape, d) for shape, d in backend.layer_sizes if shape[0] * shape[2] > 1]


def cases(backend: Backend) -> list[dict[str, Any]]:
    return pairs(
        {
            "size": backend.some(sizes(backend)),
            "pattern": ["01"],
            "provides": [True, False],
            "form": FORMS,
            "training": [True, False],
        }
    )


def patterns(backend: Backend) -> list[dict[str, Any]]:
    return pairs(
        {
            "size": [((2, 6, 2, 3), 2) if backend.is_slow else ((3, 12, 5, 7), 3)],
            "pattern": PATTERNS,
            "provides": [True, False],
            "form": FORMS,
            "training": [True, False],
        }
    )


def forward_calls(pattern: str, provides: bool) -> dict[str, int]:
    """A block before any retrieval passes its input on."""
    reusing = 0 if provides else pattern[pattern.index("0") :].count("1")
    return {
        "layer": len(pattern) if provides else pattern.count("0"),
        "norm_forward": reusing,
    }


@over("pair", lambda backend: cases(backend) + patterns(backend), WITH_KERNELS, ids=words)
def test_blocks(backend, pair, made):
    blocks, x = reusing(pair, backend.exact)
    check(backend, step(), blocks, x)
    assert {name: made.count(name) for name in ("layer", "norm_forward")} == forward_calls(
        pair["pattern"], pair["provides"]
    )
    assert set(made) <= {"layer", "layer_backward", "norm_forward", "norm_backward"}


@over("pair", patterns, WITH_KERNELS, ids=words)
def test_without_gradients(backend, pair, made):
    """What is retrieved has memory of its own, where the output would take its place."""
    blocks, x = reusing(pair, backend.exact)
    check(backend, forward_only(torch.no_grad), blocks, x)
    assert made.count("norm_backward") == made.count("layer_backward") == 0


def dtypes_of(backend: Backend) -> list[dict[str, Any]]:
    some = [p for p in patterns(backend) if p["pattern"] == "01"]
    return [{"dtype": dtype, **pair} for dtype in backend.dtypes for pair in some]


@over("pair", dtypes_of, WITH_KERNELS, ids=words)
def test_dtypes(backend, pair):
    blocks, x = reusing(pair, pair["dtype"])
    check(backend, step(("out", "first")), blocks, x)


KINDS_OF_BLOCKS = {
    "no parameters": {"norm_layer": lambda c: nn.BatchNorm2d(c, affine=False)},
    "not tracked": {"norm_layer": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
    "cumulative": {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=None)},
    "no activation": {"act_layer": nn.Identity},
}
USUAL = {"size": ((4, 6, 3, 4), 3), "pattern": "010", "training": True}


def kinds_of_blocks(backend: Backend) -> list[dict[str, Any]]:
    return pairs({"kind": list(KINDS_OF_BLOCKS), "provides": [True, False], "form": FORMS})


@over("pair", kinds_of_blocks, WITH_KERNELS, ids=words)
def test_kinds_of_blocks(backend, pair):
    blocks, x = reusing({**USUAL, **pair}, backend.exact, **KINDS_OF_BLOCKS[pair["kind"]])
    check(backend, step(), blocks, x)


@over("provides", lambda backend: [True, False], WITH_KERNELS)
def test_the_same_samples_are_dropped(backend, provides):
    pair = {**USUAL, "form": FORMS[0], "provides": provides}
    blocks, x = reusing(pair, backend.exact, drop_path=0.4)
    blocks, x = blocks.to(backend.device), leaf(x, backend.device)
    found = step()(copy.deepcopy(blocks), x)
    with ek.use_backend("eager"):  # in the same dtype on the same device: others draw others
        expected = step()(copy.deepcopy(blocks), x)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=2e-4, atol=2e-4)


@over("provides", lambda backend: [True, False], WITH_KERNELS)
def test_a_frozen_norm_after_one_that_is_trained(backend, provides):
    """Each norm takes the batch's statistics, which the retrieval's norm has taken or has not, or its own."""
    size = ((3, 6, 3, 4), 3)
    pair = {"size": size, "pattern": "0101", "form": FORMS[0], "training": True}
    blocks, x = reusing({**pair, "provides": provides}, backend.exact)
    blocks[1].norm.eval()  # the batch's were taken, its own are used
    blocks[2].norm.eval()  # none were taken, and the batch's are wanted: by pieces
    check(backend, step(), blocks, x)
