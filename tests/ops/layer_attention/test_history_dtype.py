"""LayerHistory(dtype=...): what is held, by whom it is read, and what it does beside everything else a history does."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from support.held_stages import BF16, SHAPE, assert_near, held_dtypes, run, stage
from support.held_values import HALVES, check_against_float64
from support.layer_stages import gradients, make_blocks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels import explaining
from ela_kernels.backends.setting import current_setting
from ela_kernels.ops.layer_attention.held import rounded

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("bfloat16", TypeError, "dtype: got str; allowed is torch.bfloat16, torch.float16 or None"),
        (torch.float32, ValueError, "dtype: got torch.float32; allowed is torch.bfloat16 or"),
        (torch.int8, ValueError, "dtype: got torch.int8; allowed is torch.bfloat16 or"),
    ],
)
def test_what_is_refused(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ek.LayerHistory(dtype=given)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_of_the_rounding_is_the_identity(dtype: torch.dtype) -> None:
    v = torch.randn(50, requires_grad=True)
    given = torch.randn(50)
    rounded(v, dtype).backward(given)
    assert torch.equal(v.grad, given)
    assert not torch.equal(given, given.to(dtype).float())
    assert torch.equal(rounded(v, dtype), v.to(dtype).float())
    double = v.detach().double()
    found, tangent = torch.func.jvp(lambda t: rounded(t, dtype), (double,), (double * 2,))
    assert torch.equal(found, double.to(dtype).double())
    assert torch.equal(tangent, double * 2)
    assert torch.equal(torch.func.vmap(lambda t: rounded(t, dtype))(double), found)


def test_values_take_half_the_memory() -> None:
    x = torch.randn(2, 8, 16, 16)
    layers = [ek.LayerAttention(8, 4) for _ in range(3)]
    sizes = {}
    for dtype in (None, BF16):
        history, y = ek.LayerHistory(dtype=dtype), x
        for layer in layers:
            y = layer(y, history, residual=True)
        pairs = history._now.pairs
        tensors = [t for t in (*pairs.values, *pairs.stand_ins) if t is not None]
        sizes[dtype] = sum(t.untyped_storage().nbytes() for t in tensors)
        assert all(t is not None for t in pairs.stand_ins)
    assert sizes[None] == 3 * 4 * x.numel()
    assert sizes[BF16] == 3 * 2 * x.numel() + 3 * 4


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["layer", "block"])
@pytest.mark.parametrize("recomputed", ["all", "some"])
def test_checkpoints(kind: str, dtype: torch.dtype, recomputed: str) -> None:
    modules, x = stage(kind)

    def through(module: nn.Module, y: Tensor, history: ek.LayerHistory) -> Tensor:
        if recomputed == "some" and module in (modules[0], modules[2]):
            return module(y, history)
        return checkpoint(module, y, history, use_reentrant=False)

    plain = run(copy.deepcopy(modules), x, ek.LayerHistory(dtype=dtype))
    history = ek.LayerHistory(dtype=dtype)
    found = run(modules, x, history, through)
    assert held_dtypes(history) == {dtype}
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("first", ["kernels", "eager"])
@pytest.mark.parametrize("kind", ["op", "layer"])
def test_layers_that_no_kernel_serves(dtype: torch.dtype, first: str, kind: str) -> None:
    """What was held for kernels is read by eager PyTorch, with its gradients, and the other way round."""
    modules, x = stage(kind, 4)

    def run_in_turns(modules: Any, x: Tensor, history: ek.LayerHistory) -> list[Tensor]:
        y, usual = x, current_setting()  # eager, where what was held is replayed
        for i, module in enumerate(modules):
            eager = (i % 2 == 1) == (first == "kernels")
            with ek.use_backend("eager" if eager else usual):
                y = module(y, history)
        loss = y.square().sum() + history.kl.sum()
        return [y.detach(), *gradients(loss, [x, *modules.parameters()])]

    check_against_float64(run_in_turns, modules, x, dtype)


def test_a_layer_with_a_hook_is_served_by_pieces_and_holds_the_same() -> None:
    modules, x = stage("block")
    plain = run(copy.deepcopy(modules), x, ek.LayerHistory(dtype=BF16))
    modules[1].attn.Wv.register_forward_hook(lambda *_: None)
    history = ek.LayerHistory(dtype=BF16)
    found = run(modules, x, history)
    assert held_dtypes(history) == {BF16}
    # A convolution in another order moves some values by a digit of bfloat16.
    assert_near(found, plain, 2e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    modules, x = stage("block")
    expected = run(copy.deepcopy(modules), x, ek.LayerHistory(dtype=BF16))[0]
    history = ek.LayerHistory(dtype=BF16)
    with mode():
        y = x
        for module in modules:
            y = module(y, history)
        assert held_dtypes(history) == {BF16}
        assert history._now.pairs.stand_ins == (None,) * 4
        assert torch.equal(y, expected)
        with ek.use_backend("eager"):
            modules[0](y, history)
        assert held_dtypes(history) == {torch.float32}
        assert {v.dtype for v in history.values} == {BF16}


@pytest.mark.parametrize("wide", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", HALVES)
def test_networks_of_other_dtypes(wide: torch.dtype, dtype: torch.dtype) -> None:
    """Float64 is rounded and held wide, and told; half precision stays as it is."""
    modules, x = stage("block", 3, wide)
    history = ek.LayerHistory(dtype=dtype)
    found = ek.explain(modules[0], x, ek.LayerHistory(dtype=dtype))[0]
    out = run(modules, x, history)
    if wide == torch.float64:
        assert held_dtypes(history) == {wide}
        assert {v.dtype for v in history.values} == {dtype}
        reason = f"cpp: it has no kernels for values held in {dtype} by layers in torch.float64"
        assert reason in found.reasons["held"]
        check_against_float64(run, *stage("block", 3, wide), dtype)
    else:
        assert (held_dtypes(history), found.form) == ({wide}, "block")
        plain = run(copy.deepcopy(stage("block", 3, wide)[0]), x, ek.LayerHistory())
        for a, b in zip(out, plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype: torch.dtype) -> None:
    """Its layers' values are of half precision already."""
    modules, x = stage("layer", 3)
    results = []
    for given in (None, dtype):
        history = ek.LayerHistory(dtype=given)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(copy.deepcopy(modules), x, history))
        assert held_dtypes(history) == {torch.bfloat16}
        assert not history._now.pairs.stand_ins
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_layers_of_two_dtypes() -> None:
    """A float64 layer after float32 ones reads what they hold, promoted, with the gradients."""
    modules, x = stage("layer", 3)
    modules[2].double()
    history = ek.LayerHistory(dtype=BF16)
    y = modules[1](modules[0](x, history), history)
    values = [v.double() for v in history.values]
    out = modules[2](y.double(), history)
    assert {v.dtype for v in history.values} == {BF16}
    weights = history.weights.repeat_interleave(3, 1)[..., None, None]
    read = (*values, history._now.pairs.values[2])
    expected = sum(weights[:, :, j] * v for j, v in enumerate(read))
    torch.testing.assert_close(out, expected)
    (found,) = torch.autograd.grad(out.sum(), modules[0].Wv.weight)
    assert found.count_nonzero() == found.numel()


