"""Pairs of skipped layers that nobody reads are not made; where somebody reads after all, they are what they were."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, batch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.ops.layer_attention import reuse

pytestmark = pytest.mark.usefixtures("no_graph_was_compiled")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that gave their pair without retrieving."""
    found: list[Any] = []

    def spy(method: str) -> None:
        real = getattr(ek.LayerHistory, method)

        def recorded(self: Any, *args: Any, caller: Any = None, **options: Any) -> Any:
            found.append(caller)
            return real(self, *args, caller=caller, **options)

        monkeypatch.setattr(ek.LayerHistory, method, recorded)

    for method in ("provide", "provide_layer", "reuse_and_provide"):
        spy(method)
    return found


def network(skipped: set[int], skip: str = "retrieval", depth: int = 5) -> Network:
    """In float64, after a pass that nobody skipped, so that the layers know each other."""
    torch.manual_seed(0)
    model = Network((depth,), skip=skip).double()
    model(batch().double())
    for i in skipped:
        model.layers[i].skipped = True
    return model


def through(model: Network, x: Tensor) -> tuple[Tensor, ek.LayerHistory]:
    history = ek.LayerHistory()
    for layer in model.layers:
        x = layer(x, history)
    return x, history


@pytest.mark.parametrize("skip", ["retrieval", "reuse"])
@pytest.mark.parametrize(
    ("skipped", "wanted"), [({4}, []), ({3, 4}, []), ({1, 4}, [1]), ({1, 2}, [1, 2])]
)
def test_what_nobody_reads_is_not_made(
    skip: str, skipped: set[int], wanted: list[int], made: list[Any]
) -> None:
    model, x = network(skipped, skip), batch().double()
    stranger = copy.deepcopy(model)  # it knows nothing of its layers
    want = stranger(x)
    assert len(made) == len(skipped)
    made.clear()
    out = model(x)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert made == [model.layers[i].attn for i in wanted]
    for m, y in ((model, out), (stranger, want)):
        m.zero_grad()
        y.sin().sum().backward()
    for a, b in zip(model.parameters(), stranger.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


READS = {
    "attend": lambda h, q, x: h.attend(q, q, x, heads=2),
    "keys": lambda h, q, x: torch.stack(h.keys).sum() + x.sum(),
    "values": lambda h, q, x: torch.stack(h.values),
    "latest": lambda h, q, x: torch.stack(h.latest.pairs.values),
    "probe": lambda h, q, x: h.probe(q, q, heads=2).weights,
    "layer": lambda h, q, x: _seeded()(x, h),
    "continued": lambda h, q, x: _seeded()(x, h.at(h.latest)),
}


def _seeded() -> ek.LayerAttention:
    torch.manual_seed(3)
    return ek.LayerAttention(CHANNELS, head_dim=8).double()


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("skip", ["retrieval", "reuse"])
def test_an_unexpected_reader_finds_all(skip: str, read: str, made: list[Any]) -> None:
    model, x = network({1, 3, 4}, skip), batch().double()
    stranger = copy.deepcopy(model)
    found = []
    for m in (stranger, model):
        made.clear()
        leaf = x.clone().requires_grad_()
        out, history = through(m, leaf)
        before = list(made)
        assert history.depth == 5
        assert history.position == 5
        result = READS[read](history, out.mean((2, 3)), out)
        assert history.position == (6 if read in ("attend", "layer", "continued") else 5)
        assert len(made) == 3
        wanted = [leaf, *m.parameters()]
        grads = [None] * len(wanted)
        if result.requires_grad:
            grads = torch.autograd.grad(result.sin().sum(), wanted, allow_unused=True)
        found.append((result, *grads))
    assert before == [model.layers[1].attn]  # the others waited
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_it_is_made_as_it_would_have_been(made: list[Any]) -> None:
    """In the grad mode and the autocast of its layer, not of the one that reads."""
    for has_grad, dtype in ((False, torch.bfloat16), (True, torch.float16)):
        model, x = network({4}).float(), batch()
        made.clear()
        with torch.set_grad_enabled(has_grad), torch.autocast("cpu", dtype):
            _, history = through(model, x)
        assert not made
        with torch.set_grad_enabled(not has_grad):
            keys, values = history.keys, history.values
        assert len(made) == 1
        assert {t.dtype for t in (*keys, *values)} == {dtype}
        assert [v.requires_grad for v in values] == [has_grad] * 5


def _input(x: Tensor, layer: ek.ELA) -> None:
    x.mul_(2.0)


def _step(x: Tensor, layer: ek.ELA) -> None:
    layer.attn.Wv.weight.mul_(2.0)


def _exchanged(x: Tensor, layer: ek.ELA) -> None:
    layer.attn.Wk.weight = torch.nn.Parameter(torch.ones_like(layer.attn.Wk.weight))


@pytest.mark.parametrize("change", [_input, _step, _exchanged])
def test_what_a_pair_is_made_of_must_stay(change: Any) -> None:
    """And a program that catches the error finds the history as it was."""
    model, x = network({3, 4}), batch().double()
    history = ek.LayerHistory()
    with torch.no_grad():
        for layer in model.layers:
            before, x = x, layer(x, history)
        change(before, model.layers[4])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="after its input or a filter was changed; all"):
                history.values  # noqa: B018
            assert (history.depth, history.position) == (5, 5)


