"""Whole layers and whole blocks on the CUDA kernels, run on the CPU, against the modules without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import cuda_on_cpu, layer_tests
from support.cuda_on_cpu import launched
from support.layer_stages import FORMS, make_blocks, make_stage, step
from support.layer_tests import (
    DTYPES,
    LayerTests,
    check_layers_and_blocks,
    check_stage,
    check_stage_of_blocks,
    layer_calls,
    layer_step,
)

import ela_kernels as ek

# Positions that are less than a vector and several tiles.
SHAPES = [
    *layer_tests.SHAPES,
    ((2, 37, 7, 7), 37),
    ((2, 70, 2, 9), 14),
    ((2, 136, 2, 3), 8),
    ((1, 4, 56, 56), 2),
]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    with cuda_on_cpu.kernels_on_cpu() as module:
        yield module


@pytest.fixture
def calls(monkeypatch):
    """What the CUDA kernels of a layer were called for, in order."""
    return layer_calls(monkeypatch, "cuda")


class TestLayers(LayerTests):
    backend = "cuda"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES, ids=str)
def test_a_stage(shape, head_dim, form, calls):
    check_stage(shape, head_dim, form, calls)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES[2:], ids=str)
def test_a_stage_of_blocks(shape, head_dim, training, form, calls):
    check_stage_of_blocks(shape, head_dim, training, form, calls)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_maps_of_several_tiles(form):
    check_layers_and_blocks((1, 3, 39, 130), 2, 1, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_no_order_and_no_grid(dtype, form, kernels):
    blocks, x = make_blocks((2, 12, 9, 7), 2, 3, dtype, form)
    first = step(blocks, x)
    for order, limit in ((0, 0), (1, 0), (3, 0), (2, 2)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        for i, (a, b) in enumerate(zip(first, step(blocks, x), strict=True)):
            assert torch.equal(a, b), f"{i} in order {order} with a limit of {limit}"


def test_launches_of_a_layer(kernels):
    """Of the last of two layers: its producer and its attention, and backward the two of each, and one that gathers."""
    layers, x = make_stage((2, 8, 4, 4), 2, 4, torch.float32)
    history = ek.LayerHistory()
    y = layers[0](x, history, residual=True)
    kernels.take_launches()
    out = layers[1](y, history, residual=True)
    assert launched(kernels)[0] == "layer_producer_fwd"
    torch.autograd.grad(out, [y, *layers[1].parameters()], torch.ones_like(out))
    assert launched(kernels) == [
        "layer_attention_bwd_dots",
        "layer_attention_bwd_tail",
        "layer_attention_bwd_gather",
        "layer_producer_bwd",
        "layer_filters_bwd",
    ]


def test_the_backend_that_runs(ran):
    layers, x = make_stage((2, 6, 3, 4), 2, 3, torch.float32)
    layer_step()(layers, x)
    assert ran == ["cuda layer"] * 2 + ["cuda layer backward"] * 2


def test_warming_up(ran):
    ek.warmup([(2, 8, 3, 4)], depth=2, head_dim=4, device="cpu")
    assert ran.count("cuda layer backward") == 2 * (1 + 2 + 2)