@pytest.mark.parametrize("skip", ["reuse", "retrieval", "layer"])
def test_skipped_blocks(skip: str) -> None:
    blocks, x = make_blocks(SHAPE, 5, 3, torch.float32, skip=skip)
    for i in (1, 3):
        blocks[i].skipped = True
    check_against_float64(run, blocks, x, BF16)


@pytest.mark.usefixtures("no_graph_was_compiled")
def test_a_pair_that_waits() -> None:
    """After a pass in which nobody read it, a skipped layer's pair is made only where somebody does."""
    blocks, x = make_blocks(SHAPE, 3, 3, torch.float32, skip="reuse")
    for block in blocks[1:]:
        block.skipped = True
    run(blocks, x, ek.LayerHistory(dtype=BF16))
    history, y = ek.LayerHistory(dtype=BF16), x
    for block in blocks:
        y = block(y, history)
    assert len(history._now.pairs.values) == 1
    assert len(history.values) == 3
    assert held_dtypes(history) == {BF16}


def test_monitoring_and_pruning() -> None:
    blocks, x = make_blocks(SHAPE, 4, 3, torch.float32)
    ebqm = ek.EBQM(blocks, warmup=0, interval=1)
    for _ in range(2):
        run(blocks, x, ek.LayerHistory(dtype=BF16))
        ebqm.step()
    blocks[1].skipped = blocks[2].skipped = True
    run(blocks, x, ek.LayerHistory(dtype=BF16))
    expected = run(copy.deepcopy(blocks).eval(), x, ek.LayerHistory(dtype=BF16))[0]
    pruned = ek.prune(blocks)
    found = run(pruned.eval(), x, ek.LayerHistory(dtype=BF16))[0]
    assert_near([found], [expected])


