"""What LayerHistory promises beyond its gradients: checkpointing, refusals, probes, memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.backends import WITH_FLOAT64, WITH_KERNELS, Backend, on, over
from support.history_stages import (
    BATCH,
    CHANNELS,
    HEADS,
    SIDE,
    all_inputs,
    assert_same,
    chained,
    compare,
    grads,
    run_stage,
)
from support.stage_forms import check_freed_after_a_failed_pass
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

kernels = on(WITH_KERNELS)


def random(backend: Backend, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device=backend.device) for shape in shapes]


ROW, MAP = (BATCH, CHANNELS), (BATCH, CHANNELS, SIDE, SIDE)


@over("chunk", lambda backend: [1, 2])
def test_checkpointing_without_reentry(backend, chunk):
    layers, x = chained(backend, 4, (1,))

    def block(first, y, history):
        for layer in layers[first : first + chunk]:
            y = layer(y, history)
        return y

    def run(with_checkpoint):
        history, y = ek.LayerHistory(), x
        for first in range(0, 4, chunk):
            if with_checkpoint:
                y = checkpoint(block, first, y, history, use_reentrant=False)
            else:
                y = block(first, y, history)
        return grads(y.square().sum(), all_inputs(layers, x))

    expected = compare(backend, lambda: run(False))
    assert_same(compare(backend, lambda: run(True)), expected, **backend.tolerance)


@kernels
def test_loss_inside_a_checkpoint_reads_the_recomputed_divergence(backend):
    layers, x = chained(backend, 3)

    def block(layer, y, history):
        y = layer(y, history)
        return y, history.weights.square().sum()

    def run():
        history, y, total = ek.LayerHistory(), x, 0.0
        for layer in layers:
            y, term = checkpoint(block, layer, y, history, use_reentrant=False)
            total = total + term
        return grads(total + y.sum(), all_inputs(layers, x))

    compare(backend, run)


@kernels
def test_reentrant_checkpointing_is_refused(backend):
    layers, x = chained(backend, 2)
    history, y = ek.LayerHistory(), x
    for layer in layers:
        y = checkpoint(layer, y, history, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


@kernels
def test_recomputation_without_a_caller_is_refused(backend):
    x = random(backend, MAP)[0].requires_grad_()
    history = ek.LayerHistory()

    def block(y):
        q = y.flatten(2).mean(-1)
        return history.attend(q, q, y * 2, heads=HEADS)

    out = checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="caller"):
        out.sum().backward()


@kernels
def test_gradient_changed_in_place_is_noticed(backend):
    x = random(backend, MAP)[0].requires_grad_()
    history = ek.LayerHistory()
    kept = []

    def change_the_later_gradient(_):
        kept[0].add_(1)

    q = x.flatten(2).mean(-1)
    first = history.attend(q, q, x * 2, heads=HEADS)
    # Runs after the second layer's backward and before the first one's.
    first.register_hook(change_the_later_gradient)
    second = history.attend(q, q, first * 3, heads=HEADS)
    second.register_hook(lambda g: kept.append(g) or g)
    with pytest.raises(RuntimeError, match="changed in place"):
        second.square().sum().backward()


@kernels
def test_value_changed_in_place_is_refused(backend):
    history = ek.LayerHistory()
    q, v = random(backend, ROW, MAP)
    history.attend(q, q, v, heads=HEADS)
    v.add_(1)
    with pytest.raises(RuntimeError, match="layer 0 was changed in place"):
        history.attend(q, q, v.clone(), heads=HEADS)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"v": (BATCH, CHANNELS, SIDE, SIDE + 1)}, "v: got shape"),
        ({"q": (BATCH, CHANNELS + 2)}, "k: got shape"),
        ({"k": (BATCH + 1, CHANNELS)}, "k: got shape"),
        ({"v": torch.half}, "v: got dtype"),
        ({"heads": 3}, "heads: got 3"),
        ({"heads": 4}, "heads: got 4"),
        ({"v": "meta"}, "v: got device"),
    ],
)
def test_what_does_not_fit_the_history_is_refused(backend, change, name):
    history = ek.LayerHistory()
    q, v = random(backend, ROW, MAP)
    args = {"q": q, "k": q, "v": v, "heads": HEADS}
    history.attend(**args)
    ((which, wrong),) = change.items()
    if isinstance(wrong, tuple):
        wrong = random(backend, wrong)[0]
    elif not isinstance(wrong, int):
        wrong = v.to(wrong)
    with pytest.raises((ValueError, TypeError), match=name):
        history.attend(**{**args, which: wrong})
    assert history.depth == 1


def test_second_derivatives_are_refused_by_kernels_and_given_by_eager(backend):
    layers, x = chained(backend, 2)
    loss = run_stage(layers, x)[0][-1].square().sum()
    if backend.has_kernels:
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)
        return
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.autograd.grad(g.sum(), x)[0].abs().max() > 0


@on(WITH_FLOAT64)
def test_gradcheck(backend):
    layers, x = chained(backend, 3)
    assert torch.autograd.gradcheck(lambda y: run_stage(layers, y)[0][-1], x)


def test_probe_appends_nothing_and_equals_attend(backend):
    layers, x = chained(backend, 3)
    history = ek.LayerHistory()
    y = run_stage(layers[:2], x, history)[0][-1]
    q = y.flatten(2).mean(-1)
    probed = history.probe(q @ layers[2].wq, q @ layers[2].wk, heads=HEADS)
    assert history.depth == history.position == 2
    assert not probed.weights.requires_grad
    layers[2](y, history)
    # The same sums, in blocks that may be cut otherwise: a few ulps of a weight.
    rtol, of_kl = 1e-6, {"rtol": 1e-5, "atol": 1e-6}
    if backend.exact == torch.float64:
        rtol, of_kl = 1e-12, {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(probed.weights, history.weights.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(probed.kl, history.kl.detach(), **of_kl)


def test_skipped_layers_count_as_positions(backend):
    history = ek.LayerHistory()
    q, v = random(backend, ROW, MAP)
    history.attend(q, q, v, heads=HEADS)
    history.pass_by()
    history.provide(q, v, heads=HEADS)
    assert (history.depth, history.position) == (2, 3)
    history.attend(q, q, v, heads=HEADS)
    assert history.weights.shape == (BATCH, HEADS, 3)
    assert history.kl.shape == (BATCH, HEADS)


@kernels
def test_values_are_released_during_the_backward(backend):
    """Layer by layer: the value of a layer is gone once its own backward has run."""
    layers, x = chained(backend, 4)
    alive = []

    def run():
        history, y, refs = ek.LayerHistory(), x, []
        for layer in layers:
            y = layer(y, history)
            refs.append(weakref.ref(history.values[-1].untyped_storage()))
            y.register_hook(lambda g: alive.append(sum(r() is not None for r in refs)) and None)
        return y.sum(), refs

    loss, refs = run()
    gc.collect()
    loss.backward()
    # Seen from the output of layer t: layers after t have served. One more may be in flight.
    assert alive[0] == 4
    assert alive[-1] <= 2
    assert sum(r() is not None for r in refs) == 0
    assert loss is not None  # the graph's root is still held


@over("asked", lambda backend: ["key", "value", "both"])
@pytest.mark.parametrize("how", ["attend", "provide"])
def test_a_pair_that_asks_for_a_gradient_afterwards_gets_it(backend, how, asked):
    """As in eager PyTorch: from the retrievals after it, and none from those before."""
    start = [[t.to(backend.exact) for t in random(backend, ROW, ROW, MAP)] for _ in range(4)]

    def run():
        layers = [[t.clone().requires_grad_(i != 1) for t in s] for i, s in enumerate(start)]
        late = {"key": layers[1][1:2], "value": layers[1][2:], "both": layers[1][1:]}[asked]
        history, total = ek.LayerHistory(), 0
        for i, (q, k, v) in enumerate(layers):
            if i == 1 and how == "provide":
                history.provide(k, v, heads=HEADS)
            else:
                total = total + history.attend(q, k, v, heads=HEADS).sin().sum()
            if i == 2:
                for t in late:
                    t.requires_grad_()
        return grads(total, [t for layer in layers for t in layer if t.requires_grad])

    assert all(g is not None for g in compare(backend, run))


@kernels
@pytest.mark.parametrize("how", ["asked for later", "no_grad", "another backend"])
def test_a_pair_whose_signs_are_a_flag(backend, how):
    """It is held as autograd knows it, whoever serves its layer, and read with its signs."""
    start = [[t.to(backend.exact) for t in random(backend, ROW, ROW, MAP)] for _ in range(3)]

    def run(name):
        pairs = [[torch._neg_view(t.clone()) for t in layer] for layer in start]
        leaves = [t for layer in pairs for t in layer]
        history, total = ek.LayerHistory(), 0
        for i, (q, k, v) in enumerate(pairs):
            for t in (q, k, v):
                t.requires_grad_(how == "no_grad" or i > 0)
            by = "eager" if how == "another backend" and i == 0 else name
            with torch.set_grad_enabled(how != "no_grad" or i > 0), ek.use_backend(by):
                out = history.attend(q, k, v, heads=HEADS)
            if how == "asked for later":
                k.requires_grad_(), v.requires_grad_()
            total = total + out.sin().sum()
        asked = [t for t in leaves if t.requires_grad]
        found = torch.autograd.grad(total, asked, allow_unused=True)
        return [out.detach(), *(g for g in found if g is not None)]

    found, expected = run(backend.name), run("eager")
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **backend.tolerance)


@kernels
@pytest.mark.parametrize("which", ["key that asks afterwards", "value"])
def test_gradients_past_a_layer_without_that_widened_what_is_held(backend, which):
    """In a history with a dtype, after a layer in eager PyTorch that read its values as wide as they were."""
    layers = [random(backend, ROW, ROW, MAP) for _ in range(4)]

    def run(name):
        history = ek.LayerHistory(dtype=torch.bfloat16)
        key, value = layers[0][1].clone(), layers[0][2].clone().requires_grad_(which == "value")
        with ek.use_backend(name):
            history.attend(layers[0][0], key, value, heads=HEADS)
        if which != "value":
            key.requires_grad_()
        with ek.use_backend("eager"), torch.no_grad():
            history.attend(*layers[1], heads=HEADS)
        # Of a value that has a node kernels would gather the gradient all the same.
        with ek.use_backend("eager" if which == "value" else name):
            total = sum(history.attend(*layer, heads=HEADS).sin().sum() for layer in layers[2:])
        return torch.autograd.grad(total, value if which == "value" else key)

    torch.testing.assert_close(run(backend.name), run("eager"), atol=1e-5, rtol=1e-4)


def test_inference_mode(backend):
    layers, x = chained(backend, 3)
    with torch.inference_mode():
        outs, _, _ = run_stage(layers, x)
    assert torch.isfinite(outs[-1]).all()


@over(
    "form",
    lambda backend: ["op", "layer", "block"] + ["light"] * backend.has_light_layers,
    WITH_KERNELS,
)
def test_a_failed_pass_leaves_nothing(backend, form, made):
    check_freed_after_a_failed_pass(form, backend.device)
    assert made
