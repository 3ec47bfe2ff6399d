"""A history used for a second forward pass is refused, and what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from support.history_stages import CHANNELS, HEADS, Layer, grads, make_layers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def run(layers: list[nn.Module], x: Tensor, history: ek.LayerHistory) -> Tensor:
    for layer in layers:
        x = layer(x, history)
    return x


def of_ela() -> tuple[list[nn.Module], Tensor]:
    return [ek.ELA(8, 4) for _ in range(3)], torch.randn(2, 8, 5, 5)


def of_layers() -> tuple[list[nn.Module], Tensor]:
    return [ek.LayerAttention(8, 4) for _ in range(3)], torch.randn(2, 8, 5, 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [of_ela, of_layers, lambda: make_layers(3, (1,))])
def test_a_second_pass(
    make: Callable[[], tuple[list[nn.Module], Tensor]],
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    """In a loop over batches: the next batch has nothing to do with what the history holds."""
    layers, x = make()
    history = ek.LayerHistory()
    kind = "Layer" if isinstance(layers[0], Layer) else "LayerAttention"
    with mode():
        run(layers, x, history)
        said = rf"history: got a second forward pass, after 3 layers: {kind} of place 0 and {kind} of place 1"
        with pytest.raises(ValueError, match=said):
            run(layers, x.detach() + 1, history)
        with pytest.raises(
            ValueError, match=r"Make a new LayerHistory .* LayerHistory\(repeats=True\)"
        ):
            run(layers, x, history)
        run(layers, x, ek.LayerHistory())


def test_a_skipped_layer_has_its_place() -> None:
    layers, x = of_ela()
    layers[1].skip, layers[1].skipped = "layer", True  # type: ignore[assignment]
    history = ek.LayerHistory()
    run(layers, x, history)
    with pytest.raises(ValueError, match="LayerAttention of place 0 and LayerAttention of place 1"):
        run(layers, x, history)


def test_it_is_said_where_layers_came_by_themselves_before() -> None:
    layers, x = make_layers(2)
    a, b = layers
    history = ek.LayerHistory()
    run([a, a, b, b], x, history)
    with pytest.raises(ValueError, match="after 4 layers: Layer of place 1 and Layer of place 2"):
        run([a, b], x, history)


@pytest.mark.parametrize("order", ["aaaa", "aabbcc", "abac", "abbc", "abcb", "abcacb"])
@pytest.mark.parametrize("mode", MODES)
def test_a_shared_layer(order: str, mode: Callable[[], AbstractContextManager[None]]) -> None:
    """The numbers are those of layers that are not shared and have the same weights."""
    layers, x = make_layers(3)
    apart = [make_layers(3)[0]["abc".index(name)] for name in order]
    with mode():
        out = run([layers["abc".index(name)] for name in order], x, ek.LayerHistory())
        torch.testing.assert_close(out, run(apart, x, ek.LayerHistory()))


def test_a_stage_that_goes_through_its_layers_again() -> None:
    layers, x = make_layers(2)
    apart = [layer for _ in range(3) for layer in make_layers(2)[0]]
    out = run([*layers] * 3, x, ek.LayerHistory(repeats=True))
    expected = run(apart, x, ek.LayerHistory())
    torch.testing.assert_close(out, expected)
    found = grads(out.square().sum(), [x])
    torch.testing.assert_close(found, grads(expected.square().sum(), [x]))


def test_a_recomputation_is_no_second_pass() -> None:
    layers, x = make_layers(4)
    history, y = ek.LayerHistory(), x
    for i in (0, 2):
        y = checkpoint(run, layers[i : i + 2], y, history, use_reentrant=False)
    out = run(layers, x, ek.LayerHistory())
    inputs = [x, *layers.parameters()]
    found = grads(y.square().sum(), inputs)
    torch.testing.assert_close(found, grads(out.square().sum(), inputs))
    with pytest.raises(ValueError, match="second forward pass, after 4 layers"):
        run(layers, x, history)


def test_calls_without_a_caller() -> None:
    history = ek.LayerHistory()
    for _ in range(4):
        q, k, v = torch.randn(2, CHANNELS), torch.randn(2, CHANNELS), torch.randn(2, CHANNELS, 3)
        history.attend(q, k, v, heads=HEADS)
    assert history.depth == 4


def test_a_layer_that_was_refused_may_be_called_again() -> None:
    layers, x = of_layers()
    history = ek.LayerHistory()
    run(layers[:1], x, history)
    for _ in range(2):
        with pytest.raises(ValueError, match="allowed is what the history holds"):
            layers[1](x[:, :, 1:], history)
    run(layers[1:], x, history)
    assert history.depth == 3


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_repeats_is_a_bool(value: object) -> None:
    with pytest.raises(TypeError, match="repeats: got"):
        ek.LayerHistory(value)  # type: ignore[arg-type]
