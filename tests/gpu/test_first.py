"""The first tests to run on a device: every family of kernels in every dtype and layout, at two shapes, quickly.

`bash benchmarks/run_gpu.sh OUT_DIR --plan first` runs these, and the others only when they pass. What each kernel does
at all the other sizes, depths and layouts is tested in tests/conformance/.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from support.cases import make_case
from support.held_values import HALVES
from support.layer_stages import (
    FORMS,
    INTERPRETED,
    gradients,
    make_blocks,
    make_light_blocks,
    make_stage,
    run_blocks,
    run_stage,
)
from support.layers_on_gpu import CPU, on_device
from support.layouts import channels_last, contiguous
from support.left_out import spread
from support.mixes import assert_mixed, evaluate, make_mix, put_mix
from support.on_gpu import DEVICE, GPU_DTYPES, case_on, evaluate_on, moved
from support.oracle import assert_matches, oracle, tolerances
from support.position import assert_position_matches, evaluate_position, make_position_case
from support.pull_stages import Stage, check_stage

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("backend", "poisoned_memory", "exact_convolutions"),
]

# Every address and stride on 16 bytes, several heads; and none of them, with a map that no tile divides. Numbers are
# many, since some lie within a rounding of zero before the activation, which then passes a whole gradient or none: of
# few, PyTorch may happen to have none such, and be held up as too exact.
SHAPES = {"aligned": (8, 32, 16, 32), "odd": (5, 21, 27, 19)}
HEAD_DIMS = {"aligned": 16, "odd": 7}
DEPTH = 3  # of three, a kernel is compiled for four
LAYERS = 2

shapes = pytest.mark.parametrize("shape", list(SHAPES))
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
makers = pytest.mark.parametrize("maker", [contiguous, channels_last])
forms = pytest.mark.parametrize("form", FORMS, ids=str)


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


def assert_gathered(found, expected, dtype):
    """A gradient is one rounding in the pull form, and as many as there are retrievals in the push form."""
    rtol = 2e-4 if dtype == torch.float32 else DEPTH * torch.finfo(dtype).eps
    for a, b in zip(found, expected, strict=True):
        a, b = a.double().cpu(), b.double().cpu()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


@pytest.mark.parametrize("given", [False, True], ids=["vector", "maps"])
@shapes
@dtypes
@makers
def test_positions(maker, dtype, shape, given, kernels_ran):
    """Attention at every position: forward, the push form, and gradients gathered in the pull form.

    Of values that are their own keys by one query, and with a query and keys for each position.
    """
    case = make_position_case(
        SHAPES[shape], DEPTH, dtype, maker, dout=maker, map_query=given, keys=given
    )
    assert_position_matches(evaluate_position(case, put=moved), case)
    assert kernels_ran == ["position forward", "position backward"]

    def of_values(pull):
        history, values, total = ek.PositionHistory(), [], 0
        for value in case.values:
            values.append(moved(value).requires_grad_())
            if pull:
                history.append(values[-1])
                out = history.attend(moved(case.query), moved(case.norm_weight))
            else:
                out = ek.position_attention(
                    moved(case.query), values, norm_weight=moved(case.norm_weight)
                ).out
            total = total + out.float().square().sum()
        return torch.autograd.grad(total, values)

    assert_gathered(of_values(True), of_values(False), dtype)
    assert kernels_ran.count("position gather") == DEPTH


@shapes
@dtypes
@makers
def test_a_tolerance(maker, dtype, shape, kernels_ran):
    """Retrievals of small weights are left out of sums, of dot products and of what is gathered."""
    case = spread(make_case(SHAPES[shape], DEPTH, heads_of(shape), dtype, maker, dout=maker))
    found = evaluate_on(case)
    assert (found["weights"] < case.tolerance).any()
    assert_matches(found, case)
    assert kernels_ran == ["forward", "backward"]
    on_device = case_on(case)
    q, options = on_device.q, {"scale": case.scale, "tolerance": case.tolerance}

    def of_values(pull):
        history, values, total = ek.LayerHistory(), [], 0
        for t, value in enumerate(on_device.values):
            values.append(value.detach().requires_grad_())
            if pull:
                out = history.attend(q, on_device.keys[t], values[-1], heads=case.heads, **options)
            else:
                keys = on_device.keys[: t + 1]
                out = ek.layer_attention(q, keys, values, case.heads, **options).out
            total = total + out.float().square().sum()
        return torch.autograd.grad(total, values)

    assert_gathered(of_values(True), of_values(False), dtype)
    assert kernels_ran.count("gather") == DEPTH


@shapes
@dtypes
@makers
def test_a_mix(maker, dtype, shape, kernels_ran):
    """A sum by weights that are given, with the gradients of these and of values, and of either alone."""
    for wanted in (("weights", "values"), ("weights",), ("values",)):
        mix = make_mix(SHAPES[shape], DEPTH, heads_of(shape), dtype, maker, dout=maker)
        mix.wanted = [name for name in mix.wanted if name.startswith(wanted)]
        found = evaluate(put_mix(mix, moved))
        assert_mixed({name: x.cpu() for name, x in found.items()}, mix)
    assert kernels_ran == ["mix", "mix backward"] * 3


@pytest.mark.parametrize("held", HALVES, ids=str)
@shapes
@makers
def test_values_held_in_half_precision(maker, held, shape, backend):
    """Layers in float32 retrieve what was rounded, and the gradients are those of what it was rounded from."""
    case = case_on(make_case(SHAPES[shape], DEPTH, heads_of(shape), torch.float32, maker))

    def step(history, values):
        leaves = [v.detach().requires_grad_() for v in values]
        pairs = zip(case.keys, leaves, strict=True)
        outs = [history.attend(case.q, k, v, heads=case.heads) for k, v in pairs]
        total = sum(out.square().sum() for out in outs)
        return [*(out.detach() for out in outs), *torch.autograd.grad(total, leaves)]

    found = step(ek.LayerHistory(dtype=held), case.values)
    expected = step(ek.LayerHistory(), [v.to(held).float() for v in case.values])
    assert {x.dtype for x in found} == {torch.float32}
    assert_gathered(found, expected, torch.float32)


def step(modules, x):
    """Outputs, and gradients, those of one kind of parameter together.

    The gradients that arrive are of either sign, so that sums of many stay within float16.
    """
    modules = copy.deepcopy(modules)
    if isinstance(modules[0], ek.ELA):
        outs, history = run_blocks(modules, x)
    elif isinstance(modules[0], ek.LayerAttention):
        outs, history = run_stage(modules, x)
    else:
        previous, outs, history = PreviousOutput(), [], None
        for block in modules:
            outs.append(block(outs[-1] if outs else x, previous))
    kinds = {f"output {i}": [out.detach()] for i, out in enumerate(outs)}
    arriving = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).double()
    loss = (outs[-1].double() * arriving.to(x.device)).sum()
    if history is not None:
        kinds |= {"weights": [history.weights.detach()], "divergence": [history.kl.detach()]}
        loss = loss + history.kl.double().sum() + history.weights.double().square().sum()
    leaves = {"0.x": x} | dict(modules.named_parameters())
    for name, grad in zip(leaves, gradients(loss, list(leaves.values())), strict=True):
        kind = re.sub("W[qk]", "Wq or Wk", name.partition(".")[2])
        kinds.setdefault(f"gradients of {kind}", []).append(grad)
    for name, buffer in modules.named_buffers():
        kinds.setdefault(name.rpartition(".")[2], []).append(buffer)
    return {k: torch.cat([t.double().cpu().flatten() for t in ts]) for k, ts in kinds.items()}


def check(modules, x, backend):
    """As near to float64 as PyTorch's own pieces in the same dtype, within 8 times: either is one draw of roundings.

    Besides 2e-5 of the norm, and half an ulp in half precision, where PyTorch happens to be exact. An activation whose
    input is within rounding of zero passes a whole gradient or none, of which one was seen to be 1e-3 of the norm of a
    filter's gradient, three sums of both signs; in half precision, with many such, these errors are as large as that
    gradient itself, and it is left out.
    """
    modules, x = modules.to(DEVICE), on_device(x)
    with ek.use_backend(backend):
        found = step(modules, x)
    with ek.use_backend("eager"):
        plain = step(modules, x)
        leaf = x.detach().to(CPU, torch.float64).requires_grad_()
        exact = step(copy.deepcopy(modules).to(CPU, torch.float64), leaf)
    is_half, has_activation = (
        x.dtype != torch.float32,
        not isinstance(modules[0], ek.LayerAttention),
    )
    # A dry run may interpret, which rounds to bfloat16 otherwise; eager PyTorch has no kernels.
    factor = INTERPRETED if getattr(KERNELS.get(backend), "interprets", False) else 8
    for kind, truth in exact.items():
        if is_half and has_activation and "Wq or Wk" in kind:
            continue
        own = 2e-5 + (torch.finfo(x.dtype).eps / 2 if is_half else 0)
        if has_activation and kind.startswith("gradients"):
            own += 1e-2
        error, theirs = ((r[kind] - truth).norm() for r in (found, plain))
        allowed = factor * theirs + own * truth.norm()
        assert error <= allowed, f"{kind}: {error:.3g} from float64, allowed is {allowed:.3g}"
    return exact


@shapes
@dtypes
@forms
def test_layers(form, dtype, shape, backend, layers_ran):
    """What makes query, key and value, the attention, and the way back through both."""
    layers, x = make_stage(SHAPES[shape], LAYERS, HEAD_DIMS[shape], dtype, form)
    check(layers, x, backend)
    assert layers_ran == ["layer"] * LAYERS + ["layer_backward"] * LAYERS


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@shapes
@dtypes
@forms
def test_blocks(form, dtype, shape, is_training, backend, layers_ran):
    """The same with norm, activation and residual, the norm's statistics those of the batch or tracked ones."""
    blocks, x = make_blocks(SHAPES[shape], LAYERS, HEAD_DIMS[shape], dtype, form)
    check(blocks.train(is_training), x, backend)
    assert layers_ran == ["layer"] * LAYERS + ["layer_backward"] * LAYERS


@shapes
@dtypes
@forms
def test_layers_and_blocks_with_a_tolerance(form, dtype, shape, backend):
    """Above all weights of the second layer, and below them: one between would part half precision's otherwise."""
    for make in (make_stage, make_blocks):
        for tolerance in (0.99, 1e-9):
            modules, x = make(SHAPES[shape], LAYERS, HEAD_DIMS[shape], dtype, form)
            for module in modules:
                getattr(module, "attn", module).tolerance = tolerance
            weights = check(modules, x, backend)["weights"]
            assert (weights < 0.99).all()
            assert (weights > 1e-9).all()


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@shapes
@dtypes
@forms
def test_a_block_that_takes_over_a_retrieval(form, dtype, shape, is_training, backend, layers_ran):
    """Of the block before it, which it norms anew; the block after it reads its pair all the same."""
    blocks, x = make_blocks(SHAPES[shape], LAYERS + 1, HEAD_DIMS[shape], dtype, form, skip="reuse")
    blocks[1].skipped = True
    check(blocks.train(is_training), x, backend)
    count = LAYERS + 1
    assert layers_ran == ["layer"] * count + ["layer_backward"] * count


@shapes
@dtypes
@forms
def test_light_blocks(form, dtype, shape, light_backend):
    blocks, x = make_light_blocks(SHAPES[shape], LAYERS, HEAD_DIMS[shape], dtype)
    x = x.detach().contiguous(memory_format=form).requires_grad_()
    check(blocks, x, light_backend)
