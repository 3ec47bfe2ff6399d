"""convert() on the light form with tokens and with an activation of the value, as a vision transformer has it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.copies import COPIES
from support.small_published import ActivatedGate, Layer, Network, TokenDecay, TokenNetwork
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential

import ela_kernels as ek
from ela_kernels.conversion.fused import Fused

X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def both() -> tuple[nn.Module, nn.Module]:
    """A network in float64, and a converted copy."""
    torch.manual_seed(0)
    model = TokenNetwork().double()
    ours = copy.deepcopy(model)
    ek.convert(ours, strict=True)
    return model, ours


def step(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Output and gradients of a training step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = (run or model)(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in (x, *model.parameters()))]


def check(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def forms(model: nn.Module, *inputs: Tensor) -> list[str]:
    return [e.form for e in ek.explain(model, *inputs)]


@pytest.mark.parametrize("training", [True, False])
def test_results_and_gradients_are_the_same(training: bool, kernels: object) -> None:
    model, ours = both()
    model.train(training), ours.train(training)
    check(step(ours, X), step(model, X))
    assert forms(ours, X) == ["layer"] * 3
    with torch.inference_mode():
        torch.testing.assert_close(ours(X), model(X), rtol=1e-12, atol=1e-12)


def test_whatever_was_there_stays() -> None:
    model = TokenNetwork()
    seen: list[str] = []
    for name in ("normx", "normo", "mrla.Wv"):
        part = model.blocks[1].mrla.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    report = ek.convert(model, strict=True)
    what = "light form on tokens, 2 heads of 4, GELU on the value"
    assert report.converted == {f"blocks.{i}.mrla.mrla": what for i in range(3)}
    assert list(model.state_dict()) == list(state)
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    model(X.float()).sum().backward()
    assert seen == ["normx", "normo", "mrla.Wv"]
    assert ek.convert(model) == report
    ek.unconvert(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes


@pytest.mark.parametrize("way", COPIES)
def test_copies_and_pickles(way: str) -> None:
    model, ours = both()
    other = COPIES[way](ours)
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)  # no part of the copy may be the original's
    assert sum(isinstance(m, Fused) for m in other.modules()) == 6
    check(step(other, X), step(model, X))
    assert forms(other, X) == ["layer"] * 3
    check(step(ek.unconvert(other), X), step(model, X))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool) -> None:
    model, ours = both()

    def run(x: Tensor) -> Tensor:
        x = ours.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((ours.cls_token.expand(x.shape[0], -1, -1), x), 1)
        x = checkpoint_sequential(ours.blocks, 3, x, use_reentrant=reentrant)
        return ours.head(x[:, 0])

    check(step(ours, X, run), step(model, X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model, ours = both()
    exact = model(X).detach()
    with torch.autocast("cpu", dtype):
        want, got = model.float()(X.float()), ours.float()(X.float())
        assert forms(ours, X.float()) == ["layer"] * 3
    assert got.dtype == want.dtype
    # Every layer rounds: as close to float64 as the original is.
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() < 2 * (want - exact).abs().max() + rounding


def test_compiled_graphs_and_function_transforms_run_the_original() -> None:
    torch._dynamo.reset()
    model, ours = both()
    compiled = torch.compile(ours.eval(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-12, atol=1e-12)
    names = dict(model.named_parameters())

    def f(parameters: dict[str, Tensor], of: nn.Module) -> Tensor:
        return torch.func.functional_call(of, parameters, X).square().sum()

    a, b = (torch.func.grad(f)(names, m) for m in (ours, model))
    for name in names:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-10)


class Own(nn.Module):
    """GELU, of a class of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Doubled(nn.GELU):
    """A GELU with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.gelu(x)


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "published": (lambda: TokenDecay(8), ", GELU on the value"),
    "a factor [1, 1, C]": (lambda: TokenDecay(8, shape=(1, 1)), ", GELU on the value"),
    "a norm of x alone": (lambda: TokenDecay(8, normed=(True, False)), ", GELU on the value"),
    "a norm of the output before": (lambda: TokenDecay(8, normed=(False, True)), ", GELU"),
    "no norms": (lambda: TokenDecay(8, normed=(False, False)), ", GELU on the value"),
    "with a tanh": (lambda: TokenDecay(8, nn.GELU("tanh")), ", GELU with a tanh on the value"),
    "a function": (lambda: TokenDecay(8, F.gelu), ", GELU on the value"),
    "a class of its own": (lambda: TokenDecay(8, Own()), ", GELU on the value"),
    "no activation": (lambda: TokenDecay(8, nn.Identity()), ""),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_recognised(name: str, kernels: object) -> None:
    make, act = KINDS[name]
    torch.manual_seed(1)
    module = make().double()
    report = ek.convert(ours := copy.deepcopy(module), strict=True)
    assert report.converted["mrla"].startswith(f"light form on tokens, 2 heads of 4{act}")
    for side in (1, 4):
        inputs = torch.randn(2, 2, 1 + side * side, 8, dtype=torch.float64)
        check(step(ours, inputs, lambda t: ours(*t)), step(module, inputs, lambda t: module(*t)))
        assert forms(ours, *inputs) == ["layer"]


class Dropping(TokenDecay):
    """Has a part that does nothing as long as its rate is zero."""

    def __init__(self) -> None:
        super().__init__(8)
        self.drop = nn.Dropout(0.0)

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        return self.drop(super().forward(xt, ot_1))


class Halving(TokenDecay):
    """Does something to the class token too."""

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        out = super().forward(xt, ot_1)
        return torch.cat((out[:, :1] / 2, out[:, 1:]), 1)


class Detached(TokenDecay):
    """Lets no gradient pass to the output before."""

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        return super().forward(xt, ot_1.detach())


class Turned(TokenDecay):
    """Goes through the square the other way."""

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        side = int((xt.shape[1] - 1) ** 0.5)

        def turned(t: Tensor) -> Tensor:
            own = t[:, 1:].unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
            return torch.cat((t[:, :1], own), 1)

        return turned(super().forward(turned(xt), turned(ot_1)))


class Unnormed(TokenDecay):
    """Adds tokens that are not normed to those that are."""

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        return super().forward(xt, ot_1) + 0.01 * xt


LEFT = {
    "a dropout": (Dropping, "has drop, which ours does not call"),
    "the class token": (lambda: Halving(8), "is not the gated value plus the decayed output"),
    "no gradient": (lambda: Detached(8), "its gradients are others"),
    "turned": (lambda: Turned(8), "is not the gated value plus the decayed output"),
    "something more": (lambda: Unnormed(8), "is not the gated value plus the decayed output"),
    "another activation": (lambda: TokenDecay(8, nn.SiLU()), r"its value passes SiLU \(act_v\)"),
    "no factor": (lambda: TokenDecay(8, shape=(2, 1)), "no factor of the output before"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name: str) -> None:
    make, reason = LEFT[name]
    module: nn.Module = make()
    kinds = [type(m) for m in module.modules()]
    model = nn.ModuleDict({"stranger": module, "friend": Layer(8)})
    report = ek.convert(model)
    assert list(report.converted) == ["friend"]
    assert re.search(reason, report.left["stranger.mrla"])
    assert [type(m) for m in module.modules()] == kinds


def exchange(model: nn.Module, act: nn.Module) -> None:
    model.blocks[1].mrla.mrla.act_v = act


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "another activation": lambda m: exchange(m, nn.ReLU()),
    "the other form of it": lambda m: exchange(m, nn.GELU("tanh")),
    "one of its own": lambda m: exchange(m, Doubled()),
    "set to the other form": lambda m: setattr(m.blocks[1].mrla.mrla.act_v, "approximate", "tanh"),
    "a hook on it": lambda m: m.blocks[1].mrla.mrla.act_v.register_forward_hook(
        lambda m, args, out: out * 2
    ),
    "a hook on the layer": lambda m: m.blocks[1].mrla.mrla.register_forward_hook(
        lambda m, args, out: out * 2
    ),
    "a hook on a norm": lambda m: m.blocks[1].mrla.normo.register_forward_hook(
        lambda m, args, out: out * 2
    ),
    "another norm": lambda m: setattr(m.blocks[1].mrla, "normx", nn.Softsign()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_afterwards(name: str, kernels: object) -> None:
    model, ours = both()
    for m in (model, ours):
        CHANGES[name](m)
    check(step(ours, X), step(model, X))
    if "norm" in name:
        assert forms(ours, X) == ["layer"] * 3
    else:
        assert len(forms(ours, X)) == 2  # the original's own code has no layer of ours in it


def test_an_activation_of_a_class_of_its_own_is_watched_too() -> None:
    module = TokenDecay(8, Own()).double()
    ek.convert(module, strict=True)
    inputs = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    module.mrla.act_v = Doubled()
    got = module(*inputs)
    torch.testing.assert_close(got, ek.unconvert(module)(*inputs), rtol=1e-12, atol=1e-12)


def test_what_is_no_square_of_tokens_is_the_original_s() -> None:
    model, ours = both()
    a, b = (m.blocks[0].mrla for m in (model, ours))
    tokens = torch.randn(2, 8, 8, dtype=torch.float64)
    for module in (a, b):
        with pytest.raises(RuntimeError, match="shape"):
            module(tokens, tokens)
    good = torch.randn(2, 10, 8, dtype=torch.float64)
    torch.testing.assert_close(b(xt=good, ot_1=good), a(good, good))
    torch.testing.assert_close(b(good, good[:1]), a(good, good[:1]))  # broadcast
    with pytest.raises(TypeError):
        b(good)


def test_an_activation_on_maps_and_in_a_residual_block(kernels: object) -> None:
    torch.manual_seed(0)
    model = Network(light=True, drop=0.3).double()
    for i, block in enumerate(model.blocks):
        dim = block.mrla.lambda_t.shape[0]
        act = nn.GELU("tanh") if i % 2 else nn.GELU()
        block.mrla.mrla = ActivatedGate(dim, act).double()
    report = ek.convert(ours := copy.deepcopy(model), strict=True)
    assert all("on the value, with the residual block" in w for w in report.converted.values())

    def seeded(of: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            torch.manual_seed(1)
            return of(x)

        return run

    for training in (True, False):
        model.train(training), ours.train(training)
        check(step(ours, X, seeded(ours)), step(model, X, seeded(model)))
        assert forms(ours, X) == ["block"] * 6
