"""What the kernels of a whole residual block may not pass by, and blocks on several threads.

What they compute is tested in tests/conformance.
"""

from __future__ import annotations

import pytest
import torch
from support.layer_stages import (
    FORMS,
    make_blocks,
    run_blocks,
    step,
)
from torch import nn

import ela_kernels as ek
from ela_kernels.backends.dispatch import Refusal
from ela_kernels.backends.extension import extension
from ela_kernels.backends.types import NormAct

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
