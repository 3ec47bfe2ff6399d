"""Attached layers: what does not fit, and is refused by name."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
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
    same,
)
from torch import nn

import ela_kernels as ek
from ela_kernels.integrations import attach, detach
from ela_kernels.integrations.attach import Attached
from ela_kernels.integrations.views import ChannelsLast, Tokens
from ela_kernels.models.blocks import MRLA


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


def test_a_graph_without_the_first_blocks_is_refused():
    model = network().eval()
    x = model.first[0](model.stem(images()))
    compiled = torch.compile(model.first[1], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compiled without the blocks before it"):
        compiled(x)


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
