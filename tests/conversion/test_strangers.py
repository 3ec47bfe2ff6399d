"""Networks that do with converted layers what others do not: whatever it is, nothing may change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_published import Decay, Gate, Layer, Network
from torch import Tensor, nn
from torch.nn import functional as F

import ela_kernels as ek


def test_a_decay_that_lets_no_gradient_pass_is_left() -> None:
    class Part(Decay):
        def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
            return self.mrla(xt) + self.lambda_t * ot_1.detach()

    report = ek.convert(nn.ModuleList([Part(8), Decay(8)]))
    assert "gradients" in report.left["0.mrla"]


def test_arguments_by_names_of_their_own() -> None:
    class Named(Layer):
        def forward(self, feat: Tensor, keys: Any = None, values: Any = None) -> Any:
            return super().forward(feat, keys, values)

    class NamedGate(Gate):
        def forward(self, feat: Tensor) -> Tensor:
            return super().forward(feat)

    class NamedDecay(Decay):
        def forward(self, now: Tensor, before: Tensor) -> Tensor:
            return self.mrla(feat=now) + self.lambda_t * before

    x = torch.randn(2, 8, 4, 3)
    layer, light = Named(8), NamedDecay(8)
    light.mrla.__class__ = NamedGate
    calls: list[Callable[[], Any]] = [
        lambda: layer(feat=x, keys=None, values=None)[0],
        lambda: layer(x)[0],
        lambda: layer(x, values=None, keys=None)[0],
        lambda: light(now=x, before=x),
        lambda: light(x, x),
    ]
    want = [call() for call in calls]
    ek.convert(layer, strict=True), ek.convert(light, strict=True)
    for call, expected in zip(calls, want, strict=True):
        torch.testing.assert_close(call(), expected)


def test_hooks_on_parts_that_ours_does_not_call() -> None:
    class WithParts(Layer):
        def __init__(self) -> None:
            super().__init__(8)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
            self.pool(x)
            return super().forward(x, prev_K, prev_V)

    layer, seen = WithParts(), []
    ek.convert(layer, strict=True)
    x = torch.randn(2, 8, 4, 3)
    layer(x, None, None)
    handle = layer.pool.register_forward_hook(lambda *_: seen.append(1))
    layer(x, None, None)
    handle.remove()
    layer(x, None, None)
    assert seen == [1]


def test_values_of_another_size_are_the_original_s_to_resize() -> None:
    class Resizing(Layer):
        def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
            if prev_V is not None and prev_V.shape[-2:] != x.shape[-2:]:
                size = (prev_V.shape[2], *x.shape[-2:])
                prev_V = F.adaptive_avg_pool3d(prev_V, size)
            return super().forward(x, prev_K, prev_V)

    torch.manual_seed(0)
    theirs = nn.ModuleList(Resizing(8) for _ in range(3)).double()
    ours = copy.deepcopy(theirs)
    ek.convert(ours, strict=True)
    x, results = torch.linspace(-1, 1, 2 * 8 * 64).double().view(2, 8, 8, 8).sin(), []
    for stage in (theirs, ours):
        y, k, v = stage[0](x, None, None)
        y, k, v = stage[1](y, k, v)
        y, k, v = stage[2](y[..., ::2, ::2].contiguous(), k, v)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in stage.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)


def test_classes_with_a_register_of_their_subclasses() -> None:
    found: list[str] = []

    class Registered:
        def __init_subclass__(cls, *, key: str, **options: Any) -> None:
            super().__init_subclass__(**options)
            found.append(key)

    class Mine(Registered, Layer, key="mine"):
        pass

    layer = Mine(8)
    ek.convert(layer, strict=True)
    assert isinstance(layer, Mine)
    assert found == ["mine"]


@pytest.mark.parametrize(
    "where", ["blocks.1", "blocks.1.mrla", "blocks.4.mrla.mrla", "blocks.1.bn_mrla"]
)
def test_backward_hooks(where: str) -> None:
    torch.manual_seed(0)
    theirs = Network().double()
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # such hooks allow none
    ours = copy.deepcopy(theirs)
    ek.convert(ours, strict=True)
    seen: list[int] = []
    x = torch.linspace(-1, 1, 2 * 3 * 64).double().view(2, 3, 8, 8).sin()
    for network in (theirs, ours):
        network.get_submodule(where).register_full_backward_hook(lambda *_: seen.append(1))
        network(x).square().sum().backward()
    assert len(seen) == 2
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


def test_autograd_functions_on_what_is_handed_on_are_refused_and_may_have_the_tensor() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 0.5

    torch.manual_seed(0)
    theirs = nn.ModuleList(Layer(8) for _ in range(2)).double()
    ours = copy.deepcopy(theirs)
    ek.convert(ours, strict=True)
    x, results = torch.linspace(-1, 1, 2 * 8 * 12).double().view(2, 8, 4, 3).sin(), []
    for stage in (theirs, ours):
        y, k, v = stage[0](x, None, None)
        y, k, v = stage[1](y, Half.apply(k[:]), Half.apply(v[:]))
        y.square().sum().backward()
        results.append([y, *(p.grad for p in stage.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)
    y, k, v = ours[0](x, None, None)
    with pytest.raises(RuntimeError, match="autograd function"):
        ours[1](y, Half.apply(k), Half.apply(v))[0].sum().backward()


def test_replicas_use_their_own_parameters() -> None:
    """The steps of DataParallel, without its devices."""
    torch.manual_seed(0)
    light = Decay(8)
    ek.convert(light, strict=True)
    modules = list(light.modules())
    replicas: list[Any] = [m._replicate_for_data_parallel() for m in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module.named_children():
            setattr(replica, name, replicas[modules.index(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() + 1)
    fresh = Decay(8)
    with torch.no_grad():
        for a, b in zip(fresh.parameters(), light.parameters(), strict=True):
            a.copy_(b + 1)
    x, before = torch.randn(2, 8, 4, 3), torch.randn(2, 8, 4, 3)
    torch.testing.assert_close(replicas[0](x, before), fresh(x, before))


def test_an_exported_ela_is_refused() -> None:
    model = Network()
    ek.convert(model, to="ela")
    with pytest.raises(Exception, match=r"unconvert"):
        torch.export.export(model, (torch.randn(2, 3, 8, 6),), strict=False)


def test_the_skip_mode_of_what_is_converted_already() -> None:
    model = Network()
    ek.convert(model, to="ela")
    ek.convert(model, to="ela", skip="layer")
    assert {m.skip for m in model.modules() if isinstance(m, ek.ELA)} == {"layer"}


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_block_without_gradients_cuts_off_what_came_before(frozen: int) -> None:
    """As concatenating there does."""
    torch.manual_seed(0)
    theirs = Network().double()
    ours = copy.deepcopy(theirs)
    ek.convert(ours, strict=True)
    x = torch.linspace(-1, 1, 2 * 3 * 64).double().view(2, 3, 8, 8).sin()
    for network in (theirs, ours):
        y, k, v = x, None, None
        for i, block in enumerate(network.blocks[:3]):
            with torch.set_grad_enabled(i != frozen):
                y, k, v = block(y, k, v)
        if y.requires_grad:
            y.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


def test_parts_that_are_exchanged_afterwards() -> None:
    """Dropout in the drop path's place, another attention, a forward wrapped by hand."""
    torch.manual_seed(0)
    theirs = Network(drop=0.3).double()
    ours = copy.deepcopy(theirs)
    ek.convert(ours, strict=True)
    seen: list[str] = []

    def wrapped(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = forward(*args)
            seen.append(name)
            return out

        return call

    for network in (theirs, ours):
        network.blocks[1].drop_path = nn.Dropout2d(0.5)
        network.blocks[2].relu = nn.GELU()
        network.blocks[4].mrla = copy.deepcopy(theirs.blocks[4].mrla)
        layer = network.blocks[5].mrla.mrla
        layer.forward = wrapped(layer.forward, "layer")
    x = torch.linspace(-1, 1, 4 * 3 * 64).double().view(4, 3, 8, 8).sin()
    results = []
    for network in (theirs, ours):
        torch.manual_seed(1)
        out = network(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in network.parameters()), *network.buffers()])
    assert seen == ["layer", "layer"]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


