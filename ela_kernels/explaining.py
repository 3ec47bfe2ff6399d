"""Which kernels serve the layers of a model, and every reason against better ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.backends.dispatch import EAGER, Refusal
from ela_kernels.backends.once import Once
from ela_kernels.backends.tracing import (
    DECIDED,
    EMPTY,
    OTHER_SHAPE,
    TRACED,
    UNGATHERED,
    needs_dispatcher,
)
from ela_kernels.torch_internals import buffers_of, is_lazy

logger = logging.getLogger("ela_kernels")

_FORMS = {
    "block": "the residual block in one call",
    "layer": "the whole layer in one call",
    "op": "the retrieval in one call",
    "push": "the retrieval in one call, with a gradient of its own for each value",
    "mix": "the sum by given weights in one call",
    "eager": "eager PyTorch",
    "pair": "key and value in one call",
    "pieces": "key and value by eager PyTorch",
    "reuse": "the residual block around an earlier retrieval in one call",
    "reuse by pieces": "the residual block around an earlier retrieval by eager PyTorch",
    "skipped": "nothing: the layer is skipped",
    "held": "values in the dtype that the history was given",
}


_UNSEEN = "no call of a layer of ela_kernels was seen: the model has none, or runs a compiled graph or threads"


class LayerExplanation(NamedTuple):
    """How one call of a layer was served.

    Attributes:
        name: of the layer in the model, as `named_modules()` has it; `""` for the model itself, and for a call that no
            layer of the model made.
        layer: name of its class.
        form: `"block"` (one call of the kernels for the whole residual block), `"layer"` (for the whole layer), `"op"`
            (for the retrieval alone), `"push"` (the same, with T gradients for T values, which PyTorch adds up),
            `"mix"` (for a sum by given weights, :func:`ela_kernels.depth_mix`), `"eager"`; of a layer that gives its
            pair and retrieves nothing `"pair"`, `"pieces"` or `"skipped"`; and of one that takes over an earlier
            retrieval `"reuse"` or `"reuse by pieces"`.
        backend: the name of what served it.
        reasons: of each better form that did not serve it, every reason; under `"held"` why the history does not hold
            values in the dtype that it was given.
        left_out: with a tolerance, the share of the retrievals of every sample and head that weighed less and were not
            made; None without one.
    """

    name: str
    layer: str
    form: str
    backend: str
    reasons: dict[str, tuple[str, ...]]
    left_out: float | None = None


class Explanation(tuple[LayerExplanation, ...]):
    """One :class:`LayerExplanation` for each call of a layer, in order; printed as a table."""

    __slots__ = ()

    def summary(self) -> str:
        """The same in short: calls of a class that were served alike, for the same reasons, are one line."""
        if not self:
            return _UNSEEN
        alike: dict[tuple[str, ...], list[LayerExplanation]] = {}
        for e in self:
            alike.setdefault((e.layer, e.backend, e.form, str(e.reasons)), []).append(e)
        lines = []
        for calls in alike.values():
            e = calls[0]
            lines.append(f"{len(calls)} x {e.layer}: {e.backend}, {_FORMS[e.form]}")
            lines += _reasons(e)
        return "\n".join(lines)

    def __str__(self) -> str:
        if not self:
            return _UNSEEN
        rows = [("layer", "class", "served by", "what")]
        rows += [(e.name or "-", e.layer, e.backend, _served(e)) for e in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for row, explanation in zip(rows, (None, *self), strict=True):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join((*cells, row[3])))
            if explanation is not None:
                lines += _reasons(explanation)
        return "\n".join(lines)


def _reasons(e: LayerExplanation) -> list[str]:
    return [f"    not {_FORMS[form]}: {r}" for form, reasons in e.reasons.items() for r in reasons]


def _served(e: LayerExplanation) -> str:
    left_out = "" if e.left_out is None else f", {e.left_out:.0%} of the retrievals left out"
    return _FORMS[e.form] + left_out


class _Watch:
    """What the layers tell while a pass is explained."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.found: list[LayerExplanation] = []
        self._refused: dict[int, dict[str, tuple[str, ...]]] = {}

    def refused(self, layer: Any, form: str, reasons: tuple[str, ...]) -> None:
        self._refused.setdefault(id(layer), {})[form] = reasons

    def served(self, layer: Any, form: str, backend: str) -> None:
        name = self.names.get(layer, "") if isinstance(layer, nn.Module) else ""
        kind = "function" if layer is None else type(layer).__name__
        reasons = self._refused.pop(id(layer), {})
        reasons.pop(form, None)  # of a call before, which raised
        self.found.append(LayerExplanation(name, kind, form, backend, reasons))

    def retrieved(self, weights: Tensor, tolerance: float) -> None:
        share = (weights.detach() < tolerance).float().mean().item()
        self.found[-1] = self.found[-1]._replace(left_out=share)


_watch: ContextVar[_Watch | None] = ContextVar("ela_kernels_explain", default=None)


def is_explaining() -> bool:
    """Whether the pass under way is one of :func:`explain`, which no training step may take note of."""
    return not torch.compiler.is_compiling() and _watch.get() is not None


