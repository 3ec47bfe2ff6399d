"""Hooks on saved tensors: what they give back is used, or refused; a kernel reads nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_stages import (
    FORMS,
    layer_step,
    light_step,
    make_blocks,
    make_light_blocks,
    make_stage,
    step,
)
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import ela_kernels as ek
from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

KINDS = {
    "layer": (make_stage, layer_step),
    "block": (make_blocks, step),
    "light_block": (make_light_blocks, light_step),
}


def stage(kind, form=FORMS[0]):
    make, run = KINDS[kind]
    modules, x = make((2, 6, 4, 5), 3, 3)
    x = x.detach().contiguous(memory_format=form).requires_grad_()
    return lambda: run(copy.deepcopy(modules), x)


def same(t):
    return t


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "hooks",
    [
        save_on_cpu,
        lambda: saved_tensors_hooks(lambda t: torch.stack((t, t), -1), lambda t: t[..., 0]),
        lambda: saved_tensors_hooks(
            lambda t: t.contiguous(memory_format=FORMS[1]) if t.dim() == 4 else t, same
        ),
        lambda: saved_tensors_hooks(lambda t: -t, torch._neg_view),
    ],
    ids=["on the CPU", "strided", "interleaved", "negated"],
)
def test_the_same_numbers_however_they_lie(both_ways, hooks, kind, form):
    run = stage(kind, form)
    plain = run()

    def hooked():
        with hooks():
            return run()

    found = both_ways(hooked, **{kind: 3})
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 6, 3, 4), (2, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("dim", [1, -1])
def test_a_position_history_whose_tensors_come_back_with_gaps(shape, dim):
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query = torch.randn(6, dtype=torch.float64, requires_grad=True)
    gaps = saved_tensors_hooks(
        lambda t: torch.stack((t, t), min(dim, t.dim())),
        lambda t: t.select(min(dim, t.dim() - 1), 0),
    )

    def gradients():
        history, total = ek.PositionHistory(), 0
        for value in values:
            history.append(value)
            total = total + history.attend(query).sin().sum()
        return torch.autograd.grad(total, [query, *values])

    with ek.use_backend("cpp"):
        plain = gradients()
        with gaps:
            found = gradients()
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_were_rounded(both_ways, kind):
    """Rounded before they are kept, the same ones with the kernels and without."""
    run = stage(kind)

    def hooked():
        with saved_tensors_hooks(lambda t: (t.float(), t.dtype), lambda kept: kept[0].to(kept[1])):
            return run()

    both_ways(hooked, rtol=1e-4, atol=1e-4, **{kind: 3})


@pytest.mark.parametrize("kind", [*KINDS, "op"])
@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (lambda t: t.float(), "torch.float32"),
        (lambda t: t.bfloat16(), "torch.bfloat16"),
        (lambda t: t[..., :1].clone(), "got"),
    ],
    ids=["float32", "bfloat16", "cut"],
)
def test_other_numbers_are_refused(kind, pack, words):
    def op():
        q, k, v = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 6, 4, 5)
        maps = [t.double().requires_grad_() for t in (q, k, v)]
        out = ek.LayerHistory().attend(*maps, heads=2)
        out = out + ek.layer_attention(maps[0], maps[1:2], maps[2:], heads=2).out
        out.square().sum().backward()

    run = op if kind == "op" else stage(kind)
    with (
        pytest.raises(RuntimeError, match=f"saved_tensors_hooks: .*{words}"),
        saved_tensors_hooks(pack, same),
    ):
        run()
