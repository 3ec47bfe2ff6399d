"""EBQM in the `Trainer` of `transformers`: a callback that steps with the optimizer."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch

from ela_kernels.ebqm import EBQM, spare_skipped

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as missing:  # pragma: no cover
    raise ImportError(
        "ela_kernels.integrations.transformers: got no transformers of 4.42 or later; install "
        "ela-kernels[transformers]"
    ) from missing


class EBQMCallback(TrainerCallback, ExportableState):
    """Runs :class:`ela_kernels.EBQM` in a `Trainer`: one step for each step of the optimizer.

    Equivalent PyTorch, in a loop of one's own::

        ebqm = ela_kernels.EBQM(model, **options)
        ela_kernels.ebqm.spare_skipped(optimizer, model)
        ...
        optimizer.step()  # after gradient_accumulation_steps micro-batches
        ebqm.step()

    A step that a gradient scaler left out counts as not applied. The state is in the checkpoint's `trainer_state.json`,
    of all processes together, and `resume_from_checkpoint` takes it up again, whatever
    `restore_callback_states_from_checkpoint` says. What EBQM decided is in the model's state besides.

    Args:
        spares: the optimizer leaves the parameters of skipped layers as they are
            (:func:`ela_kernels.ebqm.spare_skipped`).
        **options: of :class:`ela_kernels.EBQM`, numbers and words.

    Attributes:
        ebqm: the EBQM; None before `train`.

    Raises:
        ImportError: no `transformers`. As :class:`ela_kernels.EBQM`, when training begins.

    Example:
        >>> from ela_kernels.integrations.transformers import EBQMCallback  # doctest: +SKIP
        >>> trainer = transformers.Trainer(..., callbacks=[EBQMCallback(warmup=500)])  # doctest: +SKIP
    """

    def __init__(self, *, spares: bool = True, **options: Any) -> None:
        self.spares, self.options = spares, options
        self.ebqm: EBQM | None = None
        self.packed: str | None = None
        self._handle: Any = None

    def state(self) -> dict[str, Any]:
        """What is written into the checkpoint, by one process."""
        if self.ebqm is not None:
            stored = io.BytesIO()
            torch.save(self.ebqm.state_dict(), stored)
            self.packed = base64.b64encode(stored.getvalue()).decode()
        arguments = {"spares": self.spares, **self.options}
        return {"args": arguments, "attributes": {"packed": self.packed}}

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Make the EBQM, and take up the state of the checkpoint that training goes on from."""
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        packed = saved["attributes"]["packed"] if isinstance(saved, dict) else None
        self.ebqm = EBQM(model, **self.options)
        if packed is not None:
            found = io.BytesIO(base64.b64decode(packed))
            self.ebqm.load_state_dict(torch.load(found, weights_only=True))
        if self.spares:
            own = getattr(optimizer, "optimizer", optimizer)  # the one that accelerate wraps
            self._handle = spare_skipped(own, model)
        self._optimizer = optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer made a step, after all micro-batches."""
        if self.ebqm is None:
            return
        self.ebqm.step(applied=not getattr(self._optimizer, "step_was_skipped", False))
        if control.should_save:
            self.ebqm.synchronize()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One process alone writes the checkpoint; here all meet."""
        if self.ebqm is not None and control.should_save:
            self.ebqm.synchronize()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decisions stay, and the report too."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self.ebqm is not None:
            self.ebqm.detach()
