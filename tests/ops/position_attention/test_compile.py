"""position_attention in compiled graphs: its operators, fake tensors and second derivatives."""

from __future__ import annotations

import pytest
import torch
from support.layouts import batch_slice, channels_last, contiguous, last_slice
from support.position import (
    assert_position_matches,
    evaluate_position,
    make_position_case,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import ela_kernels as ek


def compiled(backend: str, **options):
    def function(query, values, keys=None, **arguments):
        r = ek.position_attention(query * 1.0, [v * 1.0 for v in values], keys, **arguments)
        return ek.PositionAttentionOutput(r.out * 1.0, *r[1:])

    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.usefixtures("backend", "fresh_compiler")
@pytest.mark.parametrize("keys", [False, True], ids=["own keys", "keys"])
@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, batch_slice, last_slice], ids=lambda f: f.__name__
)
def test_traced_without_a_break(layout, keys):
    case = make_position_case(makers=layout, keys=keys, map_query=keys)
    assert_position_matches(evaluate_position(case, compiled("aot_eager")), case)


@pytest.mark.usefixtures("backend", "fresh_compiler")
def test_traced_again_with_changed_shapes():
    function = compiled("aot_eager", dynamic=None)
    for shape in ((2, 12, 5, 3), (3, 12, 7, 4), (5, 12, 2, 9)):
        case = make_position_case(shape)
        assert_position_matches(evaluate_position(case, function), case)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor():
    case = make_position_case((2, 7, 12), channels_last=True)
    assert_position_matches(evaluate_position(case, compiled("inductor")), case)


def op_arguments(case, requires_grad: bool):
    def leaf(x):
        return None if x is None else x.detach().requires_grad_(requires_grad)

    is_map = case.query.dim() > 1
    row = case.norm_weight if is_map else case.query
    return (
        leaf(row),
        leaf(case.query) if is_map else None,
        [leaf(v) for v in case.values],
        [leaf(k) for k in case.keys or ()],
        True,
        1e-6,
        leaf(case.prev_weights),
        case.channels_last,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("shape", "layout", "options"),
    [
        ((2, 6, 4, 3), contiguous, {}),
        ((2, 6, 4, 3), channels_last, {"prev_depth": None, "map_query": True}),
        ((2, 6, 4, 3), last_slice, {"keys": True}),
        ((2, 5, 6), contiguous, {"channels_last": True}),
    ],
    ids=["planar", "interleaved", "sliced", "tokens"],
)
def test_the_operators_are_registered_rightly(shape, layout, options):
    case = make_position_case(shape, 2, torch.float64, layout, **options)
    op = torch.ops.ela_kernels.position_attention.default
    torch.library.opcheck(op, op_arguments(case, requires_grad=True))
    arguments = op_arguments(case, requires_grad=False)
    _, weights, _ = op(*arguments)
    gradients = [case.arriving.get(n) for n in ("out", "weights", "kl")]
    for some in (gradients, [gradients[0], None, None], [None, *gradients[1:]]):
        torch.library.opcheck(
            torch.ops.ela_kernels.position_attention_backward.default, (*arguments, weights, *some)
        )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_fake_tensors_carry_shapes_and_strides(layout):
    case = make_position_case((2, 6, 4, 3), 3, torch.bfloat16, layout)
    real = ek.position_attention(case.query, case.values, prev_weights=case.prev_weights)
    with FakeTensorMode() as mode:
        fake = ek.position_attention(
            mode.from_tensor(case.query),
            [mode.from_tensor(v) for v in case.values],
            prev_weights=mode.from_tensor(case.prev_weights),
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.usefixtures("kernels")
def test_a_second_derivative_of_the_operator_is_refused():
    case = make_position_case((1, 6, 2, 3), 2)
    row, query, values, *rest = op_arguments(case, requires_grad=True)
    out, *_ = torch.ops.ela_kernels.position_attention(row, query, values, *rest)
    (g,) = torch.autograd.grad(out.square().sum(), [values[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="the operator has none"):
        g.sum().backward()