def test_what_is_held_has_gradients_to_who_made_it() -> None:
    modules, x = stage("layer", 2)
    history, other = ek.LayerHistory(dtype=BF16), ek.LayerHistory()
    for one in (history, other):
        modules[1](modules[0](x, one), one)
    inputs = [modules[0].Wv.weight, x]
    found = gradients(sum(v.float().sum() for v in history.values), inputs)
    expected = gradients(sum(v.sum() for v in other.values), inputs)
    assert_near(found, expected, 2e-3)


def test_changed_in_place() -> None:
    modules, x = stage("layer", 2)
    history = ek.LayerHistory(dtype=BF16)
    with torch.no_grad():
        modules[0](x, history)
        history.values[0].zero_()
        with pytest.raises(RuntimeError, match="key or value of layer 0 was changed in place"):
            modules[1](x, history)


def test_two_continuations() -> None:
    modules, x = stage("layer", 3)
    results = []
    for dtype in (BF16, BF16):
        history = ek.LayerHistory(dtype=dtype)
        modules[0](x, history)
        begun = history.latest
        first = modules[1](x, history)
        other = history.at(begun)
        second = modules[2](x, other)
        results.append(gradients(first.sum() + second.square().sum(), [x, *modules.parameters()]))
        assert len(other.values) == len(history.values) == 2
        assert held_dtypes(other) == {BF16}
    alone = []
    for take, square in ((1, False), (2, True)):
        history = ek.LayerHistory(dtype=BF16)
        modules[0](x, history)
        out = modules[take](x, history)
        loss = (out.square() if square else out).sum()
        alone.append(gradients(loss, [x, *modules.parameters()]))
    assert_near(results[0], [a + b for a, b in zip(*alone, strict=True)])


def test_nothing_is_kept_alive() -> None:
    modules, x = stage("block", 3)
    history, y = ek.LayerHistory(dtype=BF16), x
    for module in modules:
        y = module(y, history)
    kept = [weakref.ref(v.untyped_storage()) for v in history._now.pairs.values]
    y.sum().backward()
    del history, y
    gc.collect()
    assert all(r() is None for r in kept)


def test_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no memory is saved; not where eager PyTorch was asked for, nor in half precision."""
    monkeypatch.setattr(explaining, "_told", type(explaining._told)())
    modules, x = stage("layer", 2, torch.float64)
    with caplog.at_level(logging.WARNING, "ela_kernels"):
        with ek.use_backend("eager"):
            run(modules, x, ek.LayerHistory(dtype=BF16))
        run(*stage("layer", 2, torch.bfloat16), ek.LayerHistory(dtype=BF16))
        run(*stage("layer", 2), ek.LayerHistory(dtype=BF16))
        assert not caplog.records
        run(modules, x, ek.LayerHistory(dtype=BF16))
        run(modules, x, ek.LayerHistory(dtype=BF16))
    told = [r.getMessage() for r in caplog.records if "saves no memory" in r.getMessage()]
    assert len(told) == 1
    assert (
        "it has no kernels for values held in torch.bfloat16 by layers in torch.float64" in told[0]
    )
