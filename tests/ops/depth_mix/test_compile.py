"""depth_mix in compiled graphs: its operators, and what tensors without memory carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layouts import channels_last, contiguous, last_slice, one_number
from support.mixes import WEIGHTS, Mix, assert_mixed, evaluate, make_mix
from torch._subclasses.fake_tensor import FakeTensorMode

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("form", WEIGHTS)
def test_meta_tensors_carry_shapes(form):
    mix = make_mix((2, 12, 5, 7), dtype=torch.float16, form=form)
    out = ek.depth_mix(mix.weights.to("meta"), [v.to("meta") for v in mix.values])
    assert out.is_meta
    assert (out.shape, out.dtype) == ((2, 12, 5, 7), torch.float16)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", WEIGHTS)
def test_fake_tensors_carry_shapes_and_strides(form, layout):
    mix = make_mix((2, 6, 4, 3), 3, 2, torch.bfloat16, layout, form=form)
    real = evaluate(mix)
    with FakeTensorMode() as mode:
        weights = mode.from_tensor(mix.weights)
        fake = Mix(
            weights, [mode.from_tensor(v) for v in mix.values], dout=mode.from_tensor(mix.dout)
        )
        fake.wanted = mix.wanted
        found = evaluate(fake)
    assert found.keys() == real.keys()
    for name, x in found.items():
        assert (x.shape, x.dtype) == (real[name].shape, real[name].dtype), name
    assert found["out"].stride() == real["out"].stride()


def compiled(backend: str, **options: Any):
    def function(weights, values, channels_last):
        mixed = ek.depth_mix(weights * 1.0, [v * 1.0 for v in values], channels_last=channels_last)
        return mixed * 1.0

    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, last_slice], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("form", WEIGHTS)
def test_traced_without_a_break(form, layout):
    mix = make_mix(makers=layout, form=form)
    assert_mixed(evaluate(mix, compiled("aot_eager")), mix)


@pytest.mark.usefixtures("backend")
def test_traced_maps_without_a_position():
    mix = make_mix((3, 8), 2, 2)
    assert_mixed(evaluate(mix, compiled("aot_eager")), mix)


def test_traced_half_precision_with_either_weights():
    for wide in (True, False):
        mix = make_mix(dtype=torch.bfloat16, wide=wide)
        assert_mixed(evaluate(mix, compiled("aot_eager")), mix)


def test_traced_again_with_changed_shapes():
    function = compiled("aot_eager", dynamic=None)
    for shape in ((2, 12, 5, 3), (3, 12, 7, 4), (5, 12, 2, 9)):
        mix = make_mix(shape, dout=one_number)
        assert_mixed(evaluate(mix, function), mix)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_compiled_by_inductor(layout):
    mix = make_mix(makers=layout)
    assert_mixed(evaluate(mix, compiled("inductor")), mix)


@pytest.mark.usefixtures("kernels")
def test_the_compiled_graph_runs_the_kernels(monkeypatch):
    from ela_kernels.backends.dispatch import KERNELS

    made = []
    for method in ("mix", "mix_backward"):
        real = getattr(KERNELS["cpp"], method)
        monkeypatch.setitem(
            vars(KERNELS["cpp"]), method, lambda *a, m=method, r=real: (made.append(m), r(*a))[1]
        )
    evaluate(make_mix(), compiled("aot_eager"))
    assert made == ["mix", "mix_backward"]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("shape", "layout", "tokens"),
    [
        ((2, 6, 4, 3), contiguous, False),
        ((2, 6, 4, 3), channels_last, False),
        ((2, 6, 4, 3), last_slice, False),
        ((2, 5, 6), contiguous, True),
    ],
    ids=["planar", "interleaved", "sliced", "tokens"],
)
def test_the_operators_are_registered_rightly(shape, layout, tokens):
    mix = make_mix(shape, 2, 2, torch.float64, layout, channels_last=tokens)
    weights, *values = (x.requires_grad_() for x in mix.inputs().values())
    torch.library.opcheck(torch.ops.ela_kernels.depth_mix.default, (weights, values, tokens))
    weights, values = weights.detach(), [v.detach() for v in values]
    backward = torch.ops.ela_kernels.depth_mix_backward.default
    torch.library.opcheck(backward, (weights, values, mix.dout, tokens))


@pytest.mark.usefixtures("backend")
def test_the_operator_refuses_a_second_derivative():
    mix = make_mix()
    weights, *values = (x.requires_grad_() for x in mix.inputs().values())
    out = torch.ops.ela_kernels.depth_mix(weights, values, False)
    (first,) = torch.autograd.grad(out.sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()
