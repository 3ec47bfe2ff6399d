"""The decision to skip a layer, as a buffer: so that averages, broadcasts and checkpoints of the model carry it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

# Layers whose decision is on an accelerator: reading one waits for the device, so all that changed are read at once.
_on_devices: weakref.WeakSet[Skipping] = weakref.WeakSet()
_reading = threading.Lock()


class Skipping(nn.Module):
    """A module that can be skipped: the buffer `decision` is 1 where it is, and 0 where it is not.

    A floating-point number, since a moving average of the model's tensors moves this one too: the layer is skipped at
    more than 0.5, and the average of a decision so follows it, as it follows the parameters, which an average of
    integers would never do.
    """

    decision: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decision", torch.zeros((), dtype=torch.float32))
        self.pruned = False  # skipped for good, its unused parameters removed
        self._last_read = False
        self._read_at: tuple[Tensor, int] | None = None

    @property
    def skipped(self) -> bool:
        """Whether the layer is skipped; can be set.

        On an accelerator what is written to `decision` past autograd's version counter (`decision.data`) is seen only
        after the model was moved, loaded, or switched between train() and eval().
        """
        decision = self._buffers.get("decision")
        if decision is None:  # pruned
            return self._last_read
        if type(decision) is not Tensor or decision.dtype != torch.float32:
            return _value_of(decision, self._last_read) > 0.5
        if decision.device.type == "cpu":
            try:
                # A dispatch mode may have rules of its own for numbers that leave PyTorch.
                seen = torch._C._len_torch_dispatch_stack() > 0
                return bool(decision.numpy() > 0.5) if seen else decision.item() > 0.5
            except RuntimeError:  # inside a transform, say
                return self._last_read
        if decision.device.type != "meta":
            _read_changed(self)
        return self._last_read

    @skipped.setter
    def skipped(self, value: bool) -> None:
        self._last_read = bool(value)
        decision = self._buffers.get("decision")
        if decision is None:
            return
        if decision.is_inference() and not torch.is_inference_mode_enabled():
            decision = self._buffers["decision"] = decision.clone()
        with torch.no_grad():
            # In place: whoever holds the buffer sees it.
            decision.fill_(float(self._last_read))
        self._read_at = _state_of(decision)

    def decides_as_data(self) -> bool:
        """Whether the decision may not be looked at: in a graph that is being compiled, or without values."""
        if torch.compiler.is_compiling():
            return True
        decision = self._buffers.get("decision")
        if decision is None:
            return False
        return torch._C._are_functorch_transforms_active() and bool(
            torch._C._functorch.is_functorch_wrapped_tensor(decision)
        )

    def make_permanent(self) -> None:
        """The layer is skipped from now on; there is nothing to decide any more."""
        self._last_read = self.pruned = True
        self._buffers.pop("decision", None)

    def train(self, mode: bool = True) -> Any:
        self._read_at = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The value outlives `to_empty()`, and in float32: a moving average in half precision would stand still.
        before = self._buffers.get("decision")
        value = 0.0 if before is None else _value_of(before, self._last_read)
        super()._apply(fn, recurse)
        after = self._buffers.get("decision")
        if after is not None:
            after = after.to(torch.float32)
            self._buffers["decision"] = after
            self._read_at = None
            with torch.no_grad():
                after.fill_(value)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_read_at"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "skipped" in self.__dict__:  # a pickle of a layer that kept its decision as an attribute
            skipped = bool(self.__dict__.pop("skipped"))
            self._last_read, self._read_at = skipped, None
            if not self.pruned:
                self.register_buffer("decision", torch.tensor(float(skipped), dtype=torch.float32))


def _value_of(decision: Tensor, otherwise: bool) -> float:
    """The number itself, between 0 and 1 in a moving average; `otherwise` where it has no value (meta, fake)."""
    try:
        return float(decision)
    except (RuntimeError, NotImplementedError):
        return float(otherwise)


def _state_of(decision: Tensor) -> tuple[Tensor, int] | None:
    return None if decision.is_inference() else (decision, decision._version)


def _is_read(layer: Skipping, decision: Tensor) -> bool:
    at = layer._read_at
    return (
        at is not None
        and at[0] is decision
        and not decision.is_inference()
        and at[1] == decision._version
    )


def _read_changed(layer: Skipping) -> None:
    """Read the decision of `layer` from its device if it may have changed, and of all others there that may have."""
    decision = layer.decision
    if _is_read(layer, decision):
        return
    with _reading:
        _on_devices.add(layer)
        changed = [
            (other, other.decision)
            for other in list(_on_devices)
            if "decision" in other._buffers
            and other.decision.device == decision.device
            and not _is_read(other, other.decision)
        ]
        states = [_state_of(d) for _, d in changed]
        values = torch.stack([d.detach() for _, d in changed]).tolist()
        for (other, _), state, value in zip(changed, states, values, strict=True):
            other._last_read, other._read_at = value > 0.5, state