def test_given_parameters_are_those_that_serve() -> None:
    """`functional_call` lends a layer others, for that call alone."""
    model, x = network({4}), batch().double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    want = through(other, x)[1].values
    history = ek.LayerHistory()
    with torch.no_grad():
        for layer, given in zip(model.layers, other.layers, strict=True):
            x = torch.func.functional_call(layer, dict(given.named_parameters()), (x, history))
    with pytest.raises(RuntimeError, match="a filter was changed"):
        history.values  # noqa: B018
    assert len(want) == 5


def test_branches_wait_apart() -> None:
    model, x = network({3, 4}), batch().double()
    history = ek.LayerHistory()
    for layer in model.layers[:3]:
        x = layer(x, history)
    left = history.latest
    y = model.layers[3](x, history)
    other = history.at(left)
    assert (history.depth, other.depth) == (4, 3)
    model.layers[4](y, history)
    assert (history.depth, other.depth) == (5, 3)
    twin = copy.copy(history)
    model.layers[4](y, twin)
    assert (len(history.keys), len(other.keys), len(twin.values)) == (5, 3, 6)


def test_a_second_pass_is_refused() -> None:
    model, x = network({3, 4}), batch().double()
    history = ek.LayerHistory()
    for layer in model.layers:
        layer(x, history)

    def again() -> None:
        for layer in model.layers:
            layer(x, history)

    with pytest.raises(ValueError, match="got a second forward pass"):
        again()
    history = ek.LayerHistory()
    for _ in range(3):  # one layer, again and again, with reads between
        model.layers[4](x, history)
        assert len(history.latest.pairs.keys) == history.depth
    assert history.depth == 3


@pytest.mark.parametrize("read", ["keys", "latest"])
def test_who_reads_is_known_from_then_on(read: str) -> None:
    """And to prune."""
    model, x = network({4}), batch().double()
    with torch.no_grad():
        history = through(model, x)[1]
        want = torch.stack(history.values if read == "keys" else history.latest.pairs.values)
        ek.prune(model)
        assert torch.equal(torch.stack(through(model, x)[1].values), want)


def test_a_read_in_a_backward_pass_is_refused() -> None:
    """There nothing can be made any more that the pass would know of."""
    model, x = network({4}), batch().double().requires_grad_()
    out, history = through(model, x)
    out.register_hook(lambda _: history.values and None)
    with pytest.raises(
        RuntimeError, match="read in a backward pass of the keys and values of skip"
    ):
        out.sum().backward()


