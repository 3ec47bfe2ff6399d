"""Layers attached to the blocks of a network: the numbers of an explicit history, whoever calls the blocks."""

from __future__ import annotations

import copy
import io
import pickle

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
    checkpointed,
    gradients,
    images,
    layer_of,
    network,
    same,
)
from torch import distributed, multiprocessing, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ela_kernels as ek
from ela_kernels.integrations import attach, detach
from ela_kernels.integrations.attach import Attached
from ela_kernels.integrations.views import ChannelsLast, Tokens
from ela_kernels.ops.light_layer_attention.history import PreviousOutput


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_forward_written_by_hand(form, training):
    model = network(form).train(training)
    other = copy.deepcopy(model)
    out, expected = model(images()), by_hand(other, images())
    same(out, expected)
    same(gradients(model, out.square().sum()), gradients(other, expected.square().sum()))
    same(dict(model.named_buffers()), dict(other.named_buffers()))


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


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_sharded_and_replicated_networks_have_the_gradients_of_whole_ones(tmp_path):
    """FSDP exchanges the tensors that a block is given, in a recomputation too."""
    pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP2")
    multiprocessing.spawn(attached_process.run, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == []
