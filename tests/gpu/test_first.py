"""The first tests to run on a device: every family of kernels in every dtype and layout, at two shapes, quickly.

`bash benchmarks/run_gpu.sh OUT_DIR --plan first` runs these, and the others only when they pass. What each kernel does
at all the other sizes, depths and layouts is tested in tests/conformance/.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases import make_case
from support.layer_stages import (
    FORMS,
    INTERPRETED,
    make_blocks,
    make_light_blocks,
    make_stage,
)
from support.layers_on_gpu import assert_right
from support.layouts import channels_last, contiguous
from support.on_gpu import GPU_DTYPES, case_on, evaluate_on, moved
from support.oracle import assert_matches, oracle, tolerances
from support.pull_stages import Stage, check_stage

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("backend", "poisoned_memory", "exact_convolutions"),
]

# Every address and stride on 16 bytes, several heads; and none of them, with a map that no tile divides.
SHAPES = {"aligned": (4, 32, 8, 16), "odd": (3, 21, 13, 9)}
HEAD_DIMS = {"aligned": 16, "odd": 7}
DEPTH = 3

shapes = pytest.mark.parametrize("shape", list(SHAPES))
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
makers = pytest.mark.parametrize("maker", [contiguous, channels_last])
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def factor_of(backend: str) -> int:
    """See :func:`support.layers_on_gpu.assert_right`; a dry run may interpret, which rounds to bfloat16 otherwise."""
    return INTERPRETED if getattr(KERNELS[backend], "interprets", False) else 8


def heads_of(shape: str) -> int:
    return SHAPES[shape][1] // HEAD_DIMS[shape]


@shapes
@dtypes
@makers
def test_the_op(maker, dtype, shape, kernels_ran):
    """Forward, and the backward that gives all gradients at once."""
    case = make_case(SHAPES[shape], DEPTH, heads_of(shape), dtype, maker, dout=maker)
    assert_matches(evaluate_on(case), case)
    assert kernels_ran == ["forward", "backward"]


@shapes
@dtypes
def test_weights_alone(dtype, shape, kernels_ran):
    case = make_case(SHAPES[shape], DEPTH, heads_of(shape), dtype)
    on_device = case_on(case)
    with torch.no_grad():
        weights, kl = ek.layer_attention_weights(
            on_device.q, on_device.keys, case.heads, prev_weights=on_device.prev_weights
        )
    want, allowed = oracle(case), tolerances(case)
    for name, found in (("weights", weights), ("kl", kl)):
        torch.testing.assert_close(
            found.cpu().double(), want[name].detach(), rtol=0, atol=allowed[name]
        )
    assert kernels_ran == ["weights"]


@shapes
@dtypes
@makers
def test_a_history(maker, dtype, shape, kernels_ran):
    """Forward, dot products and what is gathered from later layers."""
    check_stage(Stage(SHAPES[shape], heads_of(shape), DEPTH, dtype, maker), moved)
    assert kernels_ran.count("forward") == kernels_ran.count("backward") == DEPTH
    assert kernels_ran.count("gather") == DEPTH


@shapes
@dtypes
@forms
def test_layers(form, dtype, shape, backend, layers_ran):
    """What makes query, key and value, the attention, and the way back through both."""
    layers, x = make_stage(SHAPES[shape], DEPTH, HEAD_DIMS[shape], dtype, form)
    assert_right(layers, x, backend, factor=factor_of(backend))
    assert layers_ran == ["layer"] * DEPTH + ["layer_backward"] * DEPTH


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@shapes
@dtypes
@forms
def test_blocks(form, dtype, shape, is_training, backend, layers_ran):
    """The same with norm, activation and residual, the norm's statistics those of the batch or tracked ones."""
    blocks, x = make_blocks(SHAPES[shape], DEPTH, HEAD_DIMS[shape], dtype, form)
    assert_right(blocks.train(is_training), x, backend, factor=factor_of(backend))
    assert layers_ran == ["layer"] * DEPTH + ["layer_backward"] * DEPTH


def light_step(blocks, x):
    """Outputs, and gradients, those of one kind of parameter together: of a filter there are three numbers."""
    blocks, previous, outs = copy.deepcopy(blocks), PreviousOutput(), []
    for block in blocks:
        outs.append(block(outs[-1] if outs else x, previous))
    leaves = {"0.x": x} | dict(blocks.named_parameters())
    grads = torch.autograd.grad(outs[-1].double().square().sum(), list(leaves.values()))
    kinds = {f"output {i}": [out.detach()] for i, out in enumerate(outs)}
    for name, grad in zip(leaves, grads, strict=True):
        kinds.setdefault("gradients of " + name.partition(".")[2], []).append(grad)
    return {k: torch.cat([t.double().cpu().flatten() for t in ts]) for k, ts in kinds.items()}


@shapes
@dtypes
@forms
def test_light_blocks(form, dtype, shape, light_backend):
    blocks, x = make_light_blocks(SHAPES[shape], DEPTH, HEAD_DIMS[shape], dtype)
    x = x.detach().contiguous(memory_format=form).requires_grad_()
    assert_right(blocks, x, light_backend, light_step, factor=factor_of(light_backend))
