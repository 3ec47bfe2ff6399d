"""Calls that are refused: of each the type and the message of the error are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels import models


def _row(*shape: int) -> Tensor:
    return torch.ones(shape or (2, 12))


def _map(*shape: int) -> Tensor:
    return torch.ones(shape or (2, 12, 5, 7))


def _op(**change: Any) -> Callable[[], Any]:
    good: dict[str, Any] = {"q": _row(), "keys": [_row()] * 3, "values": [_map()] * 3, "heads": 3}
    return lambda: ek.layer_attention(**(good | change))


def _weights(**change: Any) -> Callable[[], Any]:
    return lambda: ek.layer_attention_weights(
        **({"q": _row(), "keys": [_row()] * 3, "heads": 3} | change)
    )


def _light(**change: Any) -> Callable[[], Any]:
    good = {"q": _row(), "k": _row(), "v": _map(), "prev_out": _map(), "decay": _row(12, 1, 1)}
    return lambda: ek.light_layer_attention(**({"heads": 3} | good | change))


def _attend(q: Any, k: Any, v: Any, **options: Any) -> Callable[[], Any]:
    def call() -> None:
        history = ek.LayerHistory()
        history.attend(_row(), _row(), _map(), heads=3)
        history.attend(q, k, v, **({"heads": 3} | options))

    return call


def _provide(k: Any, v: Any, **options: Any) -> Callable[[], Any]:
    return lambda: ek.LayerHistory().provide(k, v, **({"heads": 3} | options))


def _layer(x: Any, history: Any = None, make: Any = ek.LayerAttention) -> Callable[[], Any]:
    def call() -> None:
        module = make(12, 4)
        second = ek.LayerHistory() if history is None else history
        module(x, x if make is ek.LightLayerAttention and history is None else second)

    return call


def _in_place() -> None:
    history, v = ek.LayerHistory(), _map().requires_grad_()
    held = v * 1
    out = history.attend(_row(), _row(), held, heads=3)
    held.add_(1)
    out.sum().backward()


def _held_in_place() -> None:
    layer, history = ek.LayerAttention(12, 4), ek.LayerHistory()
    x = _map() * 1
    out = layer(x, history)
    x.add_(1)
    out.sum().backward()


def _freed() -> None:
    layer = ek.ELA(12, 4)
    loss = layer(_map(), ek.LayerHistory()).sum()
    loss.backward()
    loss.backward()


def _second_derivative(make: Any) -> Callable[[], Any]:
    def call() -> None:
        layer, x = make(12, 4), _map().requires_grad_()
        out = layer(x, x if make is ek.LightLayerAttention else ek.LayerHistory())
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        g.sum().backward()

    return call


def _reentrant() -> None:
    layer, history = ek.LayerAttention(12, 4), ek.LayerHistory()
    x = _map().requires_grad_()
    for _ in range(2):
        x = checkpoint(layer, x, history, use_reentrant=True)
    x.sum().backward()


def _pruned() -> None:
    stage = nn.ModuleList(ek.ELA(12, 4) for _ in range(2))
    stage[1].skipped = True
    history = ek.LayerHistory()
    for layer in stage:
        layer(_map(), history)
    ek.prune(stage)
    stage[1].skipped = False
    stage[1](_map(), ek.LayerHistory())


def _other_heads() -> None:
    history = ek.LayerHistory()
    ek.LayerAttention(12, 4)(_map(), history)
    ek.LayerAttention(12, 6)(_map(), history)


def _other_size() -> None:
    history = ek.LayerHistory()
    ek.LayerAttention(12, 4)(_map(), history)
    ek.LayerAttention(12, 4)(_map(2, 12, 4, 7), history)


def _lookalike() -> None:
    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Wq, self.Wk = (nn.Conv1d(1, 1, 3) for _ in range(2))
            self.Wv = nn.Conv2d(12, 12, 3, groups=12)

    Theirs.__module__ = "theirs"
    Theirs.__qualname__ = "Theirs"
    ek.convert(Theirs())


def refusals() -> dict[str, Callable[[], Any]]:
    """By name: a call that raises, perhaps not under every backend (then both checkouts must not raise)."""
    bad_prev = {
        "longer": _row(2, 3, 4),
        "of other heads": _row(2, 4, 2),
        "half": _row(2, 3, 2).half(),
        "a list": [[0.5]],
    }
    found = {
        "q of rank 3": _op(q=_row(2, 3, 4)),
        "q None": _op(q=None),
        "q integer": _op(q=_row().long()),
        "q sparse": _op(q=_row().to_sparse()),
        "keys empty": _op(keys=[]),
        "keys a number": _op(keys=3),
        "key of other shape": _op(keys=[_row(), _row(2, 11), _row()]),
        "key of other dtype": _op(keys=[_row(), _row().double(), _row()]),
        "key elsewhere": _op(keys=[_row(), _row().to("meta"), _row()]),
        "heads 5": _op(heads=5),
        "heads True": _op(heads=True),
        "scale a string": _op(scale="1"),
        "values too few": _op(values=[_map()] * 2),
        "values of other size": _op(values=[_map(), _map(2, 12, 5, 8), _map()]),
        "values of other channels": _op(values=[_map(2, 11, 5, 7)] * 3),
        "values of one shape, tokens": _op(values=[_row()] * 3, channels_last=True),
        **{f"prev_weights {n}": _op(prev_weights=p) for n, p in bad_prev.items()},
        "weights, q of rank 1": _weights(q=_row(12)),
        "weights with a gradient": _weights(q=_row().requires_grad_()),
        "weights, heads 0": _weights(heads=0),
        "light, k of other shape": _light(k=_row(2, 11)),
        "light, prev_out of other size": _light(prev_out=_map(2, 12, 5, 8)),
        "light, decay too long": _light(decay=_row(13, 1, 1)),
        "attend, other heads": _attend(_row(), _row(), _map(), heads=4),
        "attend, other size": _attend(_row(), _row(), _map(2, 12, 4, 7)),
        "attend, other batch": _attend(_row(3, 12), _row(3, 12), _map(3, 12, 5, 7)),
        "attend, narrower dtype": _attend(_row().half(), _row().half(), _map().half()),
        "attend, no map": _attend(_row(), _row(), None),
        "provide, k of rank 1": _provide(_row(12), _map()),
        "provide, heads 1.0": _provide(_row(), _map(), heads=1.0),
        "layer, integer map": _layer(_map().long()),
        "layer, rank 3": _layer(_map(2, 12, 5)),
        "layer, other channels": _layer(_map(2, 13, 5, 7)),
        "layer, other dtype": _layer(_map().double()),
        "layer, elsewhere": _layer(_map().to("meta")),
        "layer, no history": _layer(_map(), []),
        "layer, no tensor": _layer("x"),
        "layer, other heads than before": _other_heads,
        "layer, other size than before": _other_size,
        "block, other channels": _layer(_map(2, 13, 5, 7), make=ek.ELA),
        "block, no history": _layer(_map(), [], make=ek.ELA),
        "light layer, other dtype": _layer(_map().half(), make=ek.LightLayerAttention),
        "light layer, no map before": _layer(_map(), [], make=ek.LightLayerAttention),
        "light layer, other size before": _layer(
            _map(), _map(2, 12, 5, 8), make=ek.LightLayerAttention
        ),
        "changed in place": _in_place,
        "changed in place, layer": _held_in_place,
        "backward twice": _freed,
        "second derivative": _second_derivative(ek.LayerAttention),
        "second derivative, light": _second_derivative(ek.LightLayerAttention),
        "reentrant checkpoint": _reentrant,
        "pruned": _pruned,
        "prune, no passes": lambda: ek.prune(nn.ModuleList(ek.ELA(12, 4) for _ in range(2))),
        "head_dim 5": lambda: ek.LayerAttention(12, 5),
        "kernel_size 4": lambda: ek.LayerAttention(12, 4, 4),
        "skip all": lambda: ek.ELA(12, skip="all"),  # type: ignore[arg-type]
        "drop_path 2": lambda: ek.ELA(12, 4, drop_path=2.0),
        "convert a number": lambda: ek.convert(3),  # type: ignore[type-var]
        "convert a lookalike": _lookalike,
        "backend unknown": lambda: ek.use_backend("fast"),
        "warmup, depth 0": lambda: ek.warmup([(2, 8, 4, 4)], 0, device="cpu"),
        "warmup, head_dim 3": lambda: ek.warmup([(2, 8, 4, 4)], 1, head_dim=3, device="cpu"),
        "network, attention": lambda: models.CifarResNet(attention="some"),
        "network, fused": lambda: models.CifarResNet(attention="ela", fused=False),
    }
    return {f"refusal: {name}": call for name, call in found.items()}
