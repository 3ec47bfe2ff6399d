"""Layers attached to the blocks of a network: the numbers of an explicit history, whoever calls the blocks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from support import attached_process
from support.attached_networks import (
    DIM,
    FORMS,
    STAGES,
    Block,
    Network,
    by_hand,
    gradients,
    images,
    layer_of,
    network,
)
from torch import distributed, multiprocessing, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ela_kernels as ek
from ela_kernels.integrations import attach, detach
from ela_kernels.integrations.attach import Attached
from ela_kernels.integrations.views import ChannelsLast, Tokens
from ela_kernels.models.blocks import MRLA
from ela_kernels.ops.light_layer_attention.history import PreviousOutput


def same(a, b):
    # float64, a few additions in another order: 1e-11 relative to numbers near 1 is far above their rounding, and far
    # below what a missing layer would change.
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def checkpointed(block, x):
    return checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_forward_written_by_hand(form, training):
    model = network(form).train(training)
    other = copy.deepcopy(model)
    out, expected = model(images()), by_hand(other, images())
    same(out, expected)
    same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))
    same(dict(model.named_buffers()), dict(other.named_buffers()))


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


def test_names_weights_and_classes_stay():
    torch.manual_seed(3)
    plain = Network().double()
    model = network()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".ela." in name for name in missing)
    assert isinstance(model.first[0], Block)
    assert type(model.first[0]).__name__ == "AttachedBlock"
    detach(model)
    assert type(model.first[0]) is Block
    assert list(model.state_dict()) == list(plain.state_dict())
    same(model(images()), plain(images()))
    assert not vars(model.first[0]).keys() - vars(plain.first[0]).keys()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(way):
    model = network().eval()
    model(images())
    if way == "deepcopy":
        made = copy.deepcopy(model)
    elif way == "state_dict":
        made = network().eval()
        made.load_state_dict(model.state_dict())
    else:
        model.run = nn.Module.__call__  # a lambda cannot be pickled
        if way == "pickle":
            made = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            made = torch.load(file, weights_only=False)
    same(made(images()), model(images()))
    stages = {
        id(block.fused_place.stage) for block in made.modules() if isinstance(block, Attached)
    }
    assert len(stages) == 2
    assert not stages & {
        id(block.fused_place.stage) for block in model.modules() if isinstance(block, Attached)
    }


def test_a_map_that_is_copied_or_saved_carries_nothing():
    model = network().eval()
    with torch.no_grad():
        x = model.first[0](model.stem(images()))
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(x)):
        same(other, x)
        model.first[0](model.stem(images(seed=1)))
        model.first[1].fused_place.stage._local.last = None
        with pytest.raises(RuntimeError, match=r"first\.1: got a map that does not carry"):
            model.first[1](other)


def test_hooks_that_exchange_tensors():
    """As FSDP's do, before a block runs and after it: also where a checkpoint recomputes."""
    model = network()
    other = copy.deepcopy(model)
    for block in (model.first[1], model.second[2]):
        block.register_forward_pre_hook(lambda _m, args: (args[0] * 1.0,))
    for block in (model.first[0], model.second[1]):
        block.register_forward_hook(lambda _m, _i, out: out * 1.0)
    for run in (checkpointed, lambda block, x: block(x)):
        model.run = run
        out, expected = model(images()), by_hand(other, images())
        same(out, expected)
        same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))


@pytest.mark.parametrize("form", FORMS)
def test_something_stands_between_the_blocks(form):
    """It gives a tensor that carries nothing: the history of the thread's last block serves, if that is said."""
    strict = network(form)
    strict.run = lambda block, x: block(x.clone())
    with pytest.raises(RuntimeError, match=r"first\.1: got a map that.*operations_between=True"):
        strict(images())
    model = network(form, operations_between=True)
    model.run = lambda block, x: block(x.clone())
    other = copy.deepcopy(model)
    out, expected = model(images()), by_hand(other, images())
    same(out, expected)
    same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))


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


def test_blocks_that_are_compiled_one_by_one_are_refused():
    model = network().eval()
    for i, block in enumerate(model.first):
        model.first[i] = torch.compile(block, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match=r"compile the whole model or stage, not|blocks before it"
    ):
        model(images())
    torch._dynamo.reset()


