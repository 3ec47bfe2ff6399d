"""The mix by given weights: its formula, what is refused, and what PyTorch sees of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.layouts import channels_last, contiguous, last_slice, one_number
from support.mixes import Mix, assert_mixed, evaluate, make_mix
from support.refusals import assert_refused
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import ela_kernels as ek
from ela_kernels.backends.dispatch import Refusal

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "depth_mix.npz"
WEIGHTS = ["[B, G, T]", "[G, T]", "[T]"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# The formula


def einsum(weights: Tensor, values: Tensor) -> Tensor:
    """As the docstring has it, for maps `[B, C, H, W]`."""
    v = values.unflatten(2, (weights.shape[1], -1))
    return torch.einsum("bgt,btgdhw->bgdhw", weights, v).flatten(1, 2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_the_formula_of_the_docstring(heads):
    mix = make_mix((2, 12, 5, 3), 4, heads, torch.float64)
    expected = einsum(mix.weights, torch.stack(mix.values, 1))
    torch.testing.assert_close(
        ek.depth_mix(mix.weights, mix.values), expected, rtol=1e-14, atol=1e-14
    )


@pytest.mark.usefixtures("backend")
def test_weights_of_a_softmax_retrieve_as_layer_attention_does():
    q, *keys = (torch.randn(2, 12, dtype=torch.float64) for _ in range(4))
    values = [torch.randn(2, 12, 5, 3, dtype=torch.float64) for _ in range(3)]
    expected = ek.layer_attention(q, keys, values, 3)
    found = ek.depth_mix(expected.weights, values)
    torch.testing.assert_close(found, expected.out, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("backend")
def test_factors_of_values_are_factors_of_weights():
    """What dynamic layer attention does to its maps, without writing one."""
    mix = make_mix((2, 6, 4, 5), 3, 6, torch.float64)
    gates = torch.rand(2, 6, 3, dtype=torch.float64)
    scaled = [v * gates[..., t, None, None] for t, v in enumerate(mix.values)]
    expected = ek.depth_mix(mix.weights, scaled)
    found = ek.depth_mix(mix.weights * gates, mix.values)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("form", ["shared", "heads", "channels"])
def test_golden_numbers(form, layout):
    with np.load(GOLDEN) as data:
        numbers = {name: torch.from_numpy(data[name]) for name in data.files}
    weights = numbers[f"weights_{form}"].requires_grad_()
    depth = len([name for name in numbers if name.startswith("value_")])
    values = [
        numbers[f"value_{t}"].contiguous(memory_format=layout).requires_grad_()
        for t in range(depth)
    ]
    out = ek.depth_mix(weights, values)
    gradients = torch.autograd.grad(out, [weights, *values], numbers["cotangent"])
    found = [out, *gradients]
    names = ["out", "grad_weights", *(f"grad_value_{t}" for t in range(depth))]
    for name, x in zip(names, found, strict=True):
        expected = numbers[f"{name}_{form}"]
        assert x.dtype == torch.float64
        assert (x - expected).abs().max() <= 1e-12 * expected.abs().max(), name


class DepthWeightedAverage(nn.Module):
    """DenseFormer's: after each block the mean of the input and all blocks' outputs, by weights that are learned."""

    def __init__(self, blocks: int, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU()) for _ in range(blocks)
        )
        # At first each gives its block's output alone.
        self.alphas = nn.ParameterList(torch.tensor([0.0] * (i + 1) + [1.0]) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for block, alpha in zip(self.blocks, self.alphas, strict=True):
            outputs.append(x + block(x))
            x = ek.depth_mix(alpha, outputs, channels_last=True)
        return x


@pytest.mark.usefixtures("backend")
def test_a_depth_weighted_average_begins_as_the_plain_stack_and_trains():
    torch.manual_seed(0)
    model = DepthWeightedAverage(4, 16)
    tokens, target = torch.randn(3, 10, 16), torch.randn(3, 10, 16)
    plain = tokens
    for block in model.blocks:
        plain = plain + block(plain)
    torch.testing.assert_close(model(tokens), plain)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = [alpha.detach().clone() for alpha in model.alphas]
    losses = []
    for _ in range(30):
        loss = (model(tokens) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all((a != b).all() for a, b in zip(before, model.alphas, strict=True))


# What is refused


def good(channels_last: bool = False) -> dict[str, Any]:
    shape = (2, 5, 7, 12) if channels_last else (2, 12, 5, 7)
    return {"weights": torch.randn(2, 3, 3), "values": [torch.randn(shape) for _ in range(3)]}


def second(value: Any) -> dict[str, Any]:
    return {"values": [good()["values"][0], value, good()["values"][2]]}


BAD = {
    "weights None": ({"weights": None}, TypeError, "weights", "NoneType", "torch.Tensor"),
    "weights a list": ({"weights": [1.0] * 3}, TypeError, "weights", "list", "torch.Tensor"),
    "weights integer": (
        {"weights": torch.ones(3, dtype=torch.int64)},
        TypeError,
        "weights",
        "int64",
    ),
    "weights complex": ({"weights": torch.ones(3).cfloat()}, TypeError, "weights", "complex64"),
    "weights sparse": ({"weights": torch.eye(3).to_sparse()}, TypeError, "weights", "to_dense"),
    "weights narrower": (
        {"weights": torch.ones(3).half()},
        TypeError,
        "weights",
        "torch.float16",
        "torch.float32",
    ),
    "weights wider": (
        {"weights": torch.ones(3).double()},
        TypeError,
        "weights",
        "torch.float64",
        "torch.float32",
    ),
    "weights a number": ({"weights": torch.ones(())}, ValueError, "weights", "[]", "[T]"),
    "weights of rank 4": (
        {"weights": torch.ones(2, 3, 1, 3)},
        ValueError,
        "weights",
        "[2, 3, 1, 3]",
        "[B, G, T]",
    ),
    "weights too few": ({"weights": torch.ones(2)}, ValueError, "weights", "[2]", "T = 3"),
    "weights too many": (
        {"weights": torch.ones(2, 3, 4)},
        ValueError,
        "weights",
        "[2, 3, 4]",
        "T = 3",
    ),
    "weights of other batch": (
        {"weights": torch.ones(1, 3, 3)},
        ValueError,
        "weights",
        "[1, 3, 3]",
        "B = 2",
    ),
    "weights of heads that do not divide": (
        {"weights": torch.ones(5, 3)},
        ValueError,
        "weights",
        "[5, 3]",
        "divisor of the 12",
    ),
    "weights of no head": (
        {"weights": torch.ones(2, 0, 3)},
        ValueError,
        "weights",
        "[2, 0, 3]",
        "divisor",
    ),
    "weights on meta": (
        {"weights": torch.ones(3, device="meta")},
        ValueError,
        "weights",
        "meta",
        "one device",
    ),
    "values None": ({"values": None}, TypeError, "values", "NoneType", "tuple or list"),
    "values empty": ({"values": []}, ValueError, "values", "empty", "T >= 1"),
    "values one, of rank 3": (
        {"values": torch.ones(2, 3, 12)},
        ValueError,
        "values",
        "[2, 3, 12]",
        "[B, T, ...]",
    ),
    "value None": (second(None), TypeError, "values[1]", "NoneType", "torch.Tensor"),
    "value integer": (
        second(torch.ones(2, 12, 5, 7, dtype=torch.int32)),
        TypeError,
        "values[1]",
        "int32",
    ),
    "value sparse": (second(torch.eye(12)[:2].to_sparse()), TypeError, "values[1]", "to_dense"),
    "value of other dtype": (
        second(torch.ones(2, 12, 5, 7).double()),
        TypeError,
        "values[1]",
        "float64",
        "values[0]",
    ),
    "value of other shape": (
        second(torch.ones(2, 12, 5, 8)),
        ValueError,
        "values[1]",
        "[2, 12, 5, 8]",
        "[2, 12, 5, 7]",
    ),
    "value on meta": (
        second(torch.ones(2, 12, 5, 7, device="meta")),
        ValueError,
        "values[1]",
        "meta",
        "one device",
    ),
    "values of rank 1": (
        {"values": [torch.ones(12)] * 3},
        ValueError,
        "values[0]",
        "[12]",
        "[B, C, *spatial]",
    ),
    "tokens of rank 2": (
        {"values": [torch.ones(2, 12)] * 3, "channels_last": True},
        ValueError,
        "values[0]",
        "[2, 12]",
        "[B, *spatial, C]",
    ),
    "values without a channel": (
        {"values": [torch.ones(2, 0, 5)] * 3},
        ValueError,
        "values[0]",
        "[2, 0, 5]",
        "one channel",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, name, *expected = BAD[case]
    assert_refused(ek.depth_mix, good() | changed, error, name, *expected)


def test_good_input_is_served():
    assert ek.depth_mix(**good()).shape == (2, 12, 5, 7)
    assert ek.depth_mix(**good(True), channels_last=True).shape == (2, 5, 7, 12)
    with pytest.raises(TypeError, match="positional"):
        ek.depth_mix(*good(True).values(), True)  # type: ignore[misc]


def test_a_backend_without_kernels_of_it_says_so(monkeypatch):
    from ela_kernels.backends.contract import ATTENTION_OPS
    from ela_kernels.backends.cpp.backend import CppBackend
    from ela_kernels.backends.dispatch import _plan

    monkeypatch.setattr(CppBackend, "ops", ATTENTION_OPS)
    _plan.cache_clear()
    try:
        with ek.use_backend("cpp"), pytest.raises(ValueError, match="no kernel for depth_mix"):
            ek.depth_mix(**good())
        assert ek.depth_mix(**good()).shape == (2, 12, 5, 7)
    finally:
        monkeypatch.undo()
        _plan.cache_clear()


# What PyTorch sees


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


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", WEIGHTS)
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(form, dtype):
    mix = make_mix(form=form)
    weights, *values = (x.requires_grad_() for x in mix.inputs().values())
    with torch.autocast("cpu", dtype=dtype):
        out = ek.depth_mix(weights, values)
    assert out.dtype == dtype
    # What autocast does by hand: the same call on rounded values; weights stay as wide as sums are.
    half = Mix(
        mix.weights.detach(), [v.detach().to(dtype) for v in values], dout=mix.dout.to(dtype)
    )
    half.wanted = mix.wanted
    expected = evaluate(half)
    assert torch.equal(out, expected["out"])
    gradients = torch.autograd.grad(out, [weights, *values], half.dout)
    for (name, x), g in zip(mix.inputs().items(), gradients, strict=True):
        assert g.dtype == x.dtype == torch.float32
        assert torch.equal(g, expected["d " + name].float()), name


@pytest.mark.usefixtures("backend")
def test_autocast_leaves_float64_alone():
    mix = make_mix(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_mixed(evaluate(mix), mix)


@pytest.mark.usefixtures("backend")
def test_inference_mode():
    mix = make_mix()
    expected = evaluate(mix)["out"]
    with torch.inference_mode():
        assert torch.equal(ek.depth_mix(mix.weights, mix.values), expected)


def transformed(name: str, mix: Mix) -> list[Tensor]:
    weights, values = mix.weights, mix.values
    if name == "vmap":
        return [
            vmap(lambda w, *v: ek.depth_mix(w, v))(
                torch.stack((weights, 2 * weights)), *(torch.stack((v, v.sin())) for v in values)
            )
        ]
    if name == "vmap over weights":
        return [vmap(lambda w: ek.depth_mix(w, values))(torch.stack((weights, 2 * weights)))]
    if name == "grad":
        return [grad(lambda w: ek.depth_mix(w, values).square().sum())(weights)]
    if name == "jvp":
        return list(jvp(lambda w: ek.depth_mix(w, values), (weights,), (weights.cos(),)))
    with forward_ad.dual_level():
        value = forward_ad.make_dual(values[0], values[0].cos())
        return list(forward_ad.unpack_dual(ek.depth_mix(weights, [value, *values[1:]])))


TRANSFORMS = ["vmap", "vmap over weights", "grad", "jvp", "forward mode"]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("wide", [True, False])
def test_transforms_run_in_pytorch(name, wide):
    mix = make_mix(dtype=torch.float32 if wide else torch.bfloat16, wide=wide)
    found = transformed(name, mix)
    with ek.use_backend("eager"):
        expected = transformed(name, mix)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_forced_backend_refuses_transforms(name):
    with ek.use_backend("cpp"), pytest.raises(ValueError, match=r"torch\.func"):
        transformed(name, make_mix())


def test_products_are_counted():
    mix = make_mix((2, 12, 5, 3), 4)
    weights, *values = (x.requires_grad_() for x in mix.inputs().values())
    counter = FlopCounterMode(display=False)
    with counter:
        ek.depth_mix(weights, values).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.ela_kernels.depth_mix] == 2 * 4 * values[0].numel()
    assert counts[torch.ops.ela_kernels.depth_mix_backward] == 4 * 4 * values[0].numel()


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ek.depth_mix(torch.ones(2), [x, x])


@pytest.mark.usefixtures("kernels")
def test_explain():
    (found,) = ek.explain(Mixing(), torch.randn(2, 4, 3))
    assert (found.name, found.layer, found.form, found.backend) == ("", "function", "mix", "cpp")
    assert "the sum by given weights in one call" in str(ek.explain(Mixing(), torch.randn(2, 4, 3)))
    with ek.use_backend("eager"):
        (found,) = ek.explain(Mixing(), torch.randn(2, 4, 3))
    assert (found.form, found.backend) == ("eager", "eager")
    assert found.reasons == {"mix": ("use_backend('eager') is in force",)}


@pytest.mark.usefixtures("kernels")
def test_a_device_without_kernels_is_told_once(caplog, monkeypatch):
    from ela_kernels.backends import dispatch

    refusal = Refusal(("nothing: a test",), None)
    monkeypatch.setattr(dispatch, "_plan", lambda *_: refusal)
    dispatch._fallbacks.clear()
    with caplog.at_level(logging.WARNING, "ela_kernels"):
        for _ in range(2):
            ek.depth_mix(**good())
    assert len(caplog.records) == 1
    assert "nothing: a test" in caplog.text
