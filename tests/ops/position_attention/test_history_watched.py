"""What a PositionHistory refuses, notices and lets go of."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.position_stages import Stage
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("cpp")


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
