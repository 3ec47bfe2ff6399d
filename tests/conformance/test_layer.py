"""Whole layers and whole residual blocks: one call a layer and direction, against the same modules in eager PyTorch."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from support.backends import WITH_KERNELS, Backend, on, over, words
from support.layer_checks import FORMS, calls, check, forward_only, leaf, make, step, with_gradients
from support.layer_stages import gradients, run_blocks, run_stage
from support.on_gpu import same_bits
from support.pairs import pairs
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

KINDS = ["layer", "block"]
kernels = on(WITH_KERNELS)
kinds = pytest.mark.parametrize("kind", KINDS)


def placed(backend: Backend, kind: str, *args: Any, **options: Any) -> Any:
    """Modules and their input where the backend runs, in the widest dtype that it serves."""
    shape, depth, head_dim = args
    modules, x = make(kind, shape, depth, head_dim, backend.exact, FORMS[0], **options)
    return modules.to(backend.device), leaf(x, backend.device)


def sizes(backend: Backend) -> list[dict[str, Any]]:
    """Where a case takes long, a size meets both forms, and not every dtype."""
    factors = {
        "size": backend.layer_sizes,
        "form": FORMS,
        "dtype": backend.dtypes,
        "residual": [True, False],
    }
    if backend.is_slow:
        # Of so few numbers the interpreter's roundings to bfloat16 scatter; test_dtypes has more.
        factors["dtype"] = [torch.float32, torch.float16]
    return pairs(factors, lambda pair: not (backend.is_slow and set(pair) == {"size", "dtype"}))


@over("pair", sizes, WITH_KERNELS, ids=words)
def test_layers(backend, pair, made):
    shape, head_dim = pair["size"]
    layers, x = make("layer", shape, 2, head_dim, pair["dtype"], pair["form"])
    check(backend, step(residual=pair["residual"]), layers, x)
    assert made == calls(2)


@kinds
@over(
    "pair",
    lambda backend: pairs({"dtype": backend.dtypes, "form": FORMS, "residual": [True, False]}),
    WITH_KERNELS,
    ids=words,
)
def test_dtypes(backend, pair, kind, made):
    """Sums of so many roundings that their errors are alike; one gradient arrives."""
    shape = (4, 12, 9, 10) if backend.device.type == "cpu" else (4, 32, 13, 16)
    if backend.is_slow:
        shape = (2, 12, 5, 6)
    options = {} if kind == "block" else {"residual": pair["residual"]}
    modules, x = make(kind, shape, 2, 4, pair["dtype"], pair["form"])
    check(backend, step(("out",), **options), modules, x)
    assert made == calls(2)


@kinds
@over(
    "depth",
    lambda backend: [1, 3, 4, 5, 33][: 4 if backend.device.type == "cpu" else 5],
    WITH_KERNELS,
)
def test_depths(backend, depth, kind):
    check(backend, step(), *make(kind, (2, 4, 3, 4), depth, 2, backend.exact, FORMS[0]))


def _freeze_some(layers: nn.ModuleList) -> None:
    layers[0].Wv.weight.requires_grad_(False)
    layers[1].Wq.weight.requires_grad_(False)
    layers[2].Wk.weight.requires_grad_(False)
    layers[-1].requires_grad_(False)


def _freeze_values(layers: nn.ModuleList) -> None:
    for layer in layers:
        layer.Wv.weight.requires_grad_(False)


FROZEN = {
    "nothing": lambda layers: None,
    "some": _freeze_some,
    "values": _freeze_values,
    "all": lambda layers: layers.requires_grad_(False),
}
SKIPPED = [(), (0,), (1, 2), (3,)]
THROUGH = [("out", "first", "kl", "weights"), ("kl",), ("weights",), ("first",), ("kl", "out")]


def stages(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "skip": SKIPPED,
        "losses": THROUGH,
        "frozen": list(FROZEN),
        "input": ["wanted", "frozen"],
        "form": FORMS,
        "dtype": backend.dtypes,
        "residual": [True, False],
        "filter": [3, 1, 9],
    }
    if backend.is_slow:
        factors |= {"losses": THROUGH[:4], "dtype": [torch.float32, torch.float16]}
    return pairs(factors)


@over("pair", stages, WITH_KERNELS, ids=words)
def test_stages(backend, pair, made):
    """Layers that only provide, outputs that no gradient arrives at, inputs that need none, filters of other sizes."""
    shape = (1, 6, 3, 4) if backend.is_slow else (2, 6, 3, 4)
    layers, x = make("layer", shape, 4, 3, pair["dtype"], pair["form"])
    if pair["filter"] != 3:
        torch.manual_seed(3)
        layers = nn.ModuleList(ek.LayerAttention(6, 3, pair["filter"]) for _ in range(4)).to(x)
    FROZEN[pair["frozen"]](layers)
    if pair["input"] == "frozen" and pair["frozen"] != "all":
        x = x.detach()
    check(
        backend,
        step(pair["losses"], residual=pair["residual"], skip=pair["skip"]),
        layers,
        x,
    )
    assert made.count("layer") == 4
    assert {*made} <= {"layer", "layer_backward"}


@kernels
def test_maps_laid_out_otherwise(backend):
    """A slice as input, gradients that are expanded, transposed or sliced, and layers of both memory formats."""
    layers, _ = make("layer", (2, 6, 4, 5), 3, 3, backend.exact, FORMS[0])
    wide = torch.randn(2, 9, 4, 5, dtype=backend.exact, requires_grad=True)

    def run(layers, wide):
        outs, _ = run_stage(layers, wide[:, 1:7], residual=False)
        loss = outs[0].sum() + outs[1].transpose(2, 3).contiguous().square().sum()
        return with_gradients({}, loss + outs[2][:, ::2].sum(), layers, wide)

    for form in FORMS:
        check(backend, run, layers, wide.detach().contiguous(memory_format=form).requires_grad_())


@over("form", lambda backend: FORMS, WITH_KERNELS)
def test_layers_of_both_memory_formats(backend, form):
    """As many positions as channels: then strides alone do not tell the two forms apart."""

    def run(layers, x):
        history, y = ek.LayerHistory(), x
        for i, layer in enumerate(layers):
            y = layer(y.contiguous(memory_format=FORMS[i % 2]), history, residual=True)
        return with_gradients({"output": y.detach()}, y.square().sum(), layers, x)

    check(backend, run, *make("layer", (2, 8, 2, 4), 3, 4, backend.exact, form))


@kernels
def test_other_users_of_the_history(backend, made):
    """Pairs given by hand, and a later layer that eager PyTorch serves, on one history."""

    def run(layers, x):
        history = ek.LayerHistory()
        y = layers[0](x, history, residual=True)
        q = y.mean((2, 3))
        y = y + history.attend(q, q.sin(), (2 * x).tanh(), heads=2)
        y = layers[2](layers[1](y, history, residual=True), history, residual=True)
        with ek.use_backend("eager"):
            y = layers[3](y, history, residual=True)
        loss = y.square().sum() + history.values[0].sin().sum() + history.keys[2].sum()
        return with_gradients({"output": y.detach()}, loss, layers, x)

    check(backend, run, *make("layer", (2, 6, 3, 4), 4, 3, backend.exact, FORMS[0]))
    assert made.count("attend") == 1
    assert made.count("layer") >= 1


def _no_less(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@kinds
@kernels
def test_recomputed_layers(backend, kind, made):
    modules, x = placed(backend, kind, (2, 6, 3, 4), 3, 3)
    run = run_stage if kind == "layer" else run_blocks

    def results(through):
        copies = copy.deepcopy(modules)
        outs, _ = run(copies, x, through=through)
        return [outs[-1], *gradients(outs[-1].square().sum(), [x, *copies.parameters()])]

    plain = results(lambda f, *args: f(*args))
    _no_less(results(functools.partial(checkpoint, use_reentrant=False)), plain)
    assert made.count("layer") == 9
    assert {*made} == {"layer", "layer_backward"}


@kinds
@kernels
def test_parts_of_a_retained_graph(backend, kind):
    modules, x = placed(backend, kind, (2, 6, 4, 5), 3, 3)
    run = run_stage if kind == "layer" else run_blocks
    leaves = [x, *modules.parameters()]

    def results():
        outs, history = run(modules, x)
        loss = outs[-1].square().sum()
        first = gradients(outs[1].square().sum(), leaves, retain_graph=True)
        whole = gradients(loss, leaves, retain_graph=True)
        again = gradients(loss, leaves, retain_graph=True)
        _no_less(again, whole)
        return [*first, *whole, *gradients(history.kl.sum(), leaves)]

    found = results()
    with ek.use_backend("eager"):
        expected = results()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **_tolerance(backend))


def _tolerance(backend: Backend) -> dict[str, float]:
    exact = backend.exact == torch.float64
    return {"rtol": 1e-9, "atol": 1e-10} if exact else {"rtol": 2e-4, "atol": 2e-5}


@kernels
def test_a_part_of_a_stage_is_a_shorter_stage(backend):
    layers, x = placed(backend, "layer", (2, 12, 6, 7), 3, 4)
    outs, _ = run_stage(layers, x)
    leaves = [x, *layers.parameters()][:4]
    part = torch.autograd.grad(outs[1].square().sum(), leaves)
    alone = torch.autograd.grad(run_stage(layers[:2], x)[0][1].square().sum(), leaves)
    _no_less(part, alone)


@kernels
def test_accumulated_gradients_and_tensor_hooks(backend):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 3, 3)

    def run():
        seen = []
        for p in layers.parameters():
            p.grad = None
        for scale in (1.0, 3.0):
            y = x.detach().requires_grad_()
            outs, _ = run_stage(layers, y)
            outs[1].register_hook(lambda g: (seen.append(g.clone()), 2 * g)[1])
            (scale * outs[-1].square().sum()).backward()
        return [p.grad.clone() for p in layers.parameters()] + seen

    found = run()
    with ek.use_backend("eager"):
        expected = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **_tolerance(backend))


@kernels
def test_two_passes_before_one_backward(backend):
    def run(layers, x):
        losses = [run_stage(layers, k * x)[0][-1].square().sum() for k in (1.0, 2.0)]
        return with_gradients({}, sum(losses), layers, x)

    check(backend, run, *make("layer", (2, 6, 4, 5), 3, 3, backend.exact, FORMS[0]))


@kernels
def test_parametrized_weights(backend, made):
    layers, x = make("layer", (2, 6, 4, 5), 3, 3, backend.exact, FORMS[0])
    for layer in layers:
        nn.utils.parametrizations.weight_norm(layer.Wv)

    check(backend, step(), layers, x)
    assert made == calls(3)


@kernels
def test_modules_with_hooks_are_called(backend, made):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 2, 3)
    called = []
    layers[0].Wv.register_forward_hook(lambda *a: called.append("hook"))
    layers[1].Wv = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False).to(x)
    run_stage(layers, x)[0][-1].sum().backward()
    assert called == ["hook"]
    assert x.grad.isfinite().all()
    for change in ({"dilation": 2, "padding": 2}, {"bias": True}, {"padding_mode": "reflect"}):
        options = {"padding": 1, "groups": 6, "bias": False} | change
        layers[1].Wv = nn.Conv2d(6, 6, 3, **options).to(x)
        run_stage(layers, x)[0][-1].sum().backward()
    assert not {"layer", "layer_backward"} & {*made}


@kernels
def test_a_gradient_changed_in_place_is_refused(backend):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 3, 3)
    history = ek.LayerHistory()
    first = layers[0](x, history)
    second = layers[1](first, history)
    dout = torch.ones_like(second)

    def change(gradient):
        dout.zero_()

    first.register_hook(change)
    with pytest.raises(RuntimeError, match="changed in place"):
        second.backward(dout)


@kernels
def test_second_derivatives_are_refused(backend):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 2, 3)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradients(run_stage(layers, x)[0][-1].square().sum(), [x], create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@over(
    "pair",
    lambda backend: pairs({"kind": KINDS, "form": FORMS, "skip": [False, True]}),
    WITH_KERNELS,
    ids=words,
)
def test_without_gradients(backend, pair, mode, made):
    """The numbers are those of a pass with gradients, and no value is held when the history is gone."""
    modules, x = make(pair["kind"], (2, 12, 6, 7), 3, 4, backend.exact, pair["form"])
    modules, x = modules.to(backend.device).eval(), leaf(x, backend.device).detach()
    if pair["skip"] and pair["kind"] == "block":
        modules[1].skipped = True
    options = {"skip": (1,)} if pair["skip"] and pair["kind"] == "layer" else {}
    run = run_stage if pair["kind"] == "layer" else run_blocks
    check(backend, forward_only(mode) if not options else _skipping(mode), modules, x)
    assert made == ["layer"] * 3
    with mode():
        outs, history = run(modules, x, **options)
        held = [weakref.ref(v) for v in history.values]
        assert outs[-1].grad_fn is None
        del history
    gc.collect()
    assert all(value() is None for value in held)


def _skipping(mode):
    def run(layers, x):
        with mode():
            return {"output": run_stage(layers, x, skip=(1,))[0][-1]}

    return run


@over(
    "pair",
    lambda backend: pairs({"kind": KINDS, "form": FORMS, "dtype": [torch.float32, torch.bfloat16]}),
    WITH_KERNELS,
    ids=words,
)
def test_the_same_step_gives_the_same_bits(backend, pair):
    shape = (2, 6, 9, 7) if backend.device.type == "cpu" else (8, 32, 28, 28)
    modules, x = make(pair["kind"], shape, 2, shape[1] // 2, pair["dtype"], pair["form"])
    modules, x, run = modules.to(backend.device), leaf(x, backend.device), step()
    first = run(copy.deepcopy(modules), x)
    for _ in range(1 if backend.device.type == "cpu" else 3):
        again = run(copy.deepcopy(modules), x)
        for name, want in first.items():
            assert torch.equal(again[name], want), name


@kinds
def test_nan_passes_the_activation(backend, kind):
    modules, x = make(kind, (2, 6, 5, 6), 1, 3, torch.float32, FORMS[0])
    modules, x = modules.to(backend.device).eval(), x.detach().to(backend.device).clone()
    x[0, 3, 2, 2] = torch.nan
    run = run_stage if kind == "layer" else run_blocks
    with torch.no_grad():
        out = run(modules, x)[0][-1]
    assert out[0, 3, 2, 2].isnan()
    assert not out[1].isnan().any()


@kernels
def test_maps_without_elements_go_to_the_modules(backend, made):
    layers, x = make("layer", (0, 6, 3, 4), 2, 3, torch.float32, FORMS[0])
    layers, x = layers.to(backend.device), x.to(backend.device)
    assert run_stage(layers, x)[0][-1].shape == x.shape
    assert "layer" not in made


@kernels
def test_values_are_not_kept_alive(backend):
    """A pull layer's gradient of the value is never stored: nothing of a stage is left after its backward."""
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 3, 3)
    outs, history = run_stage(layers, x)
    held = [weakref.ref(v) for v in history.values]
    outs[-1].sum().backward()
    del outs, history
    gc.collect()
    assert all(r() is None for r in held)


@over("first", lambda backend: [b for b in ("cpp", "triton") if b != backend.name], WITH_KERNELS)
def test_kernels_of_two_backends_do_not_meet(backend, first):
    """What one leaves for the layers before it the other cannot read."""
    if backend.device.type != "cpu":
        pytest.skip("of two backends on one device, none is known to be there")
    if ek.backend_status()[first] != "available":
        pytest.skip(f"{first}: {ek.backend_status()[first]}")
    for order in ((first, backend.name), (backend.name, first)):
        layers, x = make("layer", (2, 6, 3, 4), 2, 3, torch.float32, FORMS[0])
        history, y = ek.LayerHistory(), x
        for layer, name in zip(layers, order, strict=True):
            with ek.use_backend(name):
                y = layer(y, history)
        with pytest.raises(RuntimeError, match="kernels of different backends"):
            y.sum().backward()
