"""Layers of several dtypes in one history: promoted as the published form's concatenation and products promote."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.layer_stages import gradients

import ela_kernels as ek
from ela_kernels.modules.published import ConcatHistory, ConcatLayerAttention

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
CHANNELS, HEAD_DIM = 8, 4

# A layer: the dtype of its parameters and input, and the one of autocast around it, if any.
IN = {
    "f32": (F32, None),
    "bf16": (BF16, None),
    "f16": (F16, None),
    "f64": (F64, None),
    "bf16 autocast": (F32, BF16),
    "f16 autocast": (F32, F16),
    "f64 in bf16 autocast": (F64, BF16),
}
RUNS = [
    ("bf16 autocast", "f32", "bf16 autocast"),  # autocast(enabled=False) inside of a stage
    ("bf16 autocast", "bf16 autocast", "f32", "f32"),
    ("bf16", "f32", "f64"),
    ("f32", "bf16 autocast", "f32"),
    ("f32", "f64"),
    ("f16", "f32", "bf16 autocast"),
    ("f16 autocast", "f32", "f16 autocast", "f64"),
    ("bf16 autocast", "f64 in bf16 autocast", "f64"),
]
REFUSED = [
    ("f32", "bf16"),
    ("f32", "f16"),
    ("bf16", "f16"),
    ("bf16 autocast", "f16 autocast"),
    ("f64", "f32"),
    ("f64", "bf16 autocast"),
    ("bf16 autocast", "f32", "bf16"),
]


def autocast(dtype):
    return torch.autocast("cpu", dtype or BF16, enabled=dtype is not None)


def make_run(names):
    """Weights and input of each layer."""
    torch.manual_seed(5)
    layers = [ConcatLayerAttention(CHANNELS, HEAD_DIM).state_dict() for _ in names]
    return layers, [torch.randn(2, CHANNELS, 3, 5) for _ in names]


def run(kind, names, weights, inputs, exact=False):
    """Outputs, gradients, weights and divergence of the last layer."""
    history = ConcatHistory() if kind is ConcatLayerAttention else ek.LayerHistory()
    outs, leaves = [], []
    for name, state, x in zip(names, weights, inputs, strict=True):
        dtype, cast = IN[name]
        layer = kind(CHANNELS, HEAD_DIM)
        layer.load_state_dict(state)
        layer.to(dtype)
        x = x.to(dtype)
        if exact:
            layer, x, cast = layer.double(), x.double(), None
        x.requires_grad_()
        with autocast(cast):
            outs.append(layer(x, history))
        leaves += [x, *layer.parameters()]
    loss = sum(o.double().square().sum() for o in outs)
    return outs, gradients(loss, leaves), history.weights, history.kl


def error(found, exact):
    return (found.double() - exact).abs().max()


@pytest.mark.parametrize("names", RUNS, ids=" then ".join)
def test_a_stage_promotes_as_the_published_form_does(backend, names):
    stage = make_run(names)
    found = run(ek.LayerAttention, names, *stage)
    published = run(ConcatLayerAttention, names, *stage)
    exact = run(ek.LayerAttention, names, *stage, exact=True)
    for a, b, c in zip(found[0], published[0], exact[0], strict=True):
        assert a.dtype == b.dtype
        assert error(a, c) <= 1.5 * error(b, c) + 4 * torch.finfo(a.dtype).eps * c.abs().max()
    for a, b, c in zip(found[1], published[1], exact[1], strict=True):
        assert a.dtype == b.dtype
        assert error(a, c) <= 2 * error(b, c) + 0.02 * c.abs().max()
    for a, b, c in zip(found[2:], published[2:], exact[2:], strict=True):
        assert error(a, c) <= 2 * error(b, c) + torch.finfo(found[0][-1].dtype).eps * c.abs().max()


@pytest.mark.parametrize("names", REFUSED, ids=" then ".join)
def test_what_the_published_form_refuses_is_refused_by_name(backend, names):
    stage = make_run(names)
    with pytest.raises(RuntimeError):
        run(ConcatLayerAttention, names, *stage)
    with pytest.raises(
        ValueError, match=r"^q: got torch\.\w+ for a history of torch\.\w+; allowed is"
    ):
        run(ek.LayerAttention, names, *stage)


def test_a_wider_layer_loses_nothing(backend):
    """Values of half precision read by a layer of float32 are those of a history in float32."""
    q, k = torch.randn(2, CHANNELS), torch.randn(2, CHANNELS)
    old_k, old_v, v = (
        k.bfloat16(),
        torch.randn(2, CHANNELS, 7).bfloat16(),
        torch.randn(2, CHANNELS, 7),
    )
    mixed, wide = ek.LayerHistory(), ek.LayerHistory()
    mixed.provide(old_k, old_v, heads=2)
    wide.provide(old_k.float(), old_v.float(), heads=2)
    found, expected = (h.attend(q, k, v, heads=2) for h in (mixed, wide))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_previous_weights_are_promoted():
    q, v = torch.randn(2, CHANNELS), torch.randn(2, CHANNELS, 7)
    history, wide = ek.LayerHistory(), ek.LayerHistory()
    for h, dtype in ((history, F32), (wide, F64)):
        h.attend(q.to(dtype), q.to(dtype), v.to(dtype), heads=2)
        h.attend(q.double(), -q.double(), v.double(), heads=2)
    assert history.kl.dtype == F64
    torch.testing.assert_close(history.kl, wide.kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_blocks_and_skipped_layers(backend, grad):
    """A stage under autocast with one block outside of it, with and without gradients."""
    torch.manual_seed(2)
    blocks = [ek.ELA(CHANNELS, HEAD_DIM) for _ in range(4)]
    blocks[2].skipped = True
    x = torch.randn(2, CHANNELS, 3, 5, requires_grad=True)

    def stage(casts):
        y, history = x, ek.LayerHistory()
        with torch.set_grad_enabled(grad):
            for block, cast in zip(blocks, casts, strict=True):
                with autocast(BF16 if cast else None):
                    y = block(y, history)
        return y.detach(), history, torch.autograd.grad(y.sum(), x)[0] if grad else x

    found, history, found_gradient = stage([True, False, False, True])
    expected, _, expected_gradient = stage([False] * 4)
    assert [v.dtype for v in history.values] == [BF16, F32, F32, BF16]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=0.2, atol=0.2)


def test_a_probe_among_several_dtypes(backend):
    q, v = torch.randn(2, CHANNELS), torch.randn(2, CHANNELS, 7)
    history = ek.LayerHistory()
    history.attend(q.bfloat16(), q.bfloat16(), v.bfloat16(), heads=2)
    found = history.probe(q, -q, heads=2)
    history.attend(q, -q, v, heads=2)
    torch.testing.assert_close(found.weights, history.weights)
    torch.testing.assert_close(found.kl, history.kl)


def test_from_there_on_the_functional_op_serves(kernels, ran):
    def attend(history, dtype):
        q, k, v = (torch.randn(s, dtype=dtype) for s in ((2, 8), (2, 8), (2, 8, 7)))
        return history.attend(q.requires_grad_(), k, v.requires_grad_(), heads=2)

    history = ek.LayerHistory()
    outs = [attend(history, dtype) for dtype in (BF16, F32, F64)]
    assert ran == ["cpp forward"] * 3
    sum(o.double().sum() for o in outs).backward()
    assert ran.count("cpp gather") == 1  # of the first layer alone


@pytest.mark.parametrize("compiled", [False, True])
def test_without_kernels_and_compiled(compiled):
    def stage(q, v):
        history = ek.LayerHistory()
        history.attend(q.bfloat16(), q.bfloat16(), v.bfloat16(), heads=2)
        return history.attend(q, -q, v, heads=2)

    q, v = torch.randn(2, CHANNELS), torch.randn(2, CHANNELS, 7)
    run_it = torch.compile(stage, fullgraph=True, backend="eager") if compiled else stage
    context = contextlib.nullcontext() if compiled else ek.use_backend("eager")
    with context:
        found = run_it(q, v)
    torch.testing.assert_close(found, stage(q, v), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["eager", "auto"])
def setting(request):
    """Kernels serve one dtype only: a forced backend refuses what is mixed, and `auto` lets PyTorch promote it."""
    with ek.use_backend(request.param):
        yield request.param


class TestLight:
    def test_a_forced_backend_refuses_what_is_mixed(self, kernels):
        layer = ek.LightLayerAttention(CHANNELS, HEAD_DIM)
        x = torch.randn(2, CHANNELS, 3, 5)
        with (
            ek.use_backend("cpp"),
            pytest.raises(ValueError, match=r"is torch\.float64, and the layer"),
        ):
            layer(x, x.double())

    def test_the_previous_output_is_promoted(self, setting):
        layer = ek.LightLayerAttention(CHANNELS, HEAD_DIM)
        x, prev = (torch.randn(2, CHANNELS, 3, 5, requires_grad=True) for _ in range(2))
        half = prev.detach().bfloat16().requires_grad_()
        found = layer(x, half)
        torch.testing.assert_close(found, layer(x, half.float()))
        found.sum().backward()
        assert half.grad.dtype == BF16
        assert layer(x, prev.double()).dtype == F64

    def test_the_value_is_promoted(self, setting):
        layer = ek.LightLayerAttention(CHANNELS, HEAD_DIM).bfloat16()
        x, prev = torch.randn(2, CHANNELS, 3, 5).bfloat16(), torch.randn(2, CHANNELS, 3, 5)
        found = layer(x, prev)
        assert found.dtype == F32
        gated = layer(x, torch.zeros_like(x)).float()
        expected = gated + layer.lambda_t.float() * prev
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

    def test_under_autocast_float64_stays(self, setting):
        layer = ek.LightLayerAttention(CHANNELS, HEAD_DIM)
        x = torch.randn(2, CHANNELS, 3, 5)
        with autocast(BF16):
            assert layer(x, x).dtype == BF16
            assert layer(x, x.double()).dtype == F64

    def test_an_integer_is_refused(self):
        layer = ek.LightLayerAttention(CHANNELS, HEAD_DIM)
        x = torch.randn(2, CHANNELS, 3, 5)
        with pytest.raises(TypeError, match=r"^prev_out: got dtype torch\.int64; allowed is"):
            layer(x, x.long())
