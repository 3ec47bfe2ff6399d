"""The pull form on the Triton kernels: a stage's gradients equal those of the eager formula."""

from __future__ import annotations

import pytest
import torch
from support.history_stages import all_inputs, grads, make_layers, run_stage
from support.stage_forms import check_freed_after_a_failed_pass

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS

pytestmark = pytest.mark.usefixtures("few_programs")

# Float32 on both sides: sums of a few hundred products of order one and their gradients through at most five layers.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def on_both(run):
    found = run()
    with ek.use_backend("eager"):
        expected = run()
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("skip", [(), (1,), (0, 3)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_stage(skip, form):
    layers, x = make_layers(5, skip=skip, dtype=torch.float32)
    x = x.detach().contiguous(memory_format=form).requires_grad_()

    def run():
        outs, weights, kls = run_stage(layers, x)
        loss = outs[-1].square().sum() + outs[1].sum()
        loss = loss + sum(w.square().sum() for w in weights if w is not None)
        loss = loss + sum(kl.sum() for kl in kls if kl is not None)
        return [outs[-1].detach(), *grads(loss, all_inputs(layers, x))]

    on_both(run)


def test_outputs_that_the_loss_leaves_out():
    layers, x = make_layers(4, dtype=torch.float32)
    on_both(lambda: grads(run_stage(layers, x)[0][1].sum(), [x]))


def test_the_kernels_ran(monkeypatch):
    calls, triton = [], KERNELS["triton"]
    for name in ("attend", "attend_backward", "gather"):
        real = getattr(triton, name)
        monkeypatch.setattr(
            triton, name, lambda *a, n=name, r=real, **k: (calls.append(n), r(*a, **k))[1]
        )
    layers, x = make_layers(3, dtype=torch.float32)
    run_stage(layers, x)[0][-1].sum().backward()
    assert calls == ["attend"] * 3 + ["attend_backward", "gather"] * 3


@pytest.mark.parametrize("form", ["op", "layer", "block"])
def test_a_failed_pass_leaves_nothing(form):
    check_freed_after_a_failed_pass(form)
