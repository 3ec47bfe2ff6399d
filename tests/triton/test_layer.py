"""The Triton kernels of a whole layer and of a whole block against the modules without them."""

from __future__ import annotations

import pytest
import torch
from support import layer_tests
from support.layer_stages import (
    FORMS,
    INTERPRETED,
    assert_as_close,
    autocast_results,
    make_blocks,
    make_stage,
    run_blocks,
    run_stage,
    step,
)
from support.layer_tests import (
    LayerTests,
    check_layers_and_blocks,
    check_stage,
    check_stage_of_blocks,
    layer_calls,
)

import ela_kernels as ek

SHAPES = [
    *layer_tests.SHAPES,
    ((1, 37, 7, 7), 37),
    ((1, 70, 2, 9), 14),
]


@pytest.fixture
def calls(monkeypatch):
    """What the Triton kernels of a layer were called for, in order."""
    return layer_calls(monkeypatch, "triton")


@pytest.mark.usefixtures("few_programs")
class TestLayers(LayerTests):
    backend = "triton"
    bfloat16_factor = INTERPRETED


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES, ids=str)
def test_a_stage(shape, head_dim, form, calls):
    check_stage(shape, head_dim, form, calls)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_more_channels_than_a_block_of_rows(form, calls):
    """Query and key across the edges of programs, and interleaved channels that fill more than one strip."""
    check_stage((2, 136, 2, 3), 8, form, calls)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES[2:], ids=str)
def test_a_stage_of_blocks(shape, head_dim, training, form, calls):
    check_stage_of_blocks(shape, head_dim, training, form, calls)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_patches_of_a_plane_in_several_programs(form):
    check_layers_and_blocks((1, 3, 13, 18), 2, 1, form)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_call_gives_the_same_bits(form):
    blocks, x = make_blocks((2, 6, 9, 7), 2, 3, torch.float32, form)
    for a, b in zip(step(blocks, x), step(blocks, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast(dtype, form, calls):
    """Float32 filters beside maps of autocast's dtype; a block around a float32 input takes PyTorch's own norm."""
    for make, run in ((make_stage, run_stage), (make_blocks, run_blocks)):
        modules, x = make((3, 6, 5, 6), 2, 3, torch.float32, form)
        x = x.detach().to(dtype).requires_grad_()
        found, plain, exact = autocast_results(run, modules, x, torch.float16)
        assert_as_close(found, plain, exact, torch.float16)
    in_layer = ["layer"] * 2 + ["layer_backward"] * 2
    in_block = ["layer", "norm_forward"] * 2 + ["layer_backward", "norm_backward"] * 2
    assert calls == in_layer + (in_layer if dtype == torch.float32 else in_block)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("first", ["cpp", "triton"])
def test_kernels_of_two_backends_do_not_meet(first):
    """What one leaves for the layers before it the other cannot read."""
    if ek.backend_status()["cpp"] != "available":
        pytest.skip("needs the compiled kernels")
    layers, x = make_stage((2, 6, 3, 4), 2, 3, torch.float32)
    history, y = ek.LayerHistory(), x
    for layer, backend in zip(
        layers, (first, "cpp" if first == "triton" else "triton"), strict=True
    ):
        with ek.use_backend(backend):
            y = layer(y, history)
    with pytest.raises(RuntimeError, match="kernels of different backends"):
        y.sum().backward()
