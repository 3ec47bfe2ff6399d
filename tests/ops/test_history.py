"""LayerHistory's pull backward against autograd's own gradients of the eager reference, in float64.

Both sides add the same numbers in another order, so 1e-12 relative leaves three digits over float64's 2.2e-16 times the
few hundred terms of a sum.
"""

import copy

import pytest
import torch
from support.history_stages import (
    BATCH,
    CHANNELS,
    HEADS,
    all_inputs,
    assert_same,
    grads,
    make_layers,
    on_both,
    on_both_planar,
    run_stage,
)

import ela_kernels as ek
from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


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


def test_expanded_and_strided_output_gradients():
    layers, x = make_layers(3)
    on_both(lambda: grads(run_stage(layers, x)[0][-1].sum(), all_inputs(layers, x)))
    on_both(
        lambda: grads(
            run_stage(layers, x)[0][-1].transpose(2, 3)[:, :, ::2].square().sum(),
            all_inputs(layers, x),
        )
    )


@pytest.mark.parametrize("turned", [(1,), (0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 6])
def test_values_and_output_gradients_with_height_and_width_swapped(channels, turned):
    """A gradient strided as a value that no kernel can read as it is: each counts for every earlier layer."""
    torch.manual_seed(4)

    def swapped():
        return torch.randn(2, channels, 5, 4, dtype=torch.float64).transpose(-1, -2)

    qs, ks = (
        [torch.randn(2, channels, dtype=torch.float64, requires_grad=True) for _ in range(4)]
        for _ in range(2)
    )
    values = [swapped().requires_grad_() for _ in range(4)]
    douts = [swapped() if i in turned else swapped().contiguous() for i in range(4)]

    def run():
        history, heads = ek.LayerHistory(), 1 if channels == 1 else 2
        outs = [history.attend(*t, heads=heads) for t in zip(qs, ks, values, strict=True)]
        return list(torch.autograd.grad(outs, [*qs, *ks, *values], douts, allow_unused=True))

    on_both(run)


def test_channels_last_maps_keep_their_format():
    layers, x = make_layers(4)
    y = x.detach().to(memory_format=torch.channels_last).requires_grad_()

    def run():
        outs, _, _ = run_stage(layers, y)
        assert outs[-1].is_contiguous(memory_format=torch.channels_last)
        return grads(outs[-1].square().sum(), all_inputs(layers, y))

    assert_same(on_both(run)[1:], on_both_planar(layers, x)[1:])


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


def test_mixed_memory_formats_where_strides_look_alike():
    """With as many positions as channels a planar and an interleaved map have the same two strides."""
    layers, _ = make_layers(4)
    torch.manual_seed(3)
    x = torch.randn(BATCH, CHANNELS, 2, CHANNELS // 2, dtype=torch.float64, requires_grad=True)

    def run():
        history, outs = ek.LayerHistory(), []
        for i, layer in enumerate(layers):
            form = torch.channels_last if i % 2 else torch.contiguous_format
            y, v = x.flatten(2).mean(-1), (x * layer.wv).tanh().contiguous(memory_format=form)
            outs.append(history.attend(y @ layer.wq, y @ layer.wk, v, heads=HEADS))
        return grads(sum(o.square().sum() for o in outs), all_inputs(layers, x))

    on_both(run)


@pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("whole_layers", [False, True])
@pytest.mark.parametrize(
    "backends",
    [
        ("cpp", "eager", "cpp", "cpp"),
        ("eager", "cpp", "cpp", "cpp"),
        ("eager", "cpp", "eager", "cpp"),
        ("cpp", "cpp", "eager", "eager"),
    ],
    ids="-".join,
)
def test_backends_that_change_within_a_stage(backends, whole_layers):
    """A pair that eager PyTorch served has no node that gathers its gradient: what follows must not rely on one."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(ek.LayerAttention(8, 4) for _ in backends).double()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    given = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(names):
        history, y = ek.LayerHistory(), x
        with torch.no_grad():  # its gradient comes from the later layers alone
            history.provide(given.mean((2, 3)), given, heads=2)
        for layer, name in zip(layers, names, strict=True):
            with ek.use_backend(name):
                if whole_layers:
                    y = layer(y, history, residual=True)
                else:
                    q, k, v = layer.query_key_value(y)
                    y = y + history.attend(q, k, v, heads=2)
        return [y, *torch.autograd.grad(y.square().sum(), [x, given, *layers.parameters()])]

    for found, expected in zip(run(backends), run(["eager"] * 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
