"""PositionHistory: the pull form gives the gradients of the functional op, whatever a network asks for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.layouts import channels_last, contiguous, last_slice
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

DEPTH = 4


@pytest.fixture(autouse=True)
def cpp():
    with ek.use_backend("cpp"):
        yield


class Stage:
    """A network of a few layers whose inputs are retrieved; leaves are `x`, queries, norm weights and layers."""

    def __init__(self, shape=(2, 5, 6), dtype=torch.float64, layout=contiguous, last=True) -> None:
        self.last, channels = last, shape[-1 if last else 1]
        self.x = layout(shape, dtype)
        self.queries = [torch.randn(channels, dtype=dtype) for _ in range(DEPTH)]
        self.norms = [torch.rand(channels, dtype=dtype) + 0.5 for _ in range(DEPTH)]
        self.layers = [torch.randn(channels, dtype=dtype) for _ in range(DEPTH)]

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.queries, *self.norms, *self.layers]

    def fresh(self) -> list[Tensor]:
        """Leaves that require grad, in place of those of before."""
        made = [t.detach().requires_grad_() for t in self.leaves()]
        self.x, self.queries, self.norms, self.layers = (
            made[0],
            made[1 : 1 + DEPTH],
            made[1 + DEPTH : 1 + 2 * DEPTH],
            made[1 + 2 * DEPTH :],
        )
        return made

    def layer(self, t: int, x: Tensor) -> Tensor:
        weight = self.layers[t]
        weight = weight if self.last else weight.reshape(-1, *[1] * (x.dim() - 2))
        return (x * weight).tanh()

    def pulled(self) -> tuple[list[Tensor], list[Any]]:
        history, outs, found = ek.PositionHistory(), [], []
        x = self.x * 1
        for t in range(DEPTH):
            history.append(x, channels_last=self.last)
            out = history.attend(self.queries[t], self.norms[t])
            outs.append(out)
            found.append((history.weights, history.kl, history.kl_mean))
            x = self.layer(t, out)
        return outs, found

    def pushed(self) -> tuple[list[Tensor], list[Any]]:
        values, prev, outs, found = [], None, [], []
        x = self.x * 1
        for t in range(DEPTH):
            values.append(x)
            r = ek.position_attention(
                self.queries[t],
                values,
                norm_weight=self.norms[t],
                prev_weights=prev,
                channels_last=self.last,
            )
            outs.append(r.out)
            found.append(tuple(r)[1:])
            prev = r.weights
            x = self.layer(t, r.out)
        return outs, found


def gradients(stage: Stage, run: Callable[[], Any], loss: Callable[[Any, Any], Tensor]) -> Any:
    leaves = stage.fresh()
    outs, found = run()
    grads = torch.autograd.grad(loss(outs, found), leaves, allow_unused=True)
    return outs, [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


LOSSES = {
    "the last output": lambda outs, _: outs[-1].sin().sum(),
    "every output": lambda outs, _: sum((1 + t) * o.square().sum() for t, o in enumerate(outs)),
    "an output in the middle": lambda outs, _: outs[1].sin().sum(),
    "weights": lambda _, found: found[-1][0].square().sum() + found[2][0].sin().sum(),
    "divergences": lambda _, found: sum(f[1].sum() + 2 * f[2].sum() for f in found[1:]),
    "all": lambda outs, found: outs[-1].sin().sum() + outs[1].sum() + found[-1][2].sum(),
}


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


def test_a_second_derivative_is_refused_and_eager_has_it():
    values = [torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run():
        history = ek.PositionHistory()
        for v in values:
            history.append(v * 1)
        out = history.attend(torch.ones(6, dtype=torch.float64))
        return torch.autograd.grad(out.square().sum(), values, create_graph=True)

    with pytest.raises(
        RuntimeError, match=r"PositionHistory: a second derivative .* position_attention"
    ):
        run()
    with ek.use_backend("eager"):
        assert run()[0].requires_grad


def test_a_checkpoint_that_recomputes_is_refused():
    history, query = ek.PositionHistory(), torch.randn(6)

    def block(x):
        history.append(x * 2)
        return history.attend(query)

    out = checkpoint(block, torch.randn(2, 5, 6, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"PositionHistory: got a call in a checkpoint"):
        out.sum().backward()


def test_a_changed_gradient_is_noticed():
    stage = Stage()
    stage.fresh()
    outs, _ = stage.pulled()
    kept = []
    outs[-1].register_hook(kept.append)

    def change(_: Tensor) -> None:
        kept[0].mul_(2)

    outs[1].register_hook(change)
    with pytest.raises(RuntimeError, match="changed in place during the backward"):
        (outs[-1] * 1).sum().backward(retain_graph=True)


def test_a_changed_value_is_noticed():
    stage = Stage()
    stage.fresh()
    history = ek.PositionHistory()
    x = stage.x * 1
    history.append(x)
    out = history.attend(stage.queries[0])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_kept_after_a_backward():
    class Kept(torch.Tensor):
        pass

    stage = Stage()
    stage.fresh()
    outs, _ = stage.pulled()
    outs[-1].sum().backward()
    node = weakref.ref(outs[-1].grad_fn)
    del outs, _
    gc.collect()
    assert node() is None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda h: ek.PositionHistory().attend(torch.ones(6)),
            ValueError,
            "attend: got a history without",
        ),
        (lambda h: h.append([1.0]), TypeError, "value: got list"),
        (lambda h: h.append(torch.ones(2, 5, 7)), ValueError, r"value: got shape \[2, 5, 7\]"),
        (
            lambda h: h.append(torch.ones(2, 5, 6).double()),
            TypeError,
            "value: got dtype torch.float64",
        ),
        (lambda h: h.append(torch.ones(2, 5, 6), False), ValueError, "channels_last: got False"),
        (lambda h: ek.AttentionResidual(6)(h, False), ValueError, "channels_last: got False"),
        (lambda h: h.attend(torch.ones(7)), ValueError, r"query: got shape \[7\]"),
        (
            lambda h: h.attend(torch.ones(6), torch.ones(7)),
            ValueError,
            r"norm_weight: got shape \[7\]",
        ),
    ],
)
def test_refused(call, error, words):
    history = ek.PositionHistory()
    history.append(torch.ones(2, 5, 6))
    with pytest.raises(error, match=words):
        call(history)
    assert len(history) == len(history.values) == 1


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
