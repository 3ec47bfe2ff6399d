"""What the kernels of whole layers and whole blocks of every GPU backend are tested for, without a GPU.

A backend's own file runs :class:`LayerTests` as a subclass, and adds its shapes and what only it has.
"""

from __future__ import annotations

import pytest
import torch
from support.layer_stages import (
    FORMS,
    check,
    gradients,
    make_blocks,
    make_stage,
    run_blocks,
    run_stage,
    step,
)
from torch import nn

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.types import Filters, NormAct

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# One channel, one position, few of both, and more channels than a strip.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 1, 3, 5), 1),
    ((2, 6, 1, 1), 2),
    ((3, 6, 3, 5), 6),
    ((2, 37, 7, 7), 1),  # channel-wise heads
    ((1, 6, 9, 33), 3),
    ((2, 6, 16, 16), 6),
]


def recorded_calls(monkeypatch, kernels, names):
    """What the methods of a backend are called for from now on, in order."""
    made = []
    for name in names:
        real = getattr(kernels, name)
        # Not setattr(): of an instance it would leave a bound method behind.
        monkeypatch.setitem(
            vars(kernels), name, lambda *a, n=name, r=real, **k: (made.append(n), r(*a, **k))[1]
        )
    return made


def layer_calls(monkeypatch, backend):
    names = ("layer", "layer_backward", "norm_forward", "norm_backward")
    return recorded_calls(monkeypatch, KERNELS[backend], names)


def layer_step(residual=True, skip=(), losses=("out", "first", "kl", "weights")):
    def run(layers, x):
        outs, history = run_stage(layers, x, residual, skip)
        terms = {
            "out": lambda: outs[-1].float().square().sum(),
            "first": lambda: outs[0].float().sin().sum(),
            "kl": lambda: history.kl.sum() if history.kl is not None else 0.0,
            "weights": lambda: history.weights.square().sum(),
        }
        loss = sum(terms[name]() for name in losses)
        inputs = [t for t in (x, *layers.parameters()) if t.requires_grad]
        return [*outs, history.weights, *gradients(loss, inputs)]

    return run


def check_stage(shape, head_dim, form, calls):
    layers, x = make_stage(shape, 2, head_dim, torch.float32, form)
    check(layer_step(), layers, x)
    assert calls == ["layer"] * 2 + ["layer_backward"] * 2


def check_stage_of_blocks(shape, head_dim, training, form, calls):
    blocks, x = make_blocks(shape, 2, head_dim, torch.float32, form)
    for block in blocks:
        nn.init.uniform_(block.norm.running_mean, -1, 1)
        nn.init.uniform_(block.norm.running_var, 0.5, 2)
    blocks.train(training)
    check(step, blocks, x)
    forward, backward = ["layer", "norm_forward"], ["layer_backward", "norm_backward"]
    assert calls == 2 * forward + 2 * backward


def check_layers_and_blocks(shape, depth, head_dim, form=FORMS[0]):
    check(layer_step(), *make_stage(shape, depth, head_dim, torch.float32, form))
    check(step, *make_blocks(shape, depth, head_dim, torch.float32, form))


class LayerTests:
    """The file of a subclass has a fixture `calls`, which gives :func:`layer_calls`."""

    backend: str
    bfloat16_factor = 4  # as `factor` of assert_as_close

    def check(self, run, modules, x):
        check(run, modules, x, self.bfloat16_factor if x.dtype == torch.bfloat16 else 4)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("residual", [True, False])
    def test_dtypes(self, dtype, form, residual):
        layers, x = make_stage((2, 12, 9, 10), 3, 4, dtype, form)
        self.check(layer_step(residual), layers, x)

    @pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
    def test_depths(self, depth):
        check_layers_and_blocks((2, 4, 3, 4), depth, 2)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("skip", [(0,), (1, 2), (3,)])
    def test_layers_that_only_provide(self, skip, form, calls):
        layers, x = make_stage((2, 6, 3, 4), 4, 3, torch.float32, form)
        self.check(layer_step(skip=skip), layers, x)
        assert calls.count("layer") == 4

    @pytest.mark.parametrize("losses", [("kl",), ("weights",), ("first",), ("kl", "out")], ids=str)
    def test_gradients_that_do_not_arrive(self, losses):
        layers, x = make_stage((2, 6, 3, 4), 3, 3, torch.float32)
        self.check(layer_step(losses=losses), layers, x)

    def test_gradients_that_are_not_wanted(self):
        layers, x = make_stage((2, 6, 3, 4), 4, 3, torch.float32)
        layers[0].Wv.weight.requires_grad_(False)
        layers[1].Wq.weight.requires_grad_(False)
        layers[2].Wk.weight.requires_grad_(False)
        layers[3].requires_grad_(False)
        self.check(layer_step(), layers, x)
        self.check(layer_step(), layers, x.detach())
        for layer in layers:
            layer.Wv.weight.requires_grad_(False)
        self.check(layer_step(), layers, x.detach())

    @pytest.mark.parametrize("size", [1, 3, 9])
    def test_sizes_of_the_filters_over_channels(self, size):
        layers = nn.ModuleList(ek.LayerAttention(6, 3, size) for _ in range(2))
        x = torch.randn(2, 6, 3, 4, requires_grad=True)
        self.check(layer_step(), layers, x)

    def test_maps_laid_out_otherwise(self):
        """A slice as input, gradients that are expanded, transposed or sliced, and layers of both memory formats."""
        layers, _ = make_stage((2, 6, 4, 5), 3, 3, torch.float32)
        wide = torch.randn(2, 9, 4, 5, requires_grad=True)

        def run(layers, wide):
            outs, _ = run_stage(layers, wide[:, 1:7], residual=False)
            loss = outs[0].sum() + outs[1].transpose(2, 3).contiguous().square().sum()
            return gradients(loss + outs[2][:, ::2].sum(), [wide, *layers.parameters()])

        self.check(run, layers, wide)
        self.check(run, layers, wide.detach().contiguous(memory_format=FORMS[1]).requires_grad_())

        def in_turns(layers, x):
            history, y = ek.LayerHistory(), x
            for i, layer in enumerate(layers):
                y = layer(y.contiguous(memory_format=FORMS[i % 2]), history, residual=True)
            return [y, *gradients(y.square().sum(), [x, *layers.parameters()])]

        self.check(in_turns, *make_stage((2, 8, 2, 4), 3, 4, torch.float32))

    def test_other_users_of_the_history(self):
        """Pairs given by hand, and a later layer that eager PyTorch serves, on one history."""
        layers, x = make_stage((2, 6, 3, 4), 4, 3, torch.float32)

        def run(layers, x):
            history = ek.LayerHistory()
            y = layers[0](x, history, residual=True)
            q = y.mean((2, 3))
            y = y + history.attend(q, q.sin(), (2 * x).tanh(), heads=2)
            y = layers[2](layers[1](y, history, residual=True), history, residual=True)
            with ek.use_backend("eager"):
                y = layers[3](y, history, residual=True)
            loss = y.square().sum() + history.values[0].sin().sum() + history.keys[2].sum()
            return [y, *gradients(loss, [x, *layers.parameters()])]

        self.check(run, layers, x)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes_of_blocks(self, dtype, form):
        def run(blocks, x):
            outs, _ = run_blocks(blocks, x)
            return [
                outs[-1],
                *gradients(outs[-1].float().square().sum(), [x, *blocks.parameters()]),
            ]

        self.check(run, *make_blocks((4, 12, 9, 10), 2, 4, dtype, form))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        "options",
        [
            {"norm_layer": lambda c: nn.BatchNorm2d(c, affine=False)},
            {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=0.4, eps=0.1)},
            {"act_layer": nn.Identity},
        ],
        ids=["no parameters", "momentum", "no activation"],
    )
    def test_kinds_of_blocks(self, options, training):
        blocks, x = make_blocks((2, 6, 3, 4), 2, 3, torch.float32, **options)
        blocks.train(training)
        self.check(step, blocks, x)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_dropped_samples(self, form):
        blocks, x = make_blocks((6, 6, 3, 4), 2, 3, torch.float32, form, drop_path=0.4)
        found = step(blocks, x)
        with ek.use_backend("eager"):  # in the same dtype: another draws other samples
            expected = step(blocks, x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_statistics_of_values_far_from_zero(self, form):
        """A difference of two large sums would lose the variance: 1e4 squared times a float's precision is ten."""
        x = (1e4 + torch.randn(4, 8, 10, 15)).contiguous(memory_format=form)
        center = torch.zeros(8, 1, 3, 3)
        center[:, :, 1, 1] = 1.0
        ones = torch.ones(1, 1, 1)
        kernels = KERNELS[self.backend]
        norm = NormAct(None, None, None, None, 1e-5, True)
        r = kernels.layer(x, Filters(ones, ones, center), (), (), 2, 1.0, None, norm)
        mean, variance = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(r.statistics[0], mean.float(), rtol=1e-6, atol=0)
        # The values themselves are rounded to 1e-3.
        torch.testing.assert_close(r.statistics[1], variance.float(), rtol=1e-3, atol=0)

    def test_nan_passes_the_activation(self):
        o = torch.zeros(1, 2, 2, 2)
        o[0, 0, 0, 0] = torch.nan
        norm = NormAct(None, None, torch.ones(2, 2), None, 1e-5, True)
        out = KERNELS[self.backend].norm_forward(o, o, norm.statistics, norm)
        assert out[0, 0, 0, 0].isnan()
        assert not out[0, 1].isnan().any()

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode, calls):
        def run(blocks, x):
            with mode():
                return [run_blocks(blocks.eval(), x)[0][-1]]

        blocks, x = make_blocks((2, 6, 3, 4), 2, 3, torch.float32)
        self.check(run, blocks, x.detach())
        assert calls == ["layer", "norm_forward"] * 2

    def test_maps_without_elements_go_to_the_modules(self, calls):
        layers, x = make_stage((0, 6, 3, 4), 2, 3, torch.float32)
        assert run_stage(layers, x)[0][-1].shape == x.shape
        assert not calls
