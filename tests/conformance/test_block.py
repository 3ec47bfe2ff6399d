"""Whole residual blocks: one call a block and direction, against the same modules in eager PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from support.backends import WITH_KERNELS, Backend, over, words
from support.layer_checks import FORMS, calls, check, leaf, make, step
from support.layer_stages import run_blocks
from support.pairs import pairs
from torch import nn

import ela_kernels as ek


def block_sizes(backend: Backend) -> list[dict[str, Any]]:
    """Of one position and sample there is no variance."""
    factors = {
        "size": [(shape, d) for shape, d in backend.layer_sizes if shape[0] * shape[2] > 1],
        "form": FORMS,
        "training": [True, False],
    }
    return pairs(factors)


@over("pair", block_sizes, WITH_KERNELS, ids=words)
def test_blocks(backend, pair, made):
    """Outputs, gradients and running statistics."""
    shape, head_dim = pair["size"]
    blocks, x = make("block", shape, 2, head_dim, backend.exact, pair["form"])
    check(backend, step(), blocks.train(pair["training"]), x)
    assert made == calls(2)


KINDS_OF_BLOCKS = {
    "usual": {},
    "no parameters": {"norm_layer": lambda c: nn.BatchNorm2d(c, affine=False)},
    "not tracked": {"norm_layer": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
    "cumulative": {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=None)},
    "momentum": {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=0.4, eps=0.1)},
    "no activation": {"act_layer": nn.Identity},
}


def _freeze_parts(blocks: nn.ModuleList) -> None:
    blocks[0].norm.requires_grad_(False)
    blocks[-1].attn.Wv.weight.requires_grad_(False)
    if blocks[-1].norm.bias is not None:
        blocks[-1].norm.bias.requires_grad_(False)


def _skip_one(blocks: nn.ModuleList) -> None:
    blocks[1].skipped = True


CHANGES = {
    "nothing": lambda blocks: None,
    "frozen": _freeze_parts,
    "a norm that is not trained": lambda blocks: blocks[-1].norm.eval(),
    "a block skipped": _skip_one,
}


def blocks_of_all_kinds(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "kind": list(KINDS_OF_BLOCKS),
        "change": list(CHANGES),
        "training": [True, False],
        "twice": [False, True],
        "form": FORMS,
    }
    return pairs(factors)


@over("pair", blocks_of_all_kinds, WITH_KERNELS, ids=words)
def test_kinds_of_blocks(backend, pair, made):
    options = KINDS_OF_BLOCKS[pair["kind"]]
    shape = (2, 6, 2, 3) if backend.is_slow else (3, 6, 4, 5)
    blocks, x = make("block", shape, 3, 3, backend.exact, pair["form"], **options)
    blocks.train(pair["training"])
    CHANGES[pair["change"]](blocks)
    once = step()

    def run(blocks, x):
        if pair["twice"]:  # another update of what is tracked
            run_blocks(blocks, x.detach())
        return once(blocks, x)

    check(backend, run, blocks, x)
    assert made.count("layer") == (6 if pair["twice"] else 3)
    assert {*made} == {"layer", "layer_backward"}


@over(
    "pair",
    lambda backend: pairs({"drop_path": [0.3, 1.0], "form": FORMS}),
    WITH_KERNELS,
    ids=words,
)
def test_the_same_samples_are_dropped(backend, pair):
    blocks, x = make(
        "block", (6, 6, 3, 4), 2, 3, backend.exact, pair["form"], drop_path=pair["drop_path"]
    )
    blocks, x = blocks.to(backend.device), leaf(x, backend.device)
    run = step()
    found = run(copy.deepcopy(blocks), x)
    with ek.use_backend("eager"):  # in the same dtype on the same device: others draw others
        expected = run(copy.deepcopy(blocks), x)
    tolerance = {"rtol": 2e-4, "atol": 2e-4}
    if backend.exact == torch.float64:
        tolerance = {"rtol": 1e-8, "atol": 1e-9}
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, **tolerance)
    dropped = (found["output 0"] == x).flatten(1).all(1)
    assert int(dropped.sum()) == 6 if pair["drop_path"] == 1 else 0 < int(dropped.sum()) < 6


@over("form", lambda backend: FORMS, WITH_KERNELS)
def test_statistics_of_values_far_from_zero(backend, form):
    """A difference of two large sums would lose the variance: 1e4 squared times a float's precision is ten."""
    block = ek.ELA(8, 4).to(backend.device)
    block.norm.momentum = 1.0  # running statistics are then those of the batch
    with torch.no_grad():
        block.attn.Wv.weight.zero_()[:, :, 1, 1] = 1.0
    x = (1e4 + torch.randn(4, 8, 10, 15)).to(backend.device).contiguous(memory_format=form)
    block(x, ek.LayerHistory())
    variance, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(block.norm.running_mean.double(), mean, rtol=1e-6, atol=0)
    # The values themselves are rounded to 1e-3.
    torch.testing.assert_close(block.norm.running_var.double(), variance, rtol=1e-3, atol=0)