def test_a_light_layer_whose_forward_is_wrapped() -> None:
    light, seen = Decay(8), []
    ek.convert(light, strict=True)
    x, before = torch.randn(2, 8, 4, 3), torch.randn(2, 8, 4, 3)
    want = light(x, before)
    forward = light.mrla.forward
    light.mrla.forward = lambda *args: (seen.append(len(args)), forward(*args))[1]
    torch.testing.assert_close(light(x, before), want)
    assert seen == [1]


@pytest.mark.parametrize("shared", ["layer", "around", "weight", "block"])
def test_what_layers_share(shared: str) -> None:
    torch.manual_seed(0)
    theirs = Network().double()
    one, other = theirs.blocks[1], theirs.blocks[2]
    if shared == "layer":
        other.mrla.mrla = one.mrla.mrla
    elif shared == "around":
        other.mrla = one.mrla
    elif shared == "weight":
        other.mrla.mrla.Wv.weight = one.mrla.mrla.Wv.weight
    else:
        theirs.blocks[2] = one
    ours = copy.deepcopy(theirs)
    report = ek.convert(ours, strict=True)
    assert len(report.converted) == (6 if shared == "weight" else 5)
    x = torch.linspace(-1, 1, 4 * 3 * 64).double().view(4, 3, 8, 8).sin()
    results = []
    for network in (theirs, ours):
        out = network(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in network.parameters()), *network.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))


def test_a_network_of_several_dtypes() -> None:
    """The second stage in double precision, the rest in single."""
    torch.manual_seed(0)
    theirs = Network().eval()
    theirs.blocks[3:].double()
    theirs.head.double()
    for network in (theirs, ours := copy.deepcopy(theirs)):
        network.blocks[3].register_forward_pre_hook(
            lambda _, args: tuple(t.double() if isinstance(t, Tensor) else t for t in args)
        )
    ek.convert(ours, strict=True)
    x = torch.randn(2, 3, 8, 8)
    want, got = theirs(x), ours(x)
    assert got.dtype == want.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # float32 in the first stage
