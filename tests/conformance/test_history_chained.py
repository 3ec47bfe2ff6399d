"""The pull form, of layers whose query, key and value all come from the map before.

They are held to eager PyTorch in the widest dtype that the backend serves.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.backends import WITH_KERNELS, Backend, on, over, words
from support.history_stages import (
    BATCH,
    CHANNELS,
    HEADS,
    all_inputs,
    assert_same,
    chained,
    compare,
    grads,
    run_stage,
)
from support.on_gpu import same_bits

import ela_kernels as ek


def compare_planar(backend: Backend, layers: Any, x: torch.Tensor) -> list[Any]:
    return compare(
        backend,
        lambda: grads(run_stage(layers, x)[0][-1].square().sum(), all_inputs(layers, x)),
    )


kernels = on(WITH_KERNELS)


@on([b for b in WITH_KERNELS if b.beyond])
def test_the_deepest_history(backend):
    options = {"dtype": backend.exact, "device": backend.device}
    q, *values = (
        torch.randn(2, 4, *spatial, **options).requires_grad_()
        for spatial in [(), *[(3,)] * (backend.max_depth or 300)]
    )

    def run():
        history, total = ek.LayerHistory(), 0.0
        for v in values:
            total = total + history.attend(q, q * 0.5, v, heads=2).square().sum()
        return grads(total, [q, *values[:3], values[-1]])

    compare(backend, run)


@over("depth", lambda backend: backend.some([1, 2, 9, 5]), WITH_KERNELS)
def test_gradients_of_a_chain(backend, depth):
    layers, x = chained(backend, depth)

    def run():
        outs, _, _ = run_stage(layers, x)
        return [outs[-1].detach(), *grads(outs[-1].square().sum(), all_inputs(layers, x))]

    found = compare(backend, run)
    # Only the first layer's query has no influence: it retrieves from one pair alone.
    zero = [i for i, g in enumerate(found[2:]) if g.abs().max() == 0]
    assert zero == ([0, 1] if depth == 1 else [0])


@over(
    "skip",
    lambda backend: backend.some([(1,), (0,), (2, 3), (4,), (0, 1, 2), (0, 3)]),
    WITH_KERNELS,
)
def test_layers_that_only_provide(backend, skip):
    layers, x = chained(backend, 5, skip)

    def run():
        outs, weights, kls = run_stage(layers, x)
        loss = outs[-1].square().sum() + sum(k.sum() for k in kls if k is not None)
        loss = loss + sum(w.square().sum() for w in weights if w is not None)
        return grads(loss, all_inputs(layers, x))

    compare(backend, run)


@kernels
def test_each_layer_its_own_scale(backend):
    layers, x = chained(backend, 4, (1,), [0.1, None, 0.7, 1.3])
    compare_planar(backend, layers, x)


@over("what", lambda backend: backend.some(["weights", "kl", "all"]), WITH_KERNELS)
def test_gradients_through_weights_and_divergence(backend, what):
    layers, x = chained(backend, 5)

    def run():
        outs, weights, kls = run_stage(layers, x)
        loss = sum(k.square().sum() for k in kls if k is not None)
        if what != "kl":
            loss = sum(w.square().sum() for w in weights)
        if what == "all":
            loss = loss + outs[-1].square().sum()
        return grads(loss, all_inputs(layers, x))

    compare(backend, run)


@over("trained", lambda backend: backend.some([(0,), (2,), (4,), (1, 3)]), WITH_KERNELS)
def test_only_some_layers_need_gradients(backend, trained):
    layers, x = chained(backend, 5)
    x = x.detach()
    for i, layer in enumerate(layers):
        layer.requires_grad_(i in trained)
    wanted = [p for p in layers.parameters() if p.requires_grad]
    compare(backend, lambda: grads(run_stage(layers, x)[0][-1].square().sum(), wanted))


@kernels
def test_a_loss_on_a_layer_before_the_last(backend):
    layers, x = chained(backend, 4)
    compare(backend, lambda: grads(run_stage(layers, x)[0][1].sum(), [x]))


@kernels
def test_a_layer_under_no_grad_does_not_cut_the_chain(backend):
    layers, x = chained(backend, 5)

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

    compare(backend, run)


@kernels
def test_two_forward_passes_before_one_backward(backend):
    layers, x = chained(backend, 4)
    z = torch.randn_like(x, requires_grad=True)

    def run():
        a, b = run_stage(layers, x)[0][-1], run_stage(layers, z)[0][-1]
        return grads((a * b).sum(), [*all_inputs(layers, x), z])

    compare(backend, run)


@over(
    "order",
    lambda backend: backend.some([("whole", "part"), ("whole", "whole"), ("part", "whole")]),
    WITH_KERNELS,
    ids=words,
)
def test_second_backward_over_a_retained_graph(backend, order):
    layers, x = chained(backend, 5)

    def run():
        outs, _, _ = run_stage(layers, x)
        losses = {"whole": outs[-1].square().sum(), "part": outs[2].square().sum()}
        found = []
        for name in order:
            found += grads(losses[name], all_inputs(layers, x), retain_graph=True)
        return found

    compare(backend, run)


@kernels
def test_a_repeated_backward_gives_the_same_bits(backend):
    layers, x = chained(backend, 4)
    outs, _, _ = run_stage(layers, x)
    # Not the parameters: PyTorch may add their gradients up in another order every time.
    first, again = (grads(outs[-1].sum(), [x], retain_graph=True) for _ in range(2))
    assert same_bits(first[0], again[0])


@over("subset", lambda backend: backend.some([[0], [3], [13], [7, 2]]), WITH_KERNELS)
def test_gradients_of_a_subset_then_of_all(backend, subset):
    layers, x = chained(backend, 5)

    def run():
        loss = run_stage(layers, x)[0][-1].square().sum()
        inputs = all_inputs(layers, x)
        part = grads(loss, [inputs[i] for i in subset], retain_graph=True)
        return part + grads(loss, inputs)

    compare(backend, run)


@kernels
def test_two_continuations_of_one_history(backend):
    layers, x = chained(backend, 6)

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

    compare(backend, run)


@kernels
def test_expanded_and_strided_output_gradients(backend):
    layers, x = chained(backend, 3)
    inputs = all_inputs(layers, x)
    compare(backend, lambda: grads(run_stage(layers, x)[0][-1].sum(), inputs))

    def strided():
        out = run_stage(layers, x)[0][-1].transpose(2, 3)[:, :, ::2]
        return grads(out.square().sum(), inputs)

    compare(backend, strided)


@pytest.mark.parametrize("turned", [(1,), (0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 6])
@kernels
def test_values_and_output_gradients_with_height_and_width_swapped(backend, channels, turned):
    """A gradient strided as a value that no kernel can read as it is: each counts for every earlier layer."""
    torch.manual_seed(4)
    options = {"dtype": backend.exact, "device": backend.device}

    def swapped():
        return torch.randn(2, channels, 5, 4, **options).transpose(-1, -2)

    qs, ks = (
        [torch.randn(2, channels, **options).requires_grad_() for _ in range(4)] for _ in range(2)
    )
    values = [swapped().requires_grad_() for _ in range(4)]
    douts = [swapped() if i in turned else swapped().contiguous() for i in range(4)]

    def run():
        history, heads = ek.LayerHistory(), 1 if channels == 1 else 2
        outs = [history.attend(*t, heads=heads) for t in zip(qs, ks, values, strict=True)]
        return list(torch.autograd.grad(outs, [*qs, *ks, *values], douts, allow_unused=True))

    compare(backend, run)


@pytest.mark.parametrize("batch", [0, 2])
@kernels
def test_gradients_of_keys_alone_of_tokens(backend, batch):
    """No value wants one: the output gradients, in either form, are not read for it."""
    torch.manual_seed(4)
    options = {"dtype": backend.exact, "device": backend.device}
    qs, ks = (
        [torch.randn(batch, 8, **options).requires_grad_() for _ in range(3)] for _ in range(2)
    )
    values = [torch.randn(batch, 5, 3, 8, **options) for _ in range(3)]
    douts = [torch.randn(batch, 5, 3, 8, **options) for _ in range(3)]
    douts[1] = torch.randn(batch, 8, 5, 3, **options).movedim(1, -1)

    def run():
        history = ek.LayerHistory()
        outs = [
            history.attend(*t, heads=2, channels_last=True)
            for t in zip(qs, ks, values, strict=True)
        ]
        return list(torch.autograd.grad(outs, [*qs, *ks], douts, allow_unused=True))

    compare(backend, run)


@kernels
def test_channels_last_maps_keep_their_format(backend):
    layers, x = chained(backend, 4)
    y = x.detach().to(memory_format=torch.channels_last).requires_grad_()

    def run():
        outs, _, _ = run_stage(layers, y)
        assert outs[-1].is_contiguous(memory_format=torch.channels_last)
        return grads(outs[-1].square().sum(), all_inputs(layers, y))

    found, planar = compare(backend, run)[1:], compare_planar(backend, layers, x)[1:]
    assert_same(found, planar, **backend.tolerance)


@kernels
def test_accumulation_and_hooks(backend):
    layers, x = chained(backend, 3)

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

    compare(backend, run)


@kernels
def test_mixed_memory_formats_where_strides_look_alike(backend):
    """With as many positions as channels a planar and an interleaved map have the same two strides."""
    layers, _ = chained(backend, 4)
    torch.manual_seed(3)
    x = torch.randn(BATCH, CHANNELS, 2, CHANNELS // 2, dtype=backend.exact, device=backend.device)
    x.requires_grad_()

    def run():
        history, outs = ek.LayerHistory(), []
        for i, layer in enumerate(layers):
            form = torch.channels_last if i % 2 else torch.contiguous_format
            y, v = x.flatten(2).mean(-1), (x * layer.wv).tanh().contiguous(memory_format=form)
            outs.append(history.attend(y @ layer.wq, y @ layer.wk, v, heads=HEADS))
        return grads(sum(o.square().sum() for o in outs), all_inputs(layers, x))

    compare(backend, run)


@pytest.mark.parametrize("whole_layers", [False, True])
@over(
    "served",
    lambda backend: ["kekk", "ekkk", "ekek", "kkee"],
    WITH_KERNELS,
)
def test_backends_that_change_within_a_chain(backend, served, whole_layers):
    """A pair that eager PyTorch served has no node that gathers its gradient: what follows must not rely on one."""
    torch.manual_seed(0)
    options = {"dtype": backend.exact, "device": backend.device}
    layers = torch.nn.ModuleList(ek.LayerAttention(8, 4) for _ in served).to(**options)
    x, given = (torch.randn(2, 8, 5, 4, **options).requires_grad_() for _ in range(2))

    def run(served):
        history, y = ek.LayerHistory(), x
        with torch.no_grad():  # its gradient comes from the later layers alone
            history.provide(given.mean((2, 3)), given, heads=2)
        for layer, letter in zip(layers, served, strict=True):
            with ek.use_backend("eager" if letter == "e" else backend.name):
                if whole_layers:
                    y = layer(y, history, residual=True)
                else:
                    q, k, v = layer.query_key_value(y)
                    y = y + history.attend(q, k, v, heads=2)
        return [y, *torch.autograd.grad(y.square().sum(), [x, given, *layers.parameters()])]

    # Two hundred times as much for sums over maps and through filters in float64.
    loose = {"rtol": 1e-10, "atol": 1e-10} if backend.exact == torch.float64 else backend.tolerance
    for found, expected in zip(run(served), run("eeee"), strict=True):
        torch.testing.assert_close(found, expected, **loose)
