"""What LayerHistory promises beyond its gradients: checkpointing, refusals, probes, memory."""

import gc
import weakref

import pytest
import torch
from support.history_stages import (
    BATCH,
    CHANNELS,
    HEADS,
    SIDE,
    all_inputs,
    assert_same,
    grads,
    make_layers,
    on_both,
    run_stage,
)
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


def test_the_kernels_ran(monkeypatch):
    calls, cpp = [], KERNELS["cpp"]
    for name in ("attend", "attend_backward"):
        real = getattr(cpp, name)
        monkeypatch.setattr(
            cpp, name, lambda *a, n=name, r=real, **k: (calls.append(n), r(*a, **k))[1]
        )
    layers, x = make_layers(3)
    run_stage(layers, x)[0][-1].sum().backward()
    assert calls == ["attend"] * 3 + ["attend_backward"] * 3


@pytest.mark.parametrize("chunk", [1, 2])
def test_checkpointing_without_reentry(chunk):
    layers, x = make_layers(4, skip=(1,))

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

    expected = on_both(lambda: run(False))
    assert_same(on_both(lambda: run(True)), expected)


def test_loss_inside_a_checkpoint_reads_the_recomputed_divergence():
    layers, x = make_layers(3)

    def block(layer, y, history):
        y = layer(y, history)
        return y, history.weights.square().sum()

    def run():
        history, y, total = ek.LayerHistory(), x, 0.0
        for layer in layers:
            y, term = checkpoint(block, layer, y, history, use_reentrant=False)
            total = total + term
        return grads(total + y.sum(), all_inputs(layers, x))

    on_both(run)


def test_reentrant_checkpointing_is_refused():
    layers, x = make_layers(2)
    history, y = ek.LayerHistory(), x
    for layer in layers:
        y = checkpoint(layer, y, history, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


def test_recomputation_without_a_caller_is_refused():
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    history = ek.LayerHistory()

    def block(y):
        q = y.flatten(2).mean(-1)
        return history.attend(q, q, y * 2, heads=HEADS)

    out = checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="caller"):
        out.sum().backward()


def test_gradient_changed_in_place_is_noticed():
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    history = ek.LayerHistory()
    kept = []

    def change_the_later_gradient(_):
        kept[0].add_(1)

    with ek.use_backend("cpp"):
        q = x.flatten(2).mean(-1)
        first = history.attend(q, q, x * 2, heads=HEADS)
        # Runs after the second layer's backward and before the first one's.
        first.register_hook(change_the_later_gradient)
        second = history.attend(q, q, first * 3, heads=HEADS)
        second.register_hook(lambda g: kept.append(g) or g)
        with pytest.raises(RuntimeError, match="changed in place"):
            second.square().sum().backward()


def test_value_changed_in_place_is_refused():
    history = ek.LayerHistory()
    q, v = torch.randn(BATCH, CHANNELS), torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    history.attend(q, q, v, heads=HEADS)
    v.add_(1)
    with pytest.raises(RuntimeError, match="layer 0 was changed in place"):
        history.attend(q, q, v.clone(), heads=HEADS)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"v": torch.randn(BATCH, CHANNELS, SIDE, SIDE + 1)}, "v: got shape"),
        ({"q": torch.randn(BATCH, CHANNELS + 2)}, "k: got shape"),
        ({"k": torch.randn(BATCH + 1, CHANNELS)}, "k: got shape"),
        ({"v": torch.randn(BATCH, CHANNELS, SIDE, SIDE).half()}, "v: got dtype"),
        ({"heads": 3}, "heads: got 3"),
        ({"heads": 4}, "heads: got 4"),
        ({"v": torch.randn(BATCH, CHANNELS, SIDE, SIDE, device="meta")}, "v: got device"),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_what_does_not_fit_the_history_is_refused(change, name, backend):
    history = ek.LayerHistory()
    q, v = torch.randn(BATCH, CHANNELS), torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    args = {"q": q, "k": q, "v": v, "heads": HEADS}
    with ek.use_backend(backend):
        history.attend(**args)
        with pytest.raises((ValueError, TypeError), match=name):
            history.attend(**{**args, **change})
    assert history.depth == 1


def test_second_derivatives_are_refused_by_kernels_and_given_by_eager():
    layers, x = make_layers(2)
    with ek.use_backend("cpp"):
        loss = run_stage(layers, x)[0][-1].square().sum()
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)
    with ek.use_backend("eager"):
        loss = run_stage(layers, x)[0][-1].square().sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.autograd.grad(g.sum(), x)[0].abs().max() > 0


def test_gradcheck():
    layers, x = make_layers(3)
    with ek.use_backend("cpp"):
        assert torch.autograd.gradcheck(lambda y: run_stage(layers, y)[0][-1], x)


def test_probe_appends_nothing_and_equals_attend():
    layers, x = make_layers(3)
    history = ek.LayerHistory()
    y = run_stage(layers[:2], x, history)[0][-1]
    q = y.flatten(2).mean(-1)
    probed = history.probe(q @ layers[2].wq, q @ layers[2].wk, heads=HEADS)
    assert history.depth == history.position == 2
    assert not probed.weights.requires_grad
    layers[2](y, history)
    torch.testing.assert_close(probed.weights, history.weights.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(probed.kl, history.kl.detach(), rtol=1e-9, atol=1e-12)


def test_skipped_layers_count_as_positions():
    history = ek.LayerHistory()
    q, v = torch.randn(BATCH, CHANNELS), torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    history.attend(q, q, v, heads=HEADS)
    history.pass_by()
    history.provide(q, v, heads=HEADS)
    assert (history.depth, history.position) == (2, 3)
    history.attend(q, q, v, heads=HEADS)
    assert history.weights.shape == (BATCH, HEADS, 3)
    assert history.kl.shape == (BATCH, HEADS)


def test_values_are_released_during_the_backward():
    """Layer by layer: the value of a layer is gone once its own backward has run."""
    layers, x = make_layers(4)
    alive = []

    def run():
        history, y, refs = ek.LayerHistory(), x, []
        for layer in layers:
            y = layer(y, history)
            refs.append(weakref.ref(history.values[-1].untyped_storage()))
            y.register_hook(lambda g: alive.append(sum(r() is not None for r in refs)) and None)
        return y.sum(), refs

    with ek.use_backend("cpp"):
        loss, refs = run()
        gc.collect()
        loss.backward()
    # Seen from the output of layer t: layers after t have served. One more may be in flight.
    assert alive[0] == 4
    assert alive[-1] <= 2
    assert sum(r() is not None for r in refs) == 0
    assert loss is not None  # the graph's root is still held


def test_inference_mode():
    layers, x = make_layers(3, dtype=torch.float32)
    with torch.inference_mode():
        outs, _, _ = run_stage(layers, x)
    assert torch.isfinite(outs[-1]).all()


@pytest.mark.parametrize("depth", [300])
def test_deep_history(depth):
    torch.manual_seed(0)
    q = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    vs = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(depth)]

    def run():
        history, total = ek.LayerHistory(), 0.0
        for v in vs:
            total = total + history.attend(q, q * 0.5, v, heads=2).square().sum()
        return grads(total, [q, *vs[:3], vs[-1]])

    on_both(run)
