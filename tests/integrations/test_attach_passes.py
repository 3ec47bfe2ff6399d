"""Passes over attached layers: checkpointed, taking turns, broken off, in threads; and what is left of them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from support.attached_networks import (
    DIM,
    FORMS,
    by_hand,
    checkpointed,
    gradients,
    images,
    network,
    same,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ela_kernels as ek


@pytest.mark.parametrize("form", FORMS)
def test_every_block_checkpointed(form):
    model = network(form)
    other = copy.deepcopy(model)
    model.run = checkpointed
    out, expected = model(images()), by_hand(other, images())
    same(out, expected)
    same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 6])
def test_segments_of_several_blocks_checkpointed(form, segments):
    """Also such that begin and end in the middle of a stage."""
    model = network(form)
    other = copy.deepcopy(model)
    blocks = (*model.first, *model.second)
    x = checkpoint_sequential(blocks, segments, model.stem(images()), use_reentrant=False)
    out, expected = model.head(x.mean((2, 3))), by_hand(other, images())
    same(out, expected)
    same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("all_at_once", [True, False])
def test_two_passes_before_the_backward(form, some, all_at_once):
    model = network(form)
    other = copy.deepcopy(model)
    # Some blocks, so that a recomputation starts from what layers outside of it left.
    recomputed = {model.first[1], model.second[2]} if some else set(model.modules())
    model.run = lambda block, x: checkpointed(block, x) if block in recomputed else block(x)
    batches = images(2, 1), images(3, 2)
    found, expected = [model(x) for x in batches], [by_hand(other, x) for x in batches]
    same(found, expected)
    sums = [[y.square().sum() for y in ys] for ys in (found, expected)]
    if all_at_once:
        same(gradients(model, sum(sums[0])), gradients(other, sum(sums[1])))
    else:
        for ours, theirs in zip(*sums, strict=True):
            same(gradients(model, ours), gradients(other, theirs))


@pytest.mark.parametrize("form", FORMS)
def test_passes_that_take_turns_block_by_block(form):
    model = network(form)
    other = copy.deepcopy(model)
    xs = [model.stem(images(2, seed)) for seed in (1, 2)]
    for block in (*model.first, *model.second):
        xs = [block(x) for x in xs]
    found = [model.head(x.mean((2, 3))) for x in xs]
    expected = [by_hand(other, images(2, seed)) for seed in (1, 2)]
    same(found, expected)
    same(
        gradients(model, sum(y.square().sum() for y in found)),
        gradients(other, sum(y.square().sum() for y in expected)),
    )


@pytest.mark.parametrize("form", FORMS)
def test_one_map_goes_on_twice(form):
    """The second time it is as if the first had not been."""
    model = network(form).eval()
    x = model.first[0](model.stem(images()))
    once, twice = (model.first[2](model.first[1](x)) for _ in range(2))
    same(once, twice)


def test_a_graph_that_is_retained():
    model = network()
    model.run = checkpointed
    loss = model(images()).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    same(first, second)


@pytest.mark.parametrize("stages", [True, False])
def test_ebqm_counts_a_recomputed_layer_once(stages):
    """Blocks are recomputed one by one, or stage by stage, with the beginning of each history."""
    model, other = network(), network()
    if stages:
        for stage in (model.first, model.second):
            run = stage.forward
            stage.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
        model.forward = lambda x: model.head(model.second(model.first(model.stem(x))).mean((2, 3)))
    else:
        model.run = checkpointed
    monitors = [ek.EBQM(m, warmup=1) for m in (model, other)]
    for m in (model, other):
        m(images()).square().sum().backward()
    assert [len(layer.observations) for layer in layers(model)] == [
        len(layer.observations) for layer in layers(other)
    ]
    for m in monitors:
        m.step()
    same([layer.place for layer in layers(model)], [0, 1, 2, 0, 1, 2])
    assert str(monitors[0].report()) == str(monitors[1].report())


def layers(model):
    return [m for m in model.modules() if isinstance(m, ek.ELA)]


@pytest.mark.parametrize("form", FORMS)
def test_reentrant_checkpointing_is_refused(form):
    model = network(form)
    model.run = lambda block, x: checkpoint(block, x, use_reentrant=True)
    out = model(images())
    with pytest.raises(
        RuntimeError, match=r"second\.2: got a map in a backward.*use_reentrant=Fal"
    ):
        out.sum().backward()


@pytest.mark.parametrize("skip", ["reuse", "retrieval", "layer"])
@pytest.mark.parametrize("recompute", [True, False])
def test_skipped_layers(skip, recompute):
    """Several steps: a layer that is skipped waits with its key and value, once it knows that nobody reads them."""
    model = network()
    for layer in layers(model):
        layer.skip = skip
    other = copy.deepcopy(model)
    if recompute:
        model.run = checkpointed
    for skipped in ((1,), (1, 2), (0, 1, 2, 4), (1, 4, 5), (0, 3)):
        for m in (model, other):
            for i, layer in enumerate(layers(m)):
                layer.skipped = i in skipped
        for _ in range(2):
            out, expected = model(images()), by_hand(other, images())
            same(out, expected)
            loss = out.square().sum(), expected.square().sum()
            grads = []
            for m, value in zip((model, other), loss, strict=True):
                m.zero_grad()
                value.backward()
                grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
            same(*grads)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_reader_that_nobody_knew_of(recompute):
    """Keys and values that were not made are made when a layer reads them all the same, which is then recomputed."""
    model = network()
    first = [block.ela for block in model.first]
    last = model.first[2]
    for layer in first:
        layer.skip, layer.skipped = "retrieval", True
    for _ in range(2):
        model(images()).sum().backward()
    other = copy.deepcopy(model)

    def wake(block, _):
        block.ela.skipped = False

    last.register_forward_pre_hook(wake)
    other.first[2].ela.skipped = False
    if recompute:
        model.run = lambda block, x: checkpointed(block, x) if block is last else block(x)
    out, expected = model(images()), by_hand(other, images())
    same(out, expected)
    loss = out.square().sum(), expected.square().sum()
    model.zero_grad()
    other.zero_grad()
    for value in loss:
        value.backward()
    found = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, other)
    ]
    assert "first.0.ela.attn.Wv.weight" in found[0]
    same(*found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checkpoints", [True, False])
def test_nothing_is_left_when_outputs_are_gone(form, checkpoints):
    """No circle of references: the collector is off."""
    model = network(form)
    if checkpoints:
        model.run = checkpointed
    # What a process does once, imports among it, leaves frames in circles of their own.
    model(images()).sum().backward()
    seen = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: seen.append(weakref.ref(out)))
        for block in (*model.first, *model.second)
    ]
    gc.collect()
    gc.disable()
    try:
        for has_backward in (True, False):
            out = model(images())
            assert all(ref() is not None for ref in seen[-6:-1:3])
            if has_backward:
                out.sum().backward()
            del out
            assert [ref() for ref in seen] == [None] * len(seen)
        with torch.no_grad():
            model(images())
        assert [ref() for ref in seen] == [None] * len(seen)
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


def test_nothing_is_left_of_a_pass_that_raised():
    model, seen = network(), []

    def fails(*_):
        raise MemoryError

    model.first[0].register_forward_hook(lambda _m, _i, out: seen.append(weakref.ref(out)))
    model.first[1].bn.register_forward_hook(fails)
    with pytest.raises(MemoryError):
        model(images())
    gc.collect()  # of the error's frames
    assert [ref() for ref in seen] == [None]
    assert model.first[0].fused_place.stage._local.last is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operations_between", [True, False])
def test_nobody_takes_the_history_of_another_pass(form, operations_between):
    model = network(form, operations_between=operations_between)
    x, y = model.stem(images(2, 1)), model.stem(images(2, 2))
    mine = model.first[0](x).clone()
    model.first[1](model.first[0](y))
    with pytest.raises(
        RuntimeError, match=r"^first\.1: got 2 layers before it|^first\.1: got a map that"
    ):
        model.first[1](mine)
    with pytest.raises(RuntimeError, match=r"second\.1: got a map that does not carry"):
        model.second[1](torch.randn(2, 2 * DIM, 4, 4, dtype=torch.float64))
    model.second[0](model.stem(images()))
    with pytest.raises(RuntimeError, match=r"second\.2.*of its stage.*"):
        model.second[2](torch.randn(2, 2 * DIM, 4, 4, dtype=torch.float64))
    # A recomputation whose block is given another tensor, and would take what is there in its place.
    model.run = lambda block, x: checkpoint(lambda y: block(y.clone()), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"got a map (in a backward pass )?that does not carry"):
        model(images()).sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_recomputation_does_not_take_the_history_of_a_pass_after_it(form):
    model = network(form, operations_between=True)
    lost = model.first[1]
    model.run = lambda block, x: (
        checkpoint(lambda y: block(y.clone()), x, use_reentrant=False)
        if block is lost
        else block(x)
    )
    out = model(images())
    with torch.no_grad():
        model.first[0](model.stem(images(seed=1)))  # the last block that ran fits
    with pytest.raises(RuntimeError, match=r"^first\.1: got a map in a backward pass"):
        out.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_that_stopped_in_a_stage_leaves_nothing_behind(form):
    """For the next pass, in which a block is left out, or which is of another network that has the block."""
    model = network(form).eval()
    with torch.no_grad():
        x = model.first[0](model.stem(images()))
        seen = weakref.ref(x._ela_kernels_passed.history)
        for other in (torch.randn_like(x), x.clone(), x + 0):
            with pytest.raises(RuntimeError, match=r"^first\.1: got a map that does not carry"):
                model.first[1](other)
        del x
    gc.collect()
    assert seen() is None


def test_threads_do_not_see_each_other():
    model = network().eval()
    expected = [by_hand(model, images(2, seed)) for seed in range(4)]
    found, barrier = [None] * 4, threading.Barrier(4)

    def run(seed):
        def step(block, x):
            barrier.wait()  # all threads at the same block
            return block(x)

        x = model.stem(images(2, seed))
        for block in (*model.first, *model.second):
            x = step(block, x)
        found[seed] = model.head(x.mean((2, 3)))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(found, expected)
