"""What a whole layer keeps for its backward: the pairs before it, watched and released as autograd does its own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.layer_stages import make_stage, run_stage

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.ops.autograd import saved_tensors
from ela_kernels.ops.layer_attention import saved_pairs as saved

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

WAYS = ["held", "through autograd"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """With what newer versions of PyTorch offer, and without."""
    if request.param == "held" and (saved_tensors._top_hooks is None or saved._keeps_graph is None):
        pytest.skip("this version of PyTorch cannot tell whether a graph is retained")
    if request.param != "held":
        monkeypatch.setattr(saved, "_keeps_graph", None)
    return request.param


def stage():
    layers, x = make_stage((2, 8, 5, 5), 4, 4)
    return (*run_stage(layers, x, True), [x, *layers.parameters()])


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_pair_changed_in_place_is_noticed_in_the_backward(way, kind):
    outs, history, inputs = stage()
    with torch.no_grad():
        getattr(history, kind)[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outs[-1].sum(), inputs, allow_unused=True)


def test_an_own_value_changed_in_place_is_noticed(way):
    outs, history, inputs = stage()
    with torch.no_grad():
        history.values[-1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outs[-1].sum(), inputs, allow_unused=True)


def test_a_second_backward_needs_the_graph(way):
    outs, _, inputs = stage()
    first = torch.autograd.grad(outs[-1].sum(), inputs, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(outs[-1].sum(), inputs, allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outs[-1].sum(), inputs, allow_unused=True)


def test_a_later_layer_alone_after_the_earlier_ones_are_done(way):
    # The graph of the earlier layers is freed by then; the last layer's own is not.
    layers, x = make_stage((2, 8, 5, 5), 3, 4)

    def run():
        history = ek.LayerHistory()
        return [layer(x, history) for layer in layers]

    outs = run()
    wanted = torch.autograd.grad(outs[2].sum(), layers[2].Wq.weight)
    outs = run()
    torch.autograd.grad(outs[0].sum(), layers[0].Wv.weight)
    assert torch.equal(torch.autograd.grad(outs[2].sum(), layers[2].Wq.weight)[0], wanted[0])


def test_pairs_go_with_the_backward_that_they_serve(way):
    outs, history, inputs = stage()
    pairs = [weakref.ref(t) for t in (*history.keys, *history.values)]
    out = outs[-1]
    del outs, history
    torch.autograd.grad(out.sum(), inputs, allow_unused=True)
    gc.collect()
    assert not any(r() is not None for r in pairs)
    assert out.grad_fn is not None  # its graph is there still, and holds none of them


def test_hooks_on_saved_tensors_see_all_pairs():
    seen: list[torch.Tensor] = []

    def pack(tensor):
        seen.append(tensor)
        return tensor.clone()

    layers, x = make_stage((2, 8, 5, 5), 3, 4)
    plain, _ = run_stage(layers, x, True)
    inputs = [x, *layers.parameters()]
    wanted = torch.autograd.grad(plain[-1].sum(), inputs, allow_unused=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        outs, history = run_stage(layers, x, True)
    assert {v.data_ptr() for v in history.values} <= {s.data_ptr() for s in seen}
    with torch.no_grad():
        for pair in (*history.keys, *history.values):
            pair.zero_()  # the copies serve
    found = torch.autograd.grad(outs[-1].sum(), inputs, allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
