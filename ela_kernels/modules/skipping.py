"""The decision to skip a layer, as a buffer: so that averages, broadcasts and checkpoints of the model carry it."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ela_kernels.backends.tracing import waits_for_device
from ela_kernels.torch_internals import (
    are_transforms_active,
    dispatch_modes,
    is_wrapped,
    own_buffer,
    version_of,
)

SkipMode = Literal["retrieval", "layer", "reuse"]
SKIP_MODES: tuple[str, ...] = get_args(SkipMode)

MODES: tuple[tuple[SkipMode, bool], ...] = (
    ("retrieval", True),
    ("layer", False),
    ("reuse", True),
    ("reuse", False),
)
"""What is left out, and whether the layer still gives its key and value, by the number that stands for both."""

Decision = tuple[bool, int]
"""Whether the layer is skipped, and the number in `MODES` of how."""

# Layers whose decision is on an accelerator: reading one waits for the device, so all that changed are read at once.
_on_devices: weakref.WeakSet[Skipping] = weakref.WeakSet()
_reading = threading.Lock()


def check_skip(skip: object) -> SkipMode:
    """A skip mode, or an error that names the argument."""
    if skip not in SKIP_MODES:
        raise ValueError(f"skip: got {skip!r}; allowed are 'retrieval', 'layer' and 'reuse'")
    return skip  # type: ignore[return-value]


def mode_number(skip: object, provides: bool | None = None) -> int:
    """The number of a skip mode; `provides` is None for what is usual in it.

    Raises:
        TypeError, ValueError: by the names of the arguments.
    """
    numbers = [i for i, (mode, _) in enumerate(MODES) if mode == check_skip(skip)]
    if provides is None:
        return numbers[0]
    if type(provides) is not bool:
        raise TypeError(f"provides: got {type(provides).__name__}; allowed is True, False or None")
    found = [i for i in numbers if MODES[i][1] is provides]
    if not found:
        raise ValueError(
            f"provides: got {provides} for skip={skip!r}; allowed is {not provides}: a layer skipped with 'retrieval' "
            "gives its key and value, and one skipped with 'layer' does not. With skip='reuse' both are allowed"
        )
    return found[0]


class Skipping(nn.Module):
    """A module that can be skipped; its buffer `decision` `[2]` holds 1 where it is or 0, and the number of how.

    In floating point, since a moving average of the model's tensors moves this one too: the layer is skipped at more
    than 0.5, so that the average of a decision follows it as that of a parameter does. Integers would stand still.

    On an accelerator what is written to the buffer past autograd's version counter (`decision.data`) is seen only after
    the model was moved, loaded, or switched by `train()` or `eval()`.
    """

    decision: Tensor

    def __init__(self, skip: SkipMode, provides: bool | None = None) -> None:
        super().__init__()
        self._last: Decision = (False, mode_number(skip, provides))
        self._last_mode = self._last[1]  # apart, since a compiled graph is made for it
        self._read_at: tuple[Tensor, int] | None = None
        self.register_buffer("decision", torch.tensor(self._last, dtype=torch.float32))
        self.pruned = False  # skipped for good, its unused parameters removed

    @property
    def skipped(self) -> bool:
        """Whether the layer is skipped; can be set."""
        return self._decision()[0]

    @skipped.setter
    def skipped(self, value: bool) -> None:
        self._decide((bool(value), self._decision()[1]))

    @property
    def skip(self) -> SkipMode:
        """What a skipped layer leaves out, `"retrieval"`, `"layer"` or `"reuse"`; can be set."""
        return MODES[self._mode()][0]

    @skip.setter
    def skip(self, skip: SkipMode) -> None:
        if check_skip(skip) != self.skip:
            self._decide((self._decision()[0], self.number_of(skip)))

    @property
    def provides(self) -> bool:
        """Whether a skipped layer still gives its key and value to the later ones; can be set for `"reuse"`."""
        return MODES[self._mode()][1]

    @provides.setter
    def provides(self, value: bool) -> None:
        self._decide((self._decision()[0], self.number_of(self.skip, value)))

    def number_of(self, skip: object, provides: bool | None = None) -> int:
        """As :func:`mode_number`, which also refuses what this module cannot do."""
        return mode_number(skip, provides)

    def _mode(self) -> int:
        # A compiled graph is made for one mode; it is read again when the model is switched by train() or eval().
        return self._last_mode if torch.compiler.is_compiling() else self._decision()[1]

    def decides_as_data(self) -> bool:
        """Whether the decision may not be looked at: in a graph that is being compiled, and inside a transform."""
        if torch.compiler.is_compiling():
            return True
        return are_transforms_active() and "decision" in self._buffers and is_wrapped(self.decision)

    def make_permanent(self) -> None:
        """The layer is skipped from now on; there is nothing to decide any more."""
        self._last = (True, self._decision()[1])
        self.pruned = True
        self._buffers.pop("decision", None)

    def _decision(self) -> Decision:
        decision = self._buffers.get("decision")
        if decision is None or decision.is_meta:  # pruned, or without values
            return self._last
        if not waits_for_device(decision):
            exact = _exact(decision)
            if exact is not None:
                self._know(rounded(exact))
        else:
            _read_changed(self, decision)
        return self._last

    def _know(self, value: Decision) -> None:
        if value != self._last:  # an attribute of a module takes long to set
            self._last, self._last_mode = value, value[1]

    def _decide(self, value: Decision) -> None:
        self._know(value)
        decision = self._buffers.get("decision")
        if decision is None:
            return
        if decision.is_inference() and not torch.is_inference_mode_enabled():
            decision = self._buffers["decision"] = decision.clone()
        with torch.no_grad():
            # In place: whoever holds the buffer sees it.
            for place, number in enumerate(value):
                decision[place] = float(number)
        self._read_at = _state_of(decision)

    def train(self, mode: bool = True) -> Any:
        self._read_at = None
        self._decision()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The value outlives `to_empty()`, and stays in float32: an average in half precision would stand still.
        before = self._buffers.get("decision")
        exact = None if before is None else _exact(before)
        super()._apply(fn, recurse)
        after = self._buffers.get("decision")
        if after is not None:
            values = [*map(float, self._last)] if exact is None else exact
            self._read_at = None
            if after.dtype != torch.float32:
                after = self._buffers["decision"] = torch.empty_like(after, dtype=torch.float32)
            with torch.no_grad():
                if after.is_inference() and not torch.is_inference_mode_enabled():
                    after = self._buffers["decision"] = after.clone()
                for place, number in enumerate(values):
                    after[place] = number
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_read_at"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "skipped" in self.__dict__:  # a pickle of a layer that kept its decision in attributes
            skipped, skip = self.__dict__.pop("skipped"), self.__dict__.pop("skip")
            self._last = (bool(skipped), mode_number(skip))
            self._last_mode = self._last[1]
            self._read_at = None
            if not self.pruned:
                decision = torch.tensor(self._last, dtype=torch.float32, device="cpu")
                self.register_buffer("decision", decision)


def _exact(decision: Tensor) -> list[float] | None:
    """The numbers themselves, which lie between decisions in a moving average; None where there are no values."""
    if decision.is_meta:
        return None
    try:
        # A dispatch mode may have rules of its own for numbers that leave PyTorch.
        seen = dispatch_modes() and decision.is_cpu
        numbers: list[float] = decision.numpy().tolist() if seen else decision.tolist()
        return numbers
    except (RuntimeError, TypeError, NotImplementedError):  # inside a transform, or fake
        return None


def rounded(exact: list[float]) -> Decision:
    """The decision that numbers stand for, which in a moving average lie between decisions."""
    skipped, mode = exact
    # By comparisons, which a NaN survives.
    return skipped > 0.5, sum(mode > number - 0.5 for number in range(1, len(MODES)))


def _state_of(decision: Tensor) -> tuple[Tensor, int] | None:
    return None if decision.is_inference() else (decision, version_of(decision))


def _is_read(layer: Skipping, decision: Tensor) -> bool:
    at = layer._read_at
    if at is None or at[0] is not decision or decision.is_inference():
        return False
    return at[1] == version_of(decision)


def _read_changed(layer: Skipping, decision: Tensor) -> None:
    """Read the decision of `layer` from its device if it may have changed, and of all others there that may have."""
    if _is_read(layer, decision):
        return
    with _reading:
        _on_devices.add(layer)
        changed = [
            (other, found)
            for other in list(_on_devices)
            if (found := own_buffer(other, "decision")) is not None
            and found.device == decision.device
            and not _is_read(other, found)
        ]
        states = [_state_of(found) for _, found in changed]
        values = torch.stack([found.detach() for _, found in changed]).tolist()
        for (other, _), state, exact in zip(changed, states, values, strict=True):
            other._know(rounded(exact))
            other._read_at = state
