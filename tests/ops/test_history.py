"""LayerHistory's pull backward against autograd's own gradients of the eager reference, in float64.

Both sides add the same numbers in another order, so 1e-12 relative leaves three digits over float64's 2.2e-16 times the
few hundred terms of a sum.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

HEADS, CHANNELS, BATCH, SIDE = 2, 6, 3, 4


class Layer(nn.Module):
    """A layer whose query, key and value all depend on the map before it."""

    def __init__(self, retrieves=True, scale=None, dtype=torch.float64):
        super().__init__()
        self.wq, self.wk = (
            nn.Parameter(torch.randn(CHANNELS, CHANNELS, dtype=dtype)) for _ in range(2)
        )
        self.wv = nn.Parameter(torch.randn(CHANNELS, 1, 1, dtype=dtype))
        self.retrieves, self.scale = retrieves, scale

    def forward(self, x, history):
        y = x.flatten(2).mean(-1)
        k, v = y @ self.wk, (x * self.wv).tanh()
        if not self.retrieves:
            history.provide(k, v, heads=HEADS, caller=self)
            return x
        out = history.attend(y @ self.wq, k, v, heads=HEADS, scale=self.scale, caller=self)
        return x + out


def make_layers(depth, skip=(), scales=None, dtype=torch.float64):
    torch.manual_seed(7)
    layers = nn.ModuleList(
        Layer(i not in skip, None if scales is None else scales[i], dtype) for i in range(depth)
    )
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE + 1, dtype=dtype, requires_grad=True)
    return layers, x


def assert_same(found, expected):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), f"gradient {i}: {a} against {b}"
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, i=i: f"{i}: {m}")


def on_both(run):
    """`run()` on the kernels and on the reference; compares everything it returns."""
    results = {}
    for backend in ("cpp", "eager"):
        with ek.use_backend(backend):
            results[backend] = run()
    assert_same(results["cpp"], results["eager"])
    return results["cpp"]


def all_inputs(layers, x):
    return [x, *layers.parameters()]


def run_stage(layers, x, history=None, through=lambda f, *args: f(*args)):
    history = ek.LayerHistory() if history is None else history
    outs, weights, kls = [], [], []
    for layer in layers:
        x = through(layer, x, history)
        outs.append(x)
        weights.append(history.weights)
        kls.append(history.kl)
    return outs, weights, kls


def grads(loss, inputs, **kwargs):
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, **kwargs))


@pytest.mark.parametrize("depth", [1, 2, 5, 9])
def test_gradients_of_a_stage(depth):
    layers, x = make_layers(depth)

    def run():
        outs, _, _ = run_stage(layers, x)
        return [outs[-1].detach(), *grads(outs[-1].square().sum(), all_inputs(layers, x))]

    found = on_both(run)
    # Only the first layer's query has no influence: it retrieves from one pair alone.
    zero = [i for i, g in enumerate(found[2:]) if g.abs().max() == 0]
    assert zero == ([0, 1] if depth == 1 else [0])


def test_the_kernels_ran(monkeypatch):
    import ela_kernels.ops.layer_attention.pull as pull

    calls = []
    for name in ("layer_attention_forward_cpp", "layer_attention_backward_cpp"):
        real = getattr(pull, name)
        monkeypatch.setattr(
            pull, name, lambda *a, n=name, r=real, **k: (calls.append(n), r(*a, **k))[1]
        )
    layers, x = make_layers(3)
    run_stage(layers, x)[0][-1].sum().backward()
    assert calls == ["layer_attention_forward_cpp"] * 3 + ["layer_attention_backward_cpp"] * 3


@pytest.mark.parametrize("skip", [(1,), (0,), (2, 3), (4,), (0, 1, 2)])
def test_layers_that_only_provide(skip):
    layers, x = make_layers(5, skip)

    def run():
        outs, _, kls = run_stage(layers, x)
        loss = outs[-1].square().sum() + sum(k.sum() for k in kls if k is not None)
        return grads(loss, all_inputs(layers, x))

    on_both(run)


def test_each_layer_its_own_scale():
    layers, x = make_layers(4, skip=(1,), scales=[0.1, None, 0.7, 1.3])
    on_both(lambda: grads(run_stage(layers, x)[0][-1].square().sum(), all_inputs(layers, x)))


@pytest.mark.parametrize("used", [(0,), (4,), (1, 3), (0, 2, 4)])
def test_outputs_that_the_loss_does_not_use(used):
    layers, x = make_layers(5)

    def run():
        history, outs = ek.LayerHistory(), []
        for layer in layers:  # not chained: each output reaches the loss on its own or not at all
            y = x.flatten(2).mean(-1)
            outs.append(
                history.attend(y @ layer.wq, y @ layer.wk, (x * layer.wv).tanh(), heads=HEADS)
            )
        return grads(sum(outs[i].square().sum() for i in used), all_inputs(layers, x))

    on_both(run)


@pytest.mark.parametrize("what", ["weights", "kl", "all"])
def test_gradients_through_weights_and_divergence(what):
    layers, x = make_layers(5)

    def run():
        outs, weights, kls = run_stage(layers, x)
        loss = sum(k.square().sum() for k in kls if k is not None)
        if what != "kl":
            loss = sum(w.square().sum() for w in weights)
        if what == "all":
            loss = loss + outs[-1].square().sum()
        return grads(loss, all_inputs(layers, x))

    on_both(run)


@pytest.mark.parametrize("trained", [(0,), (2,), (4,), (1, 3)])
def test_only_some_layers_need_gradients(trained):
    layers, x = make_layers(5)
    x = x.detach()
    for i, layer in enumerate(layers):
        layer.requires_grad_(i in trained)
    wanted = [p for p in layers.parameters() if p.requires_grad]
    on_both(lambda: grads(run_stage(layers, x)[0][-1].square().sum(), wanted))


def test_a_layer_under_no_grad_does_not_cut_the_chain():
    layers, x = make_layers(5)

    def run():
        history, y = ek.LayerHistory(), x
        for i, layer in enumerate(layers):
            if i == 2:
                with torch.no_grad():
                    layer(y, history)
            else:
                y = layer(y, history)
        wanted = [x, *(p for i, lay in enumerate(layers) if i != 2 for p in lay.parameters())]
        return grads(y.square().sum(), wanted)

    on_both(run)


def test_two_forward_passes_before_one_backward():
    layers, x = make_layers(4)
    z = torch.randn_like(x, requires_grad=True)

    def run():
        a, b = run_stage(layers, x)[0][-1], run_stage(layers, z)[0][-1]
        return grads((a * b).sum(), [*all_inputs(layers, x), z])

    on_both(run)


@pytest.mark.parametrize("order", [("whole", "part"), ("part", "whole"), ("whole", "whole")])
def test_second_backward_over_a_retained_graph(order):
    layers, x = make_layers(5)

    def run():
        outs, _, _ = run_stage(layers, x)
        losses = {"whole": outs[-1].square().sum(), "part": outs[2].square().sum()}
        found = []
        for name in order:
            found += grads(losses[name], all_inputs(layers, x), retain_graph=True)
        return found

    on_both(run)


@pytest.mark.parametrize("subset", [[0], [3], [7, 2], [13]])
def test_gradients_of_a_subset_then_of_all(subset):
    layers, x = make_layers(5)

    def run():
        loss = run_stage(layers, x)[0][-1].square().sum()
        inputs = all_inputs(layers, x)
        part = grads(loss, [inputs[i] for i in subset], retain_graph=True)
        return part + grads(loss, inputs)

    on_both(run)


def test_two_continuations_of_one_history():
    layers, x = make_layers(6)

    def run():
        history, y = ek.LayerHistory(), x
        for layer in layers[:2]:
            y = layer(y, history)
        other = copy.copy(history)  # a shallow copy continues from the same prefix
        a = run_stage(layers[2:4], y, history)[0][-1]
        b = run_stage(layers[4:], y, other)[0][-1]
        inputs = all_inputs(layers, x)
        both = grads(a.square().sum() + b.square().sum(), inputs, retain_graph=True)
        return both + grads(a.square().sum(), inputs, retain_graph=True) + grads(b.sum(), inputs)

    on_both(run)


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


def test_expanded_and_strided_output_gradients():
    layers, x = make_layers(3)
    on_both(lambda: grads(run_stage(layers, x)[0][-1].sum(), all_inputs(layers, x)))
    on_both(
        lambda: grads(
            run_stage(layers, x)[0][-1].transpose(2, 3)[:, :, ::2].square().sum(),
            all_inputs(layers, x),
        )
    )


def test_channels_last_maps_keep_their_format():
    layers, x = make_layers(4)
    y = x.detach().to(memory_format=torch.channels_last).requires_grad_()

    def run():
        outs, _, _ = run_stage(layers, y)
        assert outs[-1].is_contiguous(memory_format=torch.channels_last)
        return grads(outs[-1].square().sum(), all_inputs(layers, y))

    assert_same(on_both(run)[1:], on_both_planar(layers, x)[1:])


def on_both_planar(layers, x):
    return on_both(lambda: grads(run_stage(layers, x)[0][-1].square().sum(), all_inputs(layers, x)))


def test_accumulation_and_hooks():
    layers, x = make_layers(3)

    def run():
        inputs = all_inputs(layers, x)
        for p in inputs:
            p.grad = None
        seen = []
        for _ in range(2):
            outs, _, _ = run_stage(layers, x)
            outs[1].register_hook(lambda g: (seen.append(g.clone()), g * 2)[1])
            outs[-1].square().sum().backward()
        return [p.grad.clone() for p in inputs] + seen

    on_both(run)


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