def test_blocks_out_of_order_and_missing():
    model = network()
    x = model.first[0](model.stem(images()))
    with pytest.raises(
        RuntimeError, match=r"^first\.2: got 1 layers before it .*; allowed is 2: the bl"
    ):
        model.first[2](x)
    # It is left as it was.
    model.eval()
    same(model(images()), by_hand(model, images()))


@pytest.mark.parametrize("form", FORMS)
def test_maps_of_several_sizes_in_a_stage(form):
    model = Network()
    attach(model, [["first.2", "second.0", "second.1"]], lambda name: layer_of(form, DIM))
    with pytest.raises(
        ValueError, match=r"^second\.0: got a map \[2, 16, 4, 4\], after first\.2 gave"
    ):
        model(images().float())


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


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_layer_after_every_nth_block(every):
    model = network(every=every)
    has = [hasattr(block, "ela") for block in (*model.first, *model.second)]
    assert has == [(i % 3 + 1) % every == 0 for i in range(6)]
    other = copy.deepcopy(model)
    for run in (checkpointed, lambda block, x: block(x)):
        model.run = run
        out, expected = model(images()), by_hand(other, images())
        same(out, expected)
        same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))
    assert len(detach(model).state_dict()) == len(Network().state_dict())


@pytest.mark.parametrize("form", ["ela", "mrla"])
@pytest.mark.parametrize("recompute", [True, False])
def test_options_of_the_history(form, recompute):
    model = network(form, tolerance=0.45, history_dtype=torch.bfloat16)
    other = copy.deepcopy(model)
    if recompute:
        model.run = checkpointed
    out = model(images())
    expected = by_hand(other, images(), tolerance=0.45, dtype=torch.bfloat16)
    same(out, expected)
    same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))
    for options in ({"tolerance": 0.45}, {"dtype": torch.bfloat16}):
        assert not torch.allclose(by_hand(other, images(), **options), expected)