def served(layer: Any, form: str, backend: str) -> None:
    """`layer` (None: a function that was called by itself) is served by `backend` in this form."""
    watch = _watch.get()
    if watch is not None:
        watch.served(layer, form, backend)


def retrieved(weights: Tensor, tolerance: float) -> None:
    """What was served last retrieved by `weights` `[B, G, T]`, and left out those below its tolerance."""
    if tolerance > 0 and not torch.compiler.is_compiling():
        watch = _watch.get()
        if watch is not None and watch.found and not (weights.is_meta or needs_dispatcher(weights)):
            watch.retrieved(weights, tolerance)


def served_without_kernels(layer: Any, form: str) -> None:
    """`layer` is served by PyTorch alone, in a compiled graph perhaps, which takes no note of it."""
    if not torch.compiler.is_compiling():
        served(layer, form, EAGER.name)


def refused(layer: Any, form: str, refusal: Refusal, tells: bool = True) -> None:
    """No kernels serve `layer` in this form. A model that could be changed so that they do is told so, once.

    Args:
        tells: False where an error will say it.
    """
    if torch.compiler.is_compiling():
        return
    watch = _watch.get()
    if watch is not None:
        watch.refused(layer, form, (*refusal.obstacles, *refusal.reasons))
    if tells and refusal.obstacles and refusal.forced != EAGER.name:
        _tell(type(layer).__name__, form, refusal.obstacles)


# Not worth a warning: whoever does this knows it, is told by an error, or was told of the layer that brought it about.
_EXPECTED = frozenset({TRACED, EMPTY, DECIDED, UNGATHERED, OTHER_SHAPE})
_told = Once()


def _tell(layer: str, form: str, obstacles: tuple[str, ...]) -> None:
    """One line for each kind of reason, however many layers and forms have it."""
    if not _EXPECTED.isdisjoint(obstacles):
        return
    for obstacle in _told.new(obstacles):
        logger.warning(
            "%s: the kernels do not serve %s, and a slower way is taken: %s. "
            "`print(ela_kernels.explain(model, x))` shows every layer and all reasons.",
            layer,
            _FORMS[form],
            obstacle,
        )


def held_as_they_are(layer: Any, refusal: Refusal) -> None:
    """A history cannot hold the value of `layer` in the dtype that it was given, of which is told once."""
    if torch.compiler.is_compiling():
        return
    reasons = (*refusal.obstacles, *refusal.reasons)
    watch = _watch.get()
    if watch is not None:
        watch.refused(layer, "held", reasons)
    if refusal.forced != EAGER.name and _EXPECTED.isdisjoint(reasons):
        for reason in _told.new(reasons):
            logger.warning(
                "%s: the history rounds values to the dtype that it was given, and holds them as wide as before, which "
                "saves no memory: %s. `print(ela_kernels.explain(model, x))` shows every layer and all reasons.",
                type(layer).__name__,
                reason,
            )


def explain(model: nn.Module, *inputs: Any, **options: Any) -> Explanation:
    """Run one forward pass, and say for each layer which kernels served it, and why not better ones.

    The pass runs in the mode that the model is in, with or without gradients as they are enabled. Afterwards buffers
    (running statistics, say), the state of the random numbers and what EBQM has observed are what they were before.

    Args:
        model: a layer of this package, or a model with such layers in it.
        inputs, options: what it is called with; a history for a single layer, say.

    Returns:
        One entry for each call of a layer, in order; `print` shows them as a table. What a compiled graph runs, or a
        thread that the model starts, is not seen: explain the model that was given to the compiler, or one replica.

    Example:
        >>> import torch, ela_kernels as ek
        >>> model = ek.models.resnet20(attention="ela").eval()
        >>> found = ek.explain(model, torch.randn(1, 3, 32, 32))
        >>> found[0].name, found[0].layer
        ('attentions.0.0.attn', 'LayerAttention')
    """
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch(names)
    token = _watch.set(watch)
    try:
        with unchanged(model):
            model(*inputs, **options)
    finally:
        _watch.reset(token)
    return Explanation(watch.found)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and random numbers are afterwards what they were."""
    before = [(owned, dict(owned), copies_of(owned)) for owned in map(buffers_of, model.modules())]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices}
    device_type = kinds.pop() if len(kinds) == 1 else "cuda"
    indices = [d.index for d in devices if d.type == device_type and d.index is not None]
    try:
        with torch.random.fork_rng(indices, device_type=device_type):
            yield
    finally:
        for owned, objects, copies in before:
            owned.clear()
            owned.update(objects)  # the pass may have put others in their places
            for name, value in copies.items():
                restore(owned[name], value)


def copies_of(owned: dict[str, Any]) -> dict[str, Tensor]:
    """Of what has numbers to keep."""
    return {
        name: buffer.detach().clone()
        for name, buffer in owned.items()
        if isinstance(buffer, Tensor) and not is_lazy(buffer) and not buffer.is_meta
    }


def restore(buffer: Tensor, value: Tensor) -> None:
    """Only where it was changed, and past autograd: a backward of an earlier pass may be to come."""
    if torch.equal(buffer.detach(), value):
        return
    with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
        buffer.data.copy_(value)