@pytest.mark.parametrize(
    "way", ["checkpoint", "inference", "hooks", "own hooks", "subclass", "compiled"]
)
def test_where_it_is_made_at_once(way: str, made: list[Any]) -> None:
    model, x = network({4}), batch().double()
    last = model.layers[4]
    if way == "checkpoint":
        model.wrap = partial(checkpoint, use_reentrant=False)
    elif way == "own hooks":
        last.register_forward_hook(lambda *_: None)
    elif way == "hooks":
        last.attn.Wv.register_forward_hook(lambda *_: None)
    elif way == "subclass":
        last.attn.__class__ = type("Other", (ek.LayerAttention,), {})
    elif way == "compiled":
        torch._dynamo.reset()
        torch.compile(model, backend="eager")(x)
        made.clear()
    with torch.inference_mode(way == "inference"):
        model(x)
    assert made == [last.attn]


@pytest.mark.parametrize("skip", ["retrieval", "reuse"])
def test_a_pair_may_be_made_inside_a_checkpoint(skip: str) -> None:
    """Of a layer outside of it; the recomputation finds it made."""
    found = []
    for wrapped in (False, True):
        torch.manual_seed(4)
        model, x = network({1, 2, 3, 4}, skip), batch().double().requires_grad_()
        x = torch.ones_like(x).mul(torch.arange(25).view(5, 5).cos()).requires_grad_()
        history = ek.LayerHistory()
        y = x
        for i, layer in enumerate(model.layers):
            is_wrapped = wrapped and i in (2, 4)
            call: Any = partial(checkpoint, layer, use_reentrant=False) if is_wrapped else layer
            y = call(y, history)
        (y.sin().sum() + torch.stack(history.values).sum()).backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def copied(layer: ek.ELA) -> Any:
    """As `torch.nn.parallel.replicate` makes one."""
    replica: Any = layer._replicate_for_data_parallel()
    replica._parameters, replica._buffers = layer._parameters, layer._buffers
    replica._modules = dict(layer._modules)
    return replica


@pytest.mark.parametrize("skip", ["retrieval", "reuse"])
def test_replicas_know_nothing_of_each_other(skip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share what was learnt of layers that are gone by now, and take the same way every time."""

    def another_way(*_: Any) -> None:
        raise AssertionError("a pair waits, or a retrieval is made again")

    model, x = Network((5,), skip=skip).double(), batch().double()  # has never run itself
    for i in (1, 3):
        model.layers[i].skipped = True
    want = through(copy.deepcopy(model), x)[0]
    monkeypatch.setattr(ek.LayerHistory, "defer", another_way)
    monkeypatch.setattr(reuse, "_retrieved_again", another_way)
    for _ in range(3):
        twin, y = [copied(layer) for layer in model.layers], x
        history = ek.LayerHistory()
        for layer in twin:
            y = layer(y, history)
        assert torch.equal(y, want)
        del layer, twin


def test_an_input_that_does_not_fit_is_told_at_once() -> None:
    model, x = network({4}), batch().double()
    history = ek.LayerHistory()
    for layer in model.layers[:4]:
        x = layer(x, history)
    with pytest.raises(ValueError, match=r"v: got shape \[2, 16, 2, 2\]"):
        model.layers[4](x[..., :2, :2], history)
    with pytest.raises(TypeError, match=r"x: got dtype torch.float32"):
        model.layers[4](x.float(), history)


def test_probes_see_the_same() -> None:
    model, x = network({3, 4}), batch().double()
    stranger = copy.deepcopy(model)
    seen = []
    for m in (model, stranger):
        for layer in m.layers:
            layer.watched = True
        m.layers[4].probe_next = True
        m(x)
        seen.append(m.layers[4].observations[0])
    torch.testing.assert_close(*seen, rtol=0, atol=0)
