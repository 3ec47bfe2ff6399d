"""What whole layers and blocks may not pass by, and inputs and weights that lie otherwise in memory."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.layer_stages import (
    FORMS,
    gradients,
    layer_step,
    light_step,
    make_blocks,
    make_light_blocks,
    make_stage,
    run_blocks,
    run_stage,
    step,
)
from torch import nn
from torch.func import functional_call
from torch.nn.functional import normalize

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.modules.query_key_value import ChannelFilter

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


# From a map of any memory format and the channels wanted of it, to a view of it.
VIEWS = {
    "channels": lambda x, c: x[:, 1 : 1 + c],
    "space": lambda x, c: x[:, :c, 1:-1, 1:-1],
    "one position": lambda x, c: x[:, :c, 1:2, 1:2],
    "a row": lambda x, c: x[:, :c, 1:2],
    "a column": lambda x, c: x[:, :c, :, 1:2],
    "one channel, expanded": lambda x, c: x[:, :1].expand(-1, c, -1, -1),
    "one position, expanded": lambda x, c: x[:, :c, :1, :1].expand(-1, -1, 3, 5),
    "one sample, expanded": lambda x, c: x[:1, :c].expand(2, -1, -1, -1),
    "every other sample": lambda x, c: x[::2, :c],
    "transposed": lambda x, c: x[:, :c].transpose(2, 3),
    "samples and channels transposed": lambda x, c: x[:c, :4].transpose(0, 1),
    "negated": lambda x, c: torch._neg_view(x[:, :c]),
}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("channels", [1, 7])
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_that_are_views(both_ways, view, channels, form):
    x = VIEWS[view](random(8, 8, 5, 4).contiguous(memory_format=form), channels).requires_grad_()
    layers, _ = make_stage(x.shape, 2)
    both_ways(lambda: layer_step(layers, x), layer=2)
    blocks, _ = make_blocks(x.shape, 2)
    both_ways(lambda: step(blocks, x), block=2)
    blocks, _ = make_light_blocks(x.shape, 2)
    both_ways(lambda: light_step(blocks, x), light_block=2)


@pytest.mark.parametrize("make", [make_stage, make_blocks, make_light_blocks])
def test_weights_that_are_views(both_ways, make):
    """Strided, and with a negation that PyTorch holds back as a flag."""
    modules, x = make((2, 6, 4, 5), 2)
    step_of = {make_stage: layer_step, make_blocks: step, make_light_blocks: light_step}[make]
    what = {make_stage: "layer", make_blocks: "block", make_light_blocks: "light_block"}[make]

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.modules_of = modules

        def forward(self):
            return step_of(self.modules_of, x)

    names = [f"modules_of.{name}" for name, _ in modules.named_parameters()]
    for view in (torch._neg_view, lambda p: torch.stack((p, p), -1)[..., 0]):
        weights = {n: view(p.detach()) for n, p in zip(names, modules.parameters(), strict=True)}
        both_ways(lambda w=weights: functional_call(Step(), w), **{what: 2})


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledInside(nn.Conv2d):
    def _conv_forward(self, *args):
        return 2 * super()._conv_forward(*args)


class DoubledFilter(ChannelFilter):
    def forward(self, windows):
        return 2 * super().forward(windows)


def convolution(kind, channels=6, kernel_size=3):
    return kind(
        channels, channels, kernel_size, padding=1, groups=channels, bias=False, dtype=torch.float64
    )


def provided(layer, x):
    history = ek.LayerHistory()
    layer.provide(x, history)
    return [*history.keys, *history.values]


def with_forward(module, forward):
    module.forward = forward


CHANGES = {
    "a subclass": lambda m: setattr(m, "Wv", convolution(Doubled)),
    "a subclass inside": lambda m: setattr(m, "Wv", convolution(DoubledInside)),
    "a filter's subclass": lambda m: setattr(m, "Wk", DoubledFilter(m.kernel_size).double()),
    "a forward of its own": lambda m: with_forward(m.Wv, lambda x: 2 * x),
    "a filter's forward": lambda m: with_forward(m.Wk, lambda windows: 2 * windows.sum(-1)),
    "another size": lambda m: setattr(m.Wv, "weight", nn.Parameter(random(6, 1, 5, 5))),
    "too few channels": lambda m: setattr(m.Wv, "weight", nn.Parameter(random(3, 1, 3, 3))),
    "more channels": lambda m: setattr(m, "Wv", convolution(nn.Conv2d, 12)),
    "a filter's size": lambda m: setattr(m.Wk, "weight", nn.Parameter(random(1, 1, 5))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_do_something_else_are_called(both_ways, change):
    layers, x = make_stage((2, 6, 4, 5), 1, 3)
    CHANGES[change](layers[0])
    both_ways(lambda: layer_step(layers, x))
    both_ways(lambda: provided(layers[0], x))
    light = ek.LightLayerAttention(6, 3).double()
    CHANGES[change](light)
    both_ways(lambda: [light(x, x)])
    blocks, x = make_blocks((2, 6, 4, 5), 1, 3)
    CHANGES[change](blocks[0].attn)
    both_ways(lambda: step(blocks, x))


def test_a_decay_of_another_shape(both_ways):
    x = random(2, 6, 4, 5)
    for shape in ((3, 1, 1), (6,)):
        layer = ek.LightLayerAttention(6, 3).double()
        layer.lambda_t = nn.Parameter(random(*shape))
        both_ways(lambda layer=layer: [layer(x, x)])


def test_methods_that_a_subclass_has_of_its_own(both_ways):
    class Normed(ek.LayerAttention):
        def query_key_value(self, x):
            q, k, v = super().query_key_value(x)
            return normalize(q), normalize(k), v

    class NormedLight(ek.LightLayerAttention):
        def query_key(self, x):
            q, k = super().query_key(x)
            return normalize(q), normalize(k)

    class Doubling(ek.LayerHistory):
        def attend(self, *args, **kwargs):
            return 2 * super().attend(*args, **kwargs)

    x = random(2, 6, 4, 5)
    layers, light = nn.ModuleList(Normed(6, 3) for _ in range(2)).double(), NormedLight(6, 3)
    both_ways(lambda: layer_step(layers, x))
    both_ways(lambda: [light.double()(x, x)])
    plain, block = ek.LayerAttention(6, 3).double(), ek.ELA(6, 3).double().eval()
    both_ways(lambda: [plain(x, Doubling()), block(x, Doubling())])


def test_a_parametrized_weight_is_read_once(both_ways):
    """A spectral norm iterates whenever its weight is read in training: reading it twice changes its state twice."""
    layers, x = make_stage((2, 6, 4, 5), 2, 3)
    blocks, _ = make_blocks((2, 6, 4, 5), 2, 3)
    odd, _ = make_blocks((2, 6, 4, 5), 1, 3, norm_layer=lambda c: nn.GroupNorm(2, c))
    light, _ = make_light_blocks((2, 6, 4, 5), 2, 3)
    reads = []

    class Counted(nn.Module):
        def forward(self, weight):
            reads.append(1)
            return weight

    def check(modules, run, calls):
        modules = copy.deepcopy(modules)
        for module in modules.modules():
            if isinstance(module, nn.Conv2d):
                nn.utils.parametrize.register_parametrization(module, "weight", Counted())
        for backend in ("auto", "eager"):
            with ek.use_backend(backend):
                reads.clear()
                run(modules)
                assert len(reads) == len(modules), backend
        both_ways(lambda: run(modules), **calls)

    check(layers, lambda m: [run_stage(m, x)[0][-1]], {"layer": 2})
    check(layers, lambda m: [t for layer in m for t in provided(layer, x)], {"provide": 2})
    check(blocks, lambda m: [b(x, ek.LayerHistory()) for b in m], {"block": 2})
    check(odd, lambda m: [b(x, ek.LayerHistory()) for b in m], {"layer": 1})
    check(light, lambda m: [b.attn(x, x) for b in m], {"light_layer": 2})


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("channels", "size"), [(1, 5), (3, 9), (4, 31)])
def test_filters_longer_than_the_channels(both_ways, channels, size, form):
    x = random(2, channels, 3, 4).contiguous(memory_format=form).requires_grad_()
    layers = nn.ModuleList(ek.LayerAttention(channels, 1, size) for _ in range(2)).double()
    both_ways(lambda: layer_step(layers, x), layer=2)
    light = ek.LightLayerAttention(channels, 1, size).double()
    both_ways(lambda: [light(x, x.sin()), *gradients(light(x, x.sin()).sum(), [x])], light_layer=2)


def test_a_deep_history(both_ways):
    layers, x = make_stage((1, 4, 3, 3), 160, 2)
    both_ways(lambda: layer_step(layers, x, residual=False), layer=160)


def test_backends_in_turn(both_ways):
    """Layers of one history on kernels and in eager PyTorch, and a backward under another setting than the forward."""
    blocks, x = make_blocks((2, 6, 4, 5), 4, 3)

    def run(settings):
        copies, history, y = copy.deepcopy(blocks), ek.LayerHistory(), x
        for block, setting in zip(copies, settings, strict=False):
            with ek.use_backend(setting):
                y = block(y, history)
        with ek.use_backend(settings[-1]):
            return [y, *gradients(y.square().sum(), [x, *copies.parameters()])]

    expected = run(["eager"] * 5)
    for settings, served in (
        (("cpp", "auto", "cpp", "cpp", "eager"), 4),
        (("cpp", "cpp", "eager", "cpp", "cpp"), 2),
        (("eager", "cpp", "cpp", "cpp", "cpp"), 0),
    ):
        found = both_ways(lambda s=settings: run(s), block=served)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_stages_in_several_threads_at_once():
    """Histories share nothing: each thread gets the bits that it gets alone."""
    torch.set_num_threads(2)
    blocks, x = make_blocks((4, 12, 40, 40), 3, 4, torch.float32)
    blocks.eval()

    def run(factor):
        y = (factor * x.detach()).requires_grad_()
        out = run_blocks(blocks, y)[0][-1]
        return [out, *torch.autograd.grad(out.square().sum(), [y, *blocks.parameters()])]

    factors = [1.0, 2.0, 3.0, 4.0]
    alone = [run(factor) for factor in factors]
    with ThreadPoolExecutor(len(factors)) as pool:
        for _ in range(3):
            for found, expected in zip(pool.map(run, factors), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
