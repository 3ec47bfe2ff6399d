"""Layers skipped by taking over the last retrieval before them: against PyTorch by hand, and what is around them."""

from __future__ import annotations

import copy
import itertools
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ela_models import CHANNELS, Network, batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

FORMS = (torch.contiguous_format, torch.channels_last)
BACKENDS = ("eager", "auto")


def network(pattern: str, **options: Any) -> Network:
    """In float64, a layer for each mark; 1 where it is skipped."""
    torch.manual_seed(len(pattern))
    found = Network((len(pattern),), skip="reuse", **options).double()
    for layer, mark in zip(found.layers, pattern, strict=True):
        layer.skipped = mark == "1"
        if isinstance(layer.norm, nn.BatchNorm2d):
            nn.init.normal_(layer.norm.weight, 1.0, 0.5)
            nn.init.normal_(layer.norm.bias)
            nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    return found


def images(count: int = 4, form: Any = FORMS[0]) -> Tensor:
    return batch(count).double().contiguous(memory_format=form)


def by_hand(model: Network, x: Tensor) -> Tensor:
    """As the docstring of `ELA` has it."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    o = None
    for layer in model.layers:
        y = x.mean((2, 3)).unsqueeze(1)
        query, key = (
            F.conv1d(y, w.weight, padding=w.weight.shape[-1] // 2).squeeze(1) if w else None
            for w in (layer.attn.Wq, layer.attn.Wk)
        )
        if not layer.skipped or layer.provides:
            keys.append(key)
            values.append(layer.attn.Wv(x))
        if not layer.skipped:
            with ek.use_backend("eager"):
                o = ek.layer_attention(query, keys, values, heads=layer.attn.heads).out
        if o is not None:
            x = x + F.relu(layer.norm(o))
    return x


def found_by(model: Network, x: Tensor, run: Any) -> list[Tensor]:
    """Output, gradients and buffers of the second step: the layers know each other by then."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    for _ in range(2):
        out = run(model, x)
    wanted = [x, *model.parameters()]
    grads = torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True)
    zeros = (torch.zeros_like(t) for t in wanted)
    grads = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
    return [out.detach(), *grads, *model.buffers()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("provides", [True, False])
@pytest.mark.parametrize("pattern", ["0110", "0111", "01011", "1001"])
def test_against_pytorch_by_hand(pattern, provides, training, backend):
    model = network(pattern, provides=provides).train(training)
    for form in FORMS:
        x = images(form=form)
        want = found_by(model, x, by_hand)
        with ek.use_backend(backend):
            got = found_by(model, x, lambda model, x: model(x))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_it_is_exact_where_a_layer_would_retrieve_the_same():
    """Without a pair of its own, and with the same query, a layer would find what the one before found."""
    model = network("00").eval()
    first, second = model.layers
    history, x = ek.LayerHistory(), images()
    y = first(x, history)
    second.skipped, second.provides = True, False
    out = second(y, history)
    q = first.attn.query_key(x)[0]
    o = ek.layer_attention(q, history.keys, history.values, heads=first.attn.heads).out
    torch.testing.assert_close(out, y + F.relu(second.norm(o)))


def test_the_divergence_bounds_what_it_changes():
    """`|o - o'| <= 2 sqrt(1 - exp(-kl)) max |v|`, by a head's divergence, of every head and position."""
    layers = [ek.LayerAttention(CHANNELS, head_dim=8).double() for _ in range(5)]
    history, x, before = ek.LayerHistory(), images(), None
    for layer in layers:
        o = layer(x, history)
        if before is not None:
            head = (o - before).abs().unflatten(1, (layer.heads, -1)).amax((2, 3, 4))
            most = torch.stack(history.values).abs().unflatten(2, (layer.heads, -1))
            bound = 2 * (-torch.expm1(-history.kl)).sqrt() * most.amax((0, 3, 4, 5))
            assert (head <= bound).all()
            assert (head > 0.01 * bound).any()  # it says something
        before, x = o, x + o


def test_with_nothing_retrieved_before_it_the_input_passes_on():
    for provides in (True, False):
        model, x = network("100", provides=provides), images()
        history = ek.LayerHistory()
        assert torch.equal(model.layers[0](x, history), x)
        assert history.depth == provides
        assert model(x).shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip", ["reuse", "retrieval"])
def test_what_nobody_kept_is_made_again(backend, skip):
    """The layers knew others. It is the follower's skip mode that counts, not the layer's own."""
    model, x = network("010"), images()
    model.layers[0].skip = skip
    want = found_by(model, x, lambda model, x: model(x))

    def run(model: Network, x: Tensor) -> Tensor:
        first, _, last = model.layers
        readers = first.readers
        readers.learnt, readers.varies, readers.follower = True, False, weakref.ref(last)
        assert not first.hands_on()
        return model(x)

    with ek.use_backend(backend):
        got = found_by(model, x, run)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_layer_of_attention_alone_counts_as_a_retrieval():
    """Nobody asked it to keep what it retrieved."""
    torch.manual_seed(0)
    alone, layer = ek.LayerAttention(CHANNELS, head_dim=8), ek.ELA(CHANNELS, 8, skip="reuse")
    layer.skipped = True
    for backend in BACKENDS:
        with ek.use_backend(backend):
            x, history = batch(), ek.LayerHistory()
            o = alone(x, history)
            torch.testing.assert_close(layer(x, history), x + F.relu(layer.norm(o)))


@pytest.mark.parametrize("own", ["hook", "class"])
@pytest.mark.parametrize("skip", ["reuse", "retrieval"])
def test_what_a_hook_or_a_class_of_its_own_made_is_taken_over(own, skip):
    """Whether or not the layers know each other."""

    class Doubled(ek.LayerAttention):
        def forward(self, *args: Any, **options: Any) -> Tensor:
            return 2 * super().forward(*args, **options)

    model, x = network("01"), images()
    first, second = model.layers
    first.skip = skip
    if own == "hook":
        first.attn.register_forward_hook(lambda _, __, out: 2 * out)
    else:
        first.attn.__class__ = Doubled
    for _ in range(2):
        history = ek.LayerHistory()
        y = first(x, history)
        o = 2 * torch.stack(history.values)[0]  # of a first layer, its own value
        torch.testing.assert_close(second(y, history), y + F.relu(second.norm(o)))
        first.readers.follower = None


def test_what_is_taken_over_is_not_changed_in_place():
    """An activation in place, after a norm that gives what it was given."""
    options = {"norm_layer": lambda dim: nn.Identity()}
    model, x = network("0110", **options), images()
    twin = copy.deepcopy(model)
    for layer in twin.layers:
        layer.act = nn.ReLU()
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_nor_where_no_versions_are_kept(mode):
    options = {"norm_layer": lambda dim: nn.Identity(), "act_layer": lambda: nn.ELU(inplace=True)}
    model, x = network("011", **options), images()
    twin = copy.deepcopy(model)
    for layer in twin.layers:
        layer.act = nn.ELU()
    with mode():
        torch.testing.assert_close(model(x), twin(x))


def test_after_compiled_layers_that_were_all_skipped():
    torch._dynamo.reset()
    model, x = network("110"), images()
    model.layers[0].compile(backend="eager")
    for provides in (True, False):
        model.layers[1].provides = provides
        history = ek.LayerHistory()
        y = model.layers[0](x, history)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(model.layers[1](y, history), x)


def test_other_shapes_are_refused():
    model = network("01", provides=False)
    history = ek.LayerHistory()
    model.layers[0](images(), history)
    with pytest.raises(
        ValueError, match=r"x: got shape \[4, 16, 2, 2\]; allowed is that of the ret"
    ):
        model.layers[1](images()[..., :2, :2], history)


def test_the_last_layer_keeps_nothing():
    """In evaluation what is kept is memory that the output would take otherwise."""
    model = network("0100").eval()
    assert [layer.hands_on() for layer in model.layers] == [True] * 4  # not known yet
    model(images())
    assert [layer.hands_on() for layer in model.layers] == [True, False, False, False]
    model.layers[2].skipped = True
    assert [layer.hands_on() for layer in model.layers] == [True, True, False, False]
    model.layers[1].skip = model.layers[2].skip = "layer"
    assert not model.layers[0].hands_on()
    model.layers[3].skipped = True
    assert model.layers[0].hands_on()
    twice, x = network("000"), images()  # others follow when it comes again
    history = ek.LayerHistory()
    for i in (0, 1, 0, 2):
        x = twice.layers[i](x, history)
    del history
    assert [layer.hands_on() for layer in twice.layers] == [True, False, False]
    model.layers[0].skip = "retrieval"  # its own does not matter
    assert model.layers[0].hands_on()
    model.layers[3].skip = "retrieval"
    model.layers[3].readers.follower = weakref.ref(model.layers[1])  # a circle
    assert not model.layers[0].hands_on()


@pytest.mark.parametrize("provides", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints(provides, backend):
    plain = network("01101", provides=provides)
    wrapped = copy.deepcopy(plain)
    wrapped.wrap = partial(checkpoint, use_reentrant=False)
    x = images()
    with ek.use_backend(backend):
        found = [found_by(m.eval(), x, lambda m, x: m(x)) for m in (plain, wrapped)]
        found += [found_by(m.train(), x, lambda m, x: m(x)) for m in (plain, wrapped)]
    statistics = {i for i, _ in enumerate(plain.buffers())}  # of the batch, taken twice
    for direct, recomputed in (found[:2], found[2:]):
        for a, b in list(zip(direct, recomputed, strict=True))[: -len(statistics)]:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("provides", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(provides, dtype):
    model, x = network("0110", provides=provides).float(), images().float()
    outs = []
    for backend in BACKENDS:
        with ek.use_backend(backend), torch.autocast("cpu", dtype):
            outs.append(copy.deepcopy(model)(x))
    exact = copy.deepcopy(model).double()(x.double())
    error, theirs = ((out.double() - exact).norm() for out in reversed(outs))
    assert outs[0].dtype == outs[1].dtype
    assert error <= 2 * theirs


@pytest.mark.parametrize("provides", [True, False])
def test_decisions_as_data(provides):
    """In a compiled graph: every set of decisions, also with nothing retrieved yet."""
    torch._dynamo.reset()
    model, x = network("000", provides=provides), images().requires_grad_()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for skip in itertools.product((False, True), repeat=3):
        found = []
        for m, call in ((model, compiled), (twin, twin)):
            for layer, is_skipped in zip(m.layers, skip, strict=True):
                layer.skipped = is_skipped
            out = call(x)
            wanted = [x, *m.parameters()]
            grads = torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True)
            zeros = (torch.zeros_like(t) for t in wanted)
            grads = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
            found.append([out, *grads, *m.buffers()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_pruned():
    for provides in (True, False):
        model, x = network("01101", provides=provides).eval(), images()
        want = model(x)
        pruned = ek.prune(copy.deepcopy(model))
        assert torch.equal(ek.prune(model)(x), want)
        assert torch.equal(pruned(x), want)
        last, middle = model.layers[4], model.layers[1]
        assert last.attn is None
        assert last.norm is not None
        assert (middle.attn is not None) == provides
        fresh = network("00000").eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), want)
        assert [layer.provides for layer in fresh.layers] == [provides] * 5


def test_explained():
    model = network("0110").float().eval()
    found = [(e.name, e.form) for e in ek.explain(model, batch())]
    names = ["stages.0.0.attn", "stages.0.1", "stages.0.2", "stages.0.3.attn"]
    assert found == list(zip(names, ("block", "reuse", "reuse", "block"), strict=True))
    model.layers[1].norm.register_forward_hook(lambda *_: None)
    found = ek.explain(model, batch())
    assert [(e.form, e.backend) for e in found if e.name == "stages.0.1"] == [
        ("reuse by pieces", "eager")
    ]
    assert [e.form for e in found if e.name == "stages.0.1.attn"] == ["pair"]
    assert "has hooks" in str(found)


def test_provides_is_checked_and_kept():
    assert ek.ELA(8, 4).provides
    assert not ek.ELA(8, 4, skip="layer").provides
    layer = ek.ELA(8, 4, skip="reuse", provides=False)
    layer.skipped = True
    other = ek.ELA(8, 4)
    other.load_state_dict(layer.state_dict())
    assert (other.skip, other.provides, other.skipped) == ("reuse", False, True)
    other.skip = "reuse"  # nothing new
    assert not other.provides
    other.skip = "retrieval"
    assert other.provides
    with pytest.raises(
        ValueError, match=r"provides: got False for skip='retrieval'; allowed is True"
    ):
        other.provides = False
    with pytest.raises(ValueError, match=r"provides: got True for skip='layer'; allowed is False"):
        ek.ELA(8, 4, skip="layer", provides=True)
    with pytest.raises(TypeError, match=r"provides: got int; allowed is True, False or None"):
        ek.ELA(8, 4, skip="reuse", provides=1)
    with pytest.raises(ValueError, match="allowed are 'retrieval', 'layer' and 'reuse'"):
        ek.ELA(8, 4, skip="again")
