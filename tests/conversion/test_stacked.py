"""The stand-ins for keys and values that a converted network passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.converted_stages import run, stages
from support.small_published import Layer
from torch import Tensor, nn

import ela_kernels as ek

# What is done, and whether the layers go on with their history afterwards.
USES: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "nothing": (lambda k, v: (k, v), True),
    "metadata": (
        lambda k, v: (
            (k, v) if (k.shape[:2], v.dim(), v.dtype, v.size(2), len(k), v.numel()) else ()
        ),
        True,
    ),
    "is it there": (lambda k, v: (k, v) if k is not None and isinstance(v, Tensor) else (), True),
    "scaled": (lambda k, v: (k * 0.5, v), False),
    "scaled from the left": (lambda k, v: (k, 0.5 * v), False),
    "only the last two": (lambda k, v: (k[:, -2:], v[:, -2:]), False),
    "concatenated": (
        lambda k, v: (torch.cat((k, k[:, :1]), 1), torch.cat([v, v[:, :1]], 1)),
        False,
    ),
    "reshaped and back": (
        lambda k, v: (k.reshape(2, -1).view(2, -1, 8), v.flatten(2).view_as(v)),
        False,
    ),
    "changed in place": (lambda k, v: (k, v.mul_(0.5)), False),
    "changed in place and thrown away": (
        lambda k, v: (k, v) if v.mul_(0.5) is not None else (),
        False,
    ),
    "an element set": (lambda k, v: (k, v) if v.__setitem__((0, 0), 0.0) is None else (), False),
    "changed without gradients": (
        lambda k, v: (k, v) if v.data.mul_(0.5) is not None else (),
        False,
    ),
    "a module": (lambda k, v: (k, nn.Identity()(v)), True),
    "a linear layer": (lambda k, v: (nn.functional.linear(k, torch.eye(8).double()), v), False),
    "detached": (lambda k, v: (k.detach(), v.detach()), False),
    "looked at without gradients": (
        lambda k, v: (k, v) if torch.no_grad()(lambda: k.mean() + v.mean())() is not None else (),
        False,
    ),
    "in the loss": (lambda k, v: (k, v, k, v), False),
    "by keyword": (lambda k, v: (torch.mul(input=k, other=2), v), False),
    "out of an operator": (
        lambda k, v: (torch.ops.aten.mul.Tensor(k, torch.tensor(2.0)), v),
        False,
    ),
}


# The original's own backward refuses what was changed under it.
IN_PLACE = ("changed in place", "changed in place and thrown away", "an element set")


@pytest.mark.parametrize("use", USES)
def test_whatever_is_done_to_them_the_results_stay(use: str) -> None:
    theirs, ours = stages()
    between, _ = USES[use]
    with torch.set_grad_enabled(use not in IN_PLACE):
        for a, b in zip(run(ours, between), run(theirs, between), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("use", USES)
def test_the_history_goes_on_while_nobody_looks(use: str) -> None:
    _, ours = stages()
    between, goes_on = USES[use]
    histories = set()

    def watched(k: Any, v: Any) -> Any:
        assert k.history is v.history
        histories.add(k.history)
        return between(k, v)

    with torch.set_grad_enabled(use not in IN_PLACE):
        run(ours, watched)
    assert (len(histories) == 1) == goes_on


def test_older_ones_are_continued_apart() -> None:
    """Two branches from one state: neither sees the other's keys and values."""
    theirs, ours = stages()
    results = []
    for stage in (theirs, ours):
        stage.zero_grad()
        x = torch.linspace(-1, 1, 2 * 8 * 12).double().view(2, 8, 4, 3)
        first, k, v = stage[0](x, None, None)
        left, left_k, left_v = stage[1](first, k, v)
        right, _, _ = stage[2](first.cos(), k, v)
        again, again_k, _ = stage[3](left, left_k, left_v)
        assert again_k.shape[1] == 3
        (left.sin() + right * again).square().sum().backward()
        results.append([left, right, again, *(p.grad for p in stage.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_mixed_dtypes_are_promoted_as_by_torch_cat() -> None:
    layer = Layer(8)
    ek.convert(layer)
    x = torch.randn(2, 8, 4, 3)
    _, k, v = layer(x, None, None)
    layer.double()
    _, k, v = layer(x.double(), k, v)
    assert k.dtype == v.dtype == (k + 0).dtype == torch.float64


def test_what_passes_functions_by_is_refused() -> None:
    layer = Layer(8)
    ek.convert(layer)
    _, k, _ = layer(torch.randn(2, 8, 4, 3), None, None)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="unconvert"):
        k + 1


def test_keys_and_values_of_two_dtypes_are_refused_by_a_history() -> None:
    k, v = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8, 4, 3)
    with pytest.raises(
        ValueError, match=r"^keys, values: got torch.bfloat16 on cpu and torch.float32"
    ):
        ek.LayerHistory.holding(k, v, heads=2)
    # A converted layer leaves them to the original, which promotes them.
    layer, ours = Layer(8), Layer(8)
    ours.load_state_dict(layer.state_dict())
    ek.convert(ours)
    x = torch.randn(2, 8, 4, 3)
    for a, b in zip(ours(x, k, v), layer(x, k, v), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tuple_with_names_holds_tensors_when_it_is_used() -> None:
    class Pair(NamedTuple):
        a: Any
        b: Any

    layer = Layer(8)
    ek.convert(layer)
    _, k, _ = layer(torch.randn(2, 8, 4, 3), None, None)
    assert torch.cat(Pair(k, k), 1).shape == (2, 2, 8)


def test_what_is_no_state_of_the_layer_is_the_original_s_to_serve_or_refuse() -> None:
    layer, ours = Layer(8), Layer(8)
    ours.load_state_dict(layer.state_dict())
    ek.convert(ours)
    x = torch.randn(2, 8, 4, 3)
    for of in (layer, ours):
        with pytest.raises(RuntimeError, match=r"subscript t has size 3"):
            of(x, torch.randn(2, 3, 8), torch.randn(2, 2, 8, 4, 3))
    # An empty tensor of one dimension, as torch.cat takes it; and a history of another size of maps.
    nothing = torch.tensor([])
    for a, b in zip(ours(x, nothing, nothing), layer(x, nothing, nothing), strict=True):
        torch.testing.assert_close(a + 0, b)
    _, k, v = ours(x, None, None)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        ours(torch.randn(2, 8, 5, 3), k, v)


def test_layers_may_come_again_as_in_the_original() -> None:
    theirs, ours = stages(2)
    results = []
    for stage in (theirs, ours):
        x = torch.linspace(-1, 1, 2 * 8 * 12).double().view(2, 8, 4, 3)
        k = v = None
        for layer in (*stage, *stage, stage[1]):
            out, k, v = layer(x, k, v)
            x = x + out
        stage.zero_grad()
        x.square().sum().backward()
        results.append([x, *(p.grad for p in stage.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
