"""Whole layers and whole residual blocks: one call a layer and direction, against the same modules in eager PyTorch."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from support.backends import WITH_KERNELS, Backend, on, over, words
from support.layer_checks import (
    FORMS,
    KINDS,
    calls,
    check,
    forward_only,
    leaf,
    make,
    step,
    with_gradients,
)
from support.layer_stages import run_blocks, run_stage
from support.pairs import pairs
from torch import nn

import ela_kernels as ek

kernels = on(WITH_KERNELS)
kinds = pytest.mark.parametrize("kind", KINDS)


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