class Mixing(nn.Module):
    """A block of maps `[B, H, W, C]`, or of tokens `[B, N, C]`, of which each is worked on by itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x, scale=1.0):
        return x + scale * torch.tanh(self.linear(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", [None, 0, 2])
@pytest.mark.parametrize("recompute", [True, False])
def test_tokens_and_maps_in_another_order(form, prefix, recompute):
    """`prefix`: tokens before those of the map; None for maps `[B, H, W, C]`."""
    torch.manual_seed(3)
    model = nn.ModuleList(Mixing() for _ in range(3)).double()
    view = ChannelsLast() if prefix is None else Tokens((4, 3), prefix)
    attach(model, [list("012")], lambda name: layer_of(form, DIM), view=view)
    other = copy.deepcopy(model)
    shape = (2, 4, 3, DIM) if prefix is None else (2, 12 + prefix, DIM)
    x = y = torch.randn(shape, dtype=torch.float64)
    history = PreviousOutput() if form == "mrla_light" else ek.LayerHistory()
    for i, (block, alike) in enumerate(zip(model, other, strict=True)):
        options = {"scale": 1.0 + i}  # what else a block is called with
        if recompute:
            x = checkpoint(block, x, use_reentrant=False, **options)
        else:
            x = block(x, **options)
        y = Mixing.forward(alike, y, **options)
        first, rest = y[:, :prefix], y if prefix is None else y[:, prefix:]
        maps = rest.reshape(2, 4, 3, DIM).movedim(-1, 1).contiguous()
        rest = alike.ela(maps, history).movedim(1, -1)
        y = rest if prefix is None else torch.cat((first, rest.reshape(2, 12, DIM)), 1)
    same(x, y)
    same(gradients(model, x.square().sum()), gradients(other, y.square().sum()))


def test_what_is_no_map_is_refused_by_name():
    def refused(view, x, block=None):
        model = nn.Sequential(nn.Identity() if block is None else block)
        attach(model, [["0"]], lambda name: layer_of("ela", DIM), view=view)
        with pytest.raises((TypeError, ValueError)) as caught:
            model(x)
        return str(caught.value)

    x = torch.randn(1, DIM, 4, 3)
    assert refused(None, x[0]).startswith(
        "0: got an output of shape [8, 4, 3]; allowed is [B, C, H,"
    )
    assert refused(ChannelsLast(), x[0]).endswith("allowed is [B, H, W, C]")
    assert refused(Tokens("square"), x).endswith("allowed is [B, N, C]")
    assert refused(Tokens((2, 3)), x[0]).startswith(
        "0: got 4 tokens of a map, beside 0 others; allo"
    )
    assert refused(Tokens("square", 2), x[0]).startswith(
        "0: got 2 tokens of a map, beside 2 others,"
    )
    assert refused(Tokens("square", 9), x[0]).startswith("0: got -5 tokens")

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    assert refused(None, x, Two()).startswith(
        "0: got an output that is a tuple; allowed is a torch.T"
    )
    for grid in ("round", (3,), (3, 0), 3):
        with pytest.raises(ValueError, match=r"^grid: got .*; allowed are 'square' and \(H, W\)"):
            Tokens(grid)
    with pytest.raises(ValueError, match=r"^prefix: got -1"):
        Tokens("square", -1)


def test_a_block_without_a_layer_between_others_passes_the_history_on():
    torch.manual_seed(3)
    model = nn.Sequential(*(Block(DIM, DIM) for _ in range(5))).double()
    attach(model, [list("01234")], lambda name: layer_of("ela", DIM), every=2)
    assert [type(block) is Block for block in model] == [True, False, False, False, True]
    model = model.double()
    x, history = images(2, 1).repeat(1, 3, 1, 1)[:, :DIM], ek.LayerHistory()
    expected = x
    for block in copy.deepcopy(model):
        expected = Block.forward(block, expected)
        expected = block.ela(expected, history) if hasattr(block, "ela") else expected
    out = checkpoint_sequential(model, 5, x, use_reentrant=False)
    same(out, expected)
    gradients(model, out.sum())


@pytest.mark.parametrize(
    ("form", "training"), [("ela", True), ("mrla", False), ("mrla_light", False)]
)
def test_in_a_compiled_graph(form, training):
    model = network(form).float().train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images().float()
    for _ in range(2):
        out, expected = compiled(x), other(x)
        # float32: sums over some hundred numbers, in another order.
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
        found = gradients(model, out.square().sum()), gradients(other, expected.square().sum())
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_graph_without_the_first_blocks_is_refused():
    model = network().eval()
    x = model.first[0](model.stem(images()))
    compiled = torch.compile(model.first[1], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compiled without the blocks before it"):
        compiled(x)


def test_explain_analyze_ebqm_and_prune_find_the_layers():
    model = network().float()
    x = images().float()
    names = [f"{name}.ela.attn" for names in STAGES for name in names]
    assert [found.name for found in ek.explain(model, x)] == names
    found = ek.analyze(model, [x, x])
    assert [(row.name, row.stage, row.place) for row in found.layers] == [
        (f"{name}.ela", stage, place)
        for stage, names in enumerate(STAGES)
        for place, name in enumerate(names)
    ]
    assert [len(row.weights) for row in found.layers] == [1, 2, 3] * 2
    assert not found.left
    monitor = ek.EBQM(model, warmup=1, high=0.9)
    for _ in range(3):
        model(x).square().sum().backward()
        monitor.step()
    for layer in (model.first[2].ela, model.second[1].ela):
        layer.skipped = True
    model.eval()
    before = model(x)
    ek.prune(model)
    assert model.first[2].ela.pruned
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stages": []}, "stages: got no block"),
        ({"stages": ["first.0"]}, "stages: got 'first.0' in it; allowed is a sequence of names"),
        ({"stages": [["first.9"]]}, "stages: got 'first.9'; allowed are names of modules"),
        ({"stages": [["first.0"], ["first.0"]]}, "stages: got 'first.0', which is there twice"),
        ({"stages": [["first", "first.0"]]}, "stages: got 'first.0', which is inside of 'first'"),
        ({"every": 0}, "every: got 0; allowed is a positive int"),
        ({"every": 4}, "every: got 4, for stages of at most 3 blocks; allowed is an int of 1 to 3"),
        ({"every": 1.5}, "every: got float"),
        ({"make_layer": lambda name: nn.Identity()}, "make_layer: got Identity for first.0"),
        (
            {"make_layer": None},
            "make_layer: got NoneType; allowed is a function that is called with",
        ),
        ({"make_layer": ek.ELA(8, 8)}, "make_layer: got a layer, ELA, where each block has one of"),
        (
            {"make_layer": ek.ELA},
            "make_layer: got the class ELA, which takes no name; allowed is a",
        ),
        ({"make_layer": MRLA}, "make_layer: got the class MRLA, which takes no name; allowed is a"),
        ({"make_layer": partial(ek.ELA, head_dim=8)}, "make_layer: got the class ELA, which takes"),
        ({"make_layer": lambda: ek.ELA(DIM)}, "make_layer: got one that takes (), and not one ar"),
        ({"make_layer": lambda a, b: ek.ELA(DIM)}, "make_layer: got one that takes (a, b), and no"),
        (
            {"view": "tokens"},
            "view: got str; allowed is None or an object of ela_kernels.integrations.",
        ),
        ({"view": ChannelsLast}, "view: got the class ChannelsLast; allowed is None or an object"),
        ({"view": ek.ELA}, "view: got type; allowed is None or an object"),
        ({"tolerance": 2.0}, "tolerance: got 2.0"),
        ({"history_dtype": torch.int64}, "history_dtype: got torch.int64"),
        (
            {"make_layer": lambda name: layer_of("mrla_light", DIM), "tolerance": 0.1},
            "history_dtype, tolerance: got one for layers of the light form",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, sentence):
    model = Network()
    given = {"stages": STAGES, "make_layer": lambda name: layer_of("ela", DIM), **options}
    with pytest.raises((TypeError, ValueError)) as caught:
        attach(model, **given)
    assert str(caught.value).startswith(sentence)
    assert not any(isinstance(m, (Attached, ek.ELA)) for m in model.modules())


def test_what_takes_a_name_may_be_a_class_of_the_callers():
    class Own(ek.ELA):
        def __init__(self, name: str) -> None:
            super().__init__(DIM, 8)

    model = attach(Network(), STAGES[:1], Own)
    assert type(model.first[0].ela) is Own
    attach(detach(model), STAGES[:1], partial(lambda dim, name: ek.ELA(dim, 8), DIM))
    assert type(model.first[0].ela) is ek.ELA


def test_torch_fx_is_told_the_other_way():
    with pytest.raises(
        TypeError, match=r"^first\.0: got .*fx\.Proxy; allowed .*torch\.export\.export"
    ):
        torch.fx.symbolic_trace(network())


def test_a_block_that_cannot_have_a_layer_is_refused_by_name():
    model = Network()
    model.first[1].ela = nn.Identity()
    with pytest.raises(ValueError, match=r"'first\.1', a Block with an attribute 'ela' of its own"):
        attach(model, STAGES, lambda name: layer_of("ela", DIM))
    model = Network()
    model.first[1].forward = model.first[1].forward
    with pytest.raises(ValueError, match=r"'first\.1', which has a forward of its own"):
        attach(model, STAGES, lambda name: layer_of("ela", DIM))


@pytest.mark.parametrize(
    "kind", [nn.ModuleList, type("Own", (nn.Sequential,), {"forward": Block.forward})]
)
def test_a_container_that_would_call_the_layer_is_refused_by_name(kind):
    model = nn.Sequential(kind())
    with pytest.raises(ValueError, match=r"^stages: got '0', a \w+, a container that would take"):
        attach(model, [["0"]], lambda name: layer_of("ela", DIM))


def test_blocks_that_are_sequentials():
    torch.manual_seed(3)
    parts = [[nn.Conv2d(DIM, DIM, 3, padding=1), nn.ReLU()] for _ in range(3)]
    model = nn.Sequential(*(nn.Sequential(*some, some[0]) for some in parts))
    attach(model, [list("012")], lambda name: layer_of("ela", DIM))
    x = torch.randn(2, DIM, 5, 5)
    expected, history = x, ek.LayerHistory()
    for (conv, act), block in zip(parts, model, strict=True):
        expected = block.ela(conv(act(conv(expected))), history)
    torch.testing.assert_close(model(x), expected)
    plain = x
    for conv, act in parts:
        plain = conv(act(conv(plain)))
    assert torch.equal(detach(model)(x), plain)
    assert [len(block) for block in model] == [3, 3, 3]


def test_a_second_time_is_refused():
    model = network()
    with pytest.raises(
        ValueError, match=r"^model: got Network with layers already, at first\.0, fir"
    ):
        attach(model, STAGES, lambda name: layer_of("ela", DIM))
    with pytest.raises(TypeError, match="model: got int"):
        detach(3)
    attach(detach(model), STAGES, lambda name: layer_of("mrla", 2 * DIM if "sec" in name else DIM))
    model.double()(images())


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_sharded_and_replicated_networks_have_the_gradients_of_whole_ones(tmp_path):
    """FSDP exchanges the tensors that a block is given, in a recomputation too."""
    pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP2")
    multiprocessing.spawn(attached_process.run, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == []
