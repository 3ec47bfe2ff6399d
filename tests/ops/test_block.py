"""The kernels of a whole residual block against ELA's own modules: outputs, gradients, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_stages import (
    FORMS,
    assert_as_close,
    gradients,
    make_blocks,
    run_blocks,
    step,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.dispatch import Refusal
from ela_kernels.backends.extension import extension
from ela_kernels.backends.types import Filters, NormAct

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

# Both sides in float64: sums of up to a few thousand products through a few layers and norms, 1e-16 each.
EXACT = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture
def compare(monkeypatch):
    """Runs a function with the kernels of a whole block and without, and compares all tensors that it returns."""

    def on_both(run, calls=3, tolerance=EXACT):
        made = []
        real = ek.LayerHistory.attend_layer

        def counted(*args, **options):
            if isinstance(options["epilogue"], NormAct):
                made.append(1)
            return real(*args, **options)

        monkeypatch.setattr(ek.LayerHistory, "attend_layer", counted)
        found = run()
        assert len(made) == calls
        with monkeypatch.context() as patch:
            patch.setattr(ek.LayerHistory, "plan_layer", lambda *a, **k: Refusal(("a test",), None))
            made.clear()
            expected = run()
            assert not made
        assert len(found) == len(expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.dtype == b.dtype, i
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, i=i: f"{i}: {m}")

    return on_both


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [
        ((2, 6, 1, 1), 2),
        ((2, 6, 3, 5), 2),
        ((3, 37, 7, 7), 37),
        ((2, 12, 9, 33), 1),
        ((5, 70, 17, 4), 14),
        ((1, 3, 56, 56), 3),
    ],
    ids=str,
)
def test_outputs_gradients_and_running_statistics(compare, shape, head_dim, training, form):
    blocks, x = make_blocks(shape, 3, head_dim, form=form)
    for norm in (block.norm for block in blocks):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    blocks.train(training)
    compare(lambda: step(blocks, x))


@pytest.mark.parametrize(
    "norm",
    [
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        lambda c: nn.BatchNorm2d(c, momentum=None),
        lambda c: nn.BatchNorm2d(c, momentum=0.4, eps=0.1),
    ],
    ids=["no parameters", "not tracked", "cumulative", "momentum"],
)
@pytest.mark.parametrize("training", [True, False])
def test_kinds_of_norm(compare, norm, training):
    blocks, x = make_blocks((2, 6, 4, 5), 3, 3, norm_layer=norm)
    blocks.train(training)

    def run():
        twice = copy.deepcopy(blocks)
        run_blocks(twice, x)  # a second update of what is tracked
        return step(twice, x)

    compare(run, calls=6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("drop_path", [0.3, 1.0])
def test_drop_path_draws_the_same_samples(compare, drop_path, form):
    blocks, x = make_blocks((6, 6, 4, 5), 3, 3, drop_path=drop_path, form=form)
    compare(lambda: step(blocks, x))


def test_without_activation(compare):
    blocks, x = make_blocks((2, 6, 4, 5), 3, 3, act_layer=nn.Identity)
    compare(lambda: step(blocks, x))


def test_frozen_parameters_and_frozen_norms(compare):
    blocks, x = make_blocks((2, 6, 4, 5), 3, 3)
    blocks[0].norm.weight.requires_grad_(False)
    blocks[1].norm.bias.requires_grad_(False)
    blocks[1].attn.Wv.weight.requires_grad_(False)
    blocks[2].norm.eval()
    compare(lambda: step(blocks, x))


def test_skipped_blocks(compare):
    blocks, x = make_blocks((2, 6, 4, 5), 4, 3)
    blocks[1].skipped = True
    compare(lambda: step(blocks, x))


def test_checkpointing(compare):
    blocks, x = make_blocks((2, 6, 4, 5), 3, 3)

    def run():
        outs, _ = run_blocks(blocks, x, lambda f, *a: checkpoint(f, *a, use_reentrant=False))
        return [outs[-1], *gradients(outs[-1].square().sum(), [x, *blocks.parameters()])]

    compare(run, calls=6)


def test_parts_of_a_retained_graph(compare):
    blocks, x = make_blocks((2, 6, 4, 5), 3, 3)

    def run():
        outs, history = run_blocks(blocks, x)
        wanted = [x, *blocks.parameters()]
        first = gradients(outs[1].square().sum(), wanted, retain_graph=True)
        whole = gradients(outs[-1].square().sum(), wanted, retain_graph=True)
        return [*first, *whole, *gradients(history.kl.sum(), wanted)]

    compare(run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(compare, mode):
    blocks, x = make_blocks((2, 6, 4, 5), 3, 3)
    blocks.eval()

    def run():
        with mode():
            return [run_blocks(blocks, x.detach())[0][-1]]

    compare(run)


def test_what_is_not_passed_by(compare):
    """Other norms and activations, hooks, and a batch that has no variance."""

    def check(change):
        blocks, x = make_blocks((2, 6, 4, 5), 1, 3)
        change(blocks[0])
        compare(lambda: step(blocks, x), calls=0)

    check(lambda b: setattr(b, "norm", nn.GroupNorm(2, 6).double()))
    check(lambda b: setattr(b, "norm", nn.SyncBatchNorm(6).double().eval()))
    check(lambda b: setattr(b, "act", nn.GELU()))
    check(lambda b: b.norm.register_forward_hook(lambda *a: None))
    check(lambda b: b.act.register_forward_pre_hook(lambda *a: None))
    check(lambda b: b.drop_path.register_forward_hook(lambda *a: None))
    check(lambda b: b.attn.register_full_backward_hook(lambda *a: None))
    check(lambda b: b.attn.Wv.register_forward_hook(lambda *a: None))
    blocks, x = make_blocks((1, 6, 1, 1), 1, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run_blocks(blocks, x)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, form):
    blocks, x = make_blocks((4, 12, 9, 10), 3, 4, dtype, form)
    exact_blocks, exact_x = copy.deepcopy(blocks).double(), x.detach().double().requires_grad_()

    def run(blocks, x):
        outs, _ = run_blocks(blocks, x)
        return [outs[-1], *gradients(outs[-1].float().square().sum(), [x, *blocks.parameters()])]

    with ek.use_backend("eager"):
        expected, plain = run(exact_blocks, exact_x), run(copy.deepcopy(blocks), x)
    found = run(blocks, x)
    assert_as_close(found, plain, expected, dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_statistics_of_values_far_from_zero(form):
    """A difference of two large sums would lose the variance: 1e4 squared times a float's precision is ten."""
    from ela_kernels.backends.cpp.layer import layer

    x = (1e4 + torch.randn(4, 8, 20, 15)).contiguous(memory_format=form)
    center = torch.zeros(8, 1, 3, 3)
    center[:, :, 1, 1] = 1.0
    ones = torch.ones(1, 1, 1)
    norm = NormAct(None, None, None, None, 1e-5, True)
    r = layer(x, Filters(ones, ones, center), (), (), 2, 1.0, None, norm, True)
    torch.testing.assert_close(
        r.statistics[0], x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=0
    )
    variance = x.double().var((0, 2, 3), unbiased=False).float()
    # The values themselves are rounded to 1e-3.
    torch.testing.assert_close(r.statistics[1], variance, rtol=1e-3, atol=0)


def test_nan_passes_the_activation():
    blocks, x = make_blocks((2, 6, 4, 5), 1, 3)
    x = x.detach().clone()
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        assert run_blocks(blocks, x)[0][-1].isnan().any()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("batch", [3, 8])
def test_the_same_bits_on_any_number_of_threads(batch, form, monkeypatch):
    monkeypatch.setattr("ela_kernels.backends.cpp.attention._ONE_THREAD_ELEMENTS", 0)
    blocks, x = make_blocks((batch, 20, 19, 9), 3, 5, torch.float32, form)
    first = None
    for threads in (1, 2, 3, *[4] * 8):
        torch.set_num_threads(threads)
        found = step(blocks, x)
        first = found if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), threads
