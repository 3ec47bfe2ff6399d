"""convert() on networks written as the published ones are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.copies import COPIES
from support.small_published import Around, Decay, Layer, Network
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.conversion.fused import Fused


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> None:
    torch._dynamo.reset()


FORMS = {"base": {}, "light": {"light": True}, "base, drop path": {"drop": 0.4}}


def both(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A network in float64, and a converted copy."""
    torch.manual_seed(0)
    model = Network(**options).double()
    ours = copy.deepcopy(model)
    ek.convert(ours, strict=True)
    return model, ours


def step(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    model.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = (run or model)(x)
    out.square().sum().backward()
    grads = [p.grad for p in (x, *model.parameters())]
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def check(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


X = torch.randn(4, 3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_results_gradients_and_buffers_are_the_same(
    form: str, training: bool, kernels: object
) -> None:
    model, ours = both(**FORMS[form])
    model.train(training), ours.train(training)
    check(step(ours, X), step(model, X))
    assert {e.form for e in ek.explain(ours, X)} == {"block"}


def test_whatever_was_there_stays() -> None:
    model = Network()
    seen: list[str] = []
    model.blocks[1].mrla.mrla.Wv.register_forward_hook(lambda *_: seen.append("Wv"))
    parametrizations.spectral_norm(model.blocks[2].mrla.mrla.Wv)
    model.blocks[3].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    parameters, modes = list(model.parameters()), [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    report = ek.convert(model, strict=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert not seen
    assert len(report.converted) == 6
    assert list(model.state_dict()) == list(state)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    model(X.float()).sum().backward()
    assert seen == ["Wv"]
    optimizer.step()
    assert ek.convert(model) == report
    assert ek.unconvert(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    ek.unconvert(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", COPIES)
def test_copies_and_pickles(form: str, way: str) -> None:
    model, ours = both(**FORMS[form])
    other = COPIES[way](ours)
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)  # no part of the copy may be the original's
    assert any(isinstance(m, Fused) for m in other.modules())
    check(step(other, X), step(model, X))
    check(step(ek.unconvert(other), X), step(model, X))


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_go_both_ways(form: str) -> None:
    model, _ = both(**FORMS[form])
    fresh = Network(**FORMS[form]).double()
    ek.convert(fresh)
    fresh.load_state_dict(model.state_dict())
    check(step(fresh, X), step(model, X))
    model.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_checkpointed_blocks(form: str, first: int) -> None:
    """Each block from `first` on, the one that begins a stage among them or not."""
    model, ours = both(**FORMS[form])
    want = step(model, X)

    def run(x: Tensor) -> Tensor:
        state: tuple[Any, ...] = () if ours.light else (None, None)
        for i, block in enumerate(ours.blocks):
            if i >= first:
                found = checkpoint(block, x, *state, use_reentrant=False)
            else:
                found = block(x, *state)
            x, *left = (found,) if ours.light else found
            state = tuple(left)
        return ours.head(x.mean((2, 3)))

    # The running statistics of a checkpointed block are updated twice, ours like the original's.
    parameters = 1 + 1 + sum(1 for _ in model.parameters())
    check(step(ours, X, run)[:parameters], want[:parameters])


def test_reentrant_checkpointing_is_refused() -> None:
    _, ours = both()

    def run(x: Tensor, first_only: bool) -> Tensor:
        k = v = None
        for i, block in enumerate(ours.blocks):
            if i == 0 or not first_only:
                x, k, v = checkpoint(block, x, k, v, use_reentrant=True)
            else:
                x, k, v = block(x, k, v)
        return ours.head(x.mean((2, 3)))

    for first_only in (True, False):
        with pytest.raises(RuntimeError, match="reentrant checkpointing"):
            step(ours, X, lambda x, only=first_only: run(x, only))


def test_without_gradients_and_in_inference_mode() -> None:
    model, ours = both()
    model.eval(), ours.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(ours(X), model(X), rtol=1e-12, atol=1e-12)


def test_autocast() -> None:
    model, ours = both()
    exact = model(X).detach()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model.float()(X.float()), ours.float()(X.float())
    assert got.dtype == want.dtype
    # bfloat16 rounds to 1 in 256 at every layer: as close to float64 as the original is.
    assert (got - exact).abs().max() < 2 * (want - exact).abs().max() + 1e-2 * exact.abs().max()


def test_compiled_graphs_and_function_transforms_run_the_original() -> None:
    model, ours = both()
    model.eval(), ours.eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-12, atol=1e-12)
    names = dict(model.named_parameters())

    def f(parameters: dict[str, Tensor], of: nn.Module) -> Tensor:
        return torch.func.functional_call(of, parameters, X).square().sum()

    a, b = (torch.func.grad(f)(names, m) for m in (ours, model))
    for name in names:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-10)
    exported = torch.export.export(ours, (X,), strict=False)
    torch.testing.assert_close(exported.module()(X), model(X), rtol=1e-12, atol=1e-12)


def test_a_compiled_block_among_eager_ones() -> None:
    model, ours = both()
    want = step(model, X)
    for i in (1, 4):
        ours.blocks[i].compile(backend="aot_eager")
    check(step(ours, X), want)


def test_a_compiled_model_is_converted_under_its_wrapper() -> None:
    model = Network().double().eval()
    want = model(X)
    wrapped = torch.compile(model, backend="aot_eager")
    wrapped(X)
    assert all(name.startswith("_orig_mod.") for name in ek.convert(wrapped).converted)
    torch.testing.assert_close(wrapped(X), want, rtol=1e-12, atol=1e-12)


def test_a_part_of_a_model() -> None:
    model, ours = both()
    ek.unconvert(ours.blocks[1])
    ek.unconvert(ours.blocks[5])
    check(step(ours, X), step(model, X))
    assert len(ek.convert(ours.blocks[1]).converted) == 1


def test_a_layer_and_what_is_around_it_alone() -> None:
    layer, light = Layer(8), Decay(8)
    keys, values = torch.randn(2, 2, 8), torch.randn(2, 2, 8, 4, 4)
    x, before = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    want, wanted = layer(x, keys, values), light(x, before)
    gated = light.mrla(x)
    assert list(ek.convert(layer).converted) == [""]
    assert list(ek.convert(light).converted) == ["mrla"]
    for a, b in zip(layer(x, prev_V=values, prev_K=keys), want, strict=True):
        torch.testing.assert_close(a + 0, b)
    torch.testing.assert_close(light(x, before), wanted)
    torch.testing.assert_close(light.mrla(x), gated)
    # Beside its own call it is a LayerAttention.
    history = ek.LayerHistory()
    assert isinstance(layer, ek.LayerAttention)
    assert layer(x, history).shape == x.shape
    assert history.depth == 1


def test_hooks_on_the_way_are_called_and_the_kernels_serve_less() -> None:
    model, ours = both()
    seen: list[str] = []
    ours.blocks[1].mrla.register_forward_hook(lambda m, a, out: seen.append(type(out[1]).__name__))
    ours.blocks[2].bn_mrla.register_forward_hook(lambda *_: seen.append("norm"))
    check(step(ours, X), step(model, X))
    assert seen == ["Stacked", "norm"]
    found = ek.explain(ours, X)
    assert [e.form for e in found] == ["block", "layer", "layer", "block", "block", "block"]
    assert "between the block and it, has hooks" in found[1].reasons["block"][0]
    assert "norm" in found[2].reasons["block"][0]


class Careful(Around):
    """Calls its layer in float32, whatever autocast says, as some code does."""

    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x if x.dtype == torch.float64 else x.float(), prev_k, prev_v)


def test_an_attention_under_circumstances_of_its_own_is_called_where_it_stands() -> None:
    model = Network()
    for block in model.blocks:
        block.mrla.__class__ = Careful
    ours = copy.deepcopy(model)
    ek.convert(ours, strict=True)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(x), ours(x)
        found = ek.explain(ours, x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)  # bfloat16 around it
    assert {e.form for e in found} == {"layer"}
    assert all("other circumstances" in e.reasons["block"][0] for e in found)
    assert {e.form for e in ek.explain(ours, x)} == {"block"}


def test_a_block_called_by_keyword() -> None:
    model, ours = both()
    block, other = model.blocks[0], ours.blocks[0]
    for a, b in zip(
        other(x=X, prev_k=None, prev_v=None), block(x=X, prev_k=None, prev_v=None), strict=True
    ):
        torch.testing.assert_close(a + 0, b)
    found = ek.explain(other, x=X, prev_k=None, prev_v=None)
    assert found[0].reasons["block"] == ("the block is not called with its map in first place",)


def test_a_light_layer_with_hooks_of_its_own_is_called_as_it_was() -> None:
    model, ours = both(light=True)
    seen: list[int] = []
    ours.blocks[1].mrla.mrla.register_forward_hook(lambda m, args, out: seen.append(len(args)))
    check(step(ours, X), step(model, X))
    assert seen == [1]


class Elsewhere(nn.Module):
    """A block that does more after its attention than a residual block."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mrla = Around(Layer(8))
        self.bn_mrla = nn.BatchNorm2d(8)
        self.last: Any = None

    def forward(self, x: Tensor, k: Any, v: Any) -> Any:
        attn, k, v = self.mrla(x, k, v)
        out = self.bn_mrla(attn)
        if self.kind == "sum":
            return 2 * x + out, k, v
        if self.kind == "keeps":
            self.last = out
        if self.kind == "scales":
            v = v * 2
        if self.kind == "gelu":
            out = nn.functional.gelu(out)
        return x + out, k, v


@pytest.mark.parametrize("kind", ["plain", "sum", "keeps", "scales", "gelu"])
def test_blocks_of_another_kind_keep_their_end(kind: str) -> None:
    model = nn.ModuleList(Elsewhere(kind) for _ in range(3)).double()
    ours = copy.deepcopy(model)
    report = ek.convert(ours)
    is_block = [not what.count("not the block") for what in report.converted.values()]
    assert is_block == [kind == "plain"] * 3

    def run(blocks: nn.ModuleList) -> list[Tensor]:
        x, k, v = torch.ones(2, 8, 4, 4).double().cumsum(1).cumsum(3), None, None
        for block in blocks:
            x, k, v = block(x, k, v)
        x.square().sum().backward()
        return [x, *(p.grad for p in blocks.parameters()), *blocks.buffers()]

    check(run(ours), run(model))


class Named(Layer):
    """Has a method or an attribute of a name that ours has."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(8)
        setattr(self, name, value)


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [("plan", None, False), ("dim", 8, True), ("dim", 7, False), ("kernel_size", (3, 3), False)],
)
def test_names_that_ours_would_hide(name: str, value: Any, fits: bool) -> None:
    layer = Named(name, value)
    report = ek.convert(nn.ModuleList([layer, Layer(8)]))
    assert ("0" in report.converted) == fits
    if not fits:
        assert f"it has {name} of its own" in report.left["0"]
    assert getattr(layer, name) == value
