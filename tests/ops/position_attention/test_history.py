"""PositionHistory: the pull form gives the gradients of the functional op, whatever a network asks for."""

from __future__ import annotations

import pytest
import torch
from support.layouts import channels_last, contiguous, last_slice
from support.position_stages import DEPTH, LOSSES, Stage, gradients

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS

pytestmark = pytest.mark.usefixtures("cpp")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    ("shape", "layout", "last"),
    [
        ((2, 5, 6), contiguous, True),
        ((2, 6, 4, 3), contiguous, False),
        ((2, 6, 4, 3), channels_last, False),
        ((2, 6, 4, 3), last_slice, False),
    ],
    ids=["tokens", "planar", "interleaved", "sliced"],
)
def test_gradients_are_those_of_the_functional_op(shape, layout, last, loss):
    stage = Stage(shape, layout=layout, last=last)
    outs, found = gradients(stage, stage.pulled, loss)
    with ek.use_backend("eager"):
        expected_outs, expected = gradients(stage, stage.pushed, loss)
    torch.testing.assert_close(outs, expected_outs)
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_a_map_of_queries():
    values = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3)]
    query = torch.randn(2, 5, 6, dtype=torch.float64)

    def run(kind):
        leaves = [x.clone().requires_grad_() for x in (query, *values)]
        history, seen, total = ek.PositionHistory(), [], 0
        for v in leaves[1:]:
            seen.append(v * 1)
            history.append(seen[-1])
            out = (
                history.attend(leaves[0])
                if kind == "pull"
                else ek.position_attention(leaves[0], seen).out
            )
            total = total + out.sin().sum()
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(run("pull"), run("push"))


@pytest.fixture
def made(monkeypatch):
    names = []
    for name in ("position_attend", "position_attend_backward", "position_gather"):
        real = getattr(KERNELS["cpp"], name)

        def spied(*args, _real=real, _name=name):
            names.append(_name)
            return _real(*args)

        monkeypatch.setitem(vars(KERNELS["cpp"]), name, spied)
    return names


def test_a_values_gradient_is_gathered_once(made):
    stage = Stage()
    gradients(stage, stage.pulled, LOSSES["the last output"])
    assert made.count("position_attend") == made.count("position_attend_backward") == DEPTH
    assert made.count("position_gather") == DEPTH
    order = made[DEPTH:]
    assert order == ["position_attend_backward", "position_gather"] * DEPTH


def test_no_gradient_of_a_values_size_waits_for_another():
    """The push form makes T gradients of one value; here each is made once."""
    stage = Stage((1, 64, 256))
    sizes = []

    def loss(run):
        stage.fresh()
        outs, _ = run()
        return outs[-1].sum()

    for run in (stage.pulled, stage.pushed):
        total = loss(run)
        with torch.profiler.profile(profile_memory=True) as profile:
            total.backward()
        allocated = [e.self_cpu_memory_usage for e in profile.events()]
        sizes.append(sum(a for a in allocated if a > 0))
    assert sizes[0] < 0.8 * sizes[1]


def test_a_retained_graph_gives_the_same_twice():
    stage = Stage()
    leaves = stage.fresh()
    outs, _ = stage.pulled()
    first = torch.autograd.grad(outs[-1].sum(), leaves, retain_graph=True, allow_unused=True)
    middle = torch.autograd.grad(outs[1].sum(), leaves, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(outs[-1].sum(), leaves, allow_unused=True)
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(middle, first, strict=True))


def test_values_without_a_gradient():
    values = [torch.randn(2, 5, 6) for _ in range(3)]
    values[1].requires_grad_()
    query = torch.randn(6)

    def run(pull):
        history = ek.PositionHistory()
        for v in values:
            history.append(v)
        out = history.attend(query) if pull else ek.position_attention(query, values).out
        return torch.autograd.grad(out.sin().sum(), values[1])[0]

    torch.testing.assert_close(run(True), run(False))


def test_without_gradients_nothing_is_linked():
    stage = Stage()
    with torch.no_grad():
        outs, _ = stage.pulled()
    assert not outs[-1].requires_grad


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "asked for later"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("form", [torch.clone, torch._neg_view], ids=["plain", "negated"])
def test_values_added_without_gradients_get_theirs(how, place, form):
    """A list does not know how a value came into it, nor whether its signs are in memory."""
    values = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(4)]
    query = torch.randn(6, dtype=torch.float64)

    def run(pull):
        leaves = [form(v.clone()).requires_grad_() for v in values]
        history, total = ek.PositionHistory(), 0
        for t, v in enumerate(leaves):
            if not pull:
                continue
            if t != place:
                history.append(v)
            elif how == "asked for later":
                history.append(v.requires_grad_(False))
                v.requires_grad_()
            else:
                with torch.no_grad() if how == "no_grad" else torch.inference_mode():
                    history.append(v)
            total = total + history.attend(query).sin().sum()
        for t in [] if pull else range(len(leaves)):
            total = total + ek.position_attention(query, leaves[: t + 1]).out.sin().sum()
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(run(True), run(False))


def test_eager_and_kernels_meet_in_one_history():
    values = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3)]
    query = torch.randn(6, dtype=torch.float64)

    def run(backends):
        leaves = [v.clone().requires_grad_() for v in values]
        history, total = ek.PositionHistory(), 0
        for v, backend in zip(leaves, backends, strict=True):
            with ek.use_backend(backend):
                history.append(v * 1)
                total = total + history.attend(query).sin().sum()
        return torch.autograd.grad(total, leaves)

    expected = run(["eager"] * 3)
    for mixed in (
        ["cpp"] * 3,
        ["cpp", "eager", "cpp"],
        ["eager", "cpp", "cpp"],
        ["cpp", "cpp", "eager"],
    ):
        torch.testing.assert_close(run(mixed), expected)


def test_autocast():
    """Values are cast where they are added: gradients are gathered in that dtype, and come back wide."""
    stage = Stage(dtype=torch.float32)

    def run(pull):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return stage.pulled() if pull else stage.pushed()

    outs, found = gradients(stage, lambda: run(True), LOSSES["every output"])
    expected_outs, expected = gradients(stage, lambda: run(False), LOSSES["every output"])
    assert outs[-1].dtype == torch.bfloat16
    assert torch.equal(outs[-1], expected_outs[-1])
    for g, e in zip(found, expected, strict=True):
        assert g.dtype == torch.float32
        # The push form rounds each of its T gradients to bfloat16 and their sums, this one rounds once.
        torch.testing.assert_close(g, e, rtol=0.05, atol=0.05 * e.abs().max().item() + 1e-6)


def test_kernels_that_take_over_in_a_history(monkeypatch):
    """A backend that serves no more values leaves the rest to the next, as beyond the greatest depth of one."""
    cpp = KERNELS["cpp"]
    other = type(cpp)()
    values = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(4)]
    query = torch.randn(6, dtype=torch.float64)

    def run():
        leaves = [v.clone().requires_grad_() for v in values]
        history, total = ek.PositionHistory(), 0
        for v in leaves:
            history.append(v * 1)
            total = total + history.attend(query).sin().sum() + history.weights.square().sum()
        return torch.autograd.grad(total, leaves)

    expected = run()
    monkeypatch.setattr(
        "ela_kernels.ops.position_attention.history.kernels_for",
        lambda op, like, depth: cpp if depth <= 2 else other,
    )
    torch.testing.assert_close(run(), expected)
