"""EBQM in `lightning`: a callback that steps with the optimizer."""

from __future__ import annotations

from typing import Any

import torch

from ela_kernels.ebqm import EBQM, spare_skipped

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as missing:  # pragma: no cover
    raise ImportError(
        "ela_kernels.integrations.lightning: got no lightning; install ela-kernels[lightning]"
    ) from missing

_KEY = "ela_kernels_ebqm"


class EBQMCallback(Callback):
    """Runs :class:`ela_kernels.EBQM` in a `Trainer`: one step for each step of the optimizer.

    Equivalent PyTorch, in a loop of one's own::

        ebqm = ela_kernels.EBQM(module, **options)
        ela_kernels.ebqm.spare_skipped(optimizer, module)
        ...
        optimizer.step()  # after all micro-batches of accumulate_grad_batches
        ebqm.step()

    A batch in which no optimizer ran, since gradients are accumulated, is none. One that `GradScaler` left out counts
    as not applied. With manual optimisation a batch with any number of optimizer steps is one.

    At each decision `ebqm/skipped` is logged, how many layers are skipped, and `ebqm/score/NAME` of each layer that was
    seen. EBQM's state is in the checkpoint, of all processes together, and is taken up again where training goes on.

    Args:
        spares: optimizers leave the parameters of skipped layers as they are (:func:`ela_kernels.ebqm.spare_skipped`).
        logs: whether scalars are logged.
        **options: of :class:`ela_kernels.EBQM`.

    Attributes:
        ebqm: the EBQM; None before `fit`.

    Raises:
        ImportError: no `lightning`. As :class:`ela_kernels.EBQM`, when `fit` begins.

    Example:
        >>> from ela_kernels.integrations.lightning import EBQMCallback  # doctest: +SKIP
        >>> trainer = lightning.Trainer(callbacks=[EBQMCallback(warmup=500)])  # doctest: +SKIP
    """

    def __init__(self, *, spares: bool = True, logs: bool = True, **options: Any) -> None:
        super().__init__()
        self.spares, self.logs, self.options = spares, logs, options
        self.ebqm: EBQM | None = None
        self._pending: Any = None
        self._handles: list[Any] = []
        self._stepped = 0  # global steps that EBQM knows of
        self._is_applied = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the EBQM, or take up the state of before."""
        if self.ebqm is not None and self.ebqm.model is pl_module and self._pending is None:
            self._pending = self.ebqm.state_dict()
        self.ebqm = EBQM(pl_module, **self.options)
        if self._pending is not None:
            self.ebqm.load_state_dict(self._pending)
            self._pending = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The optimizers are there."""
        self._stepped = trainer.global_step
        for optimizer in trainer.optimizers:
            own = getattr(optimizer, "optimizer", optimizer)  # the one that Lightning wraps
            self._handles.append(own.register_step_post_hook(self._note))
            if self.spares:
                self._handles.append(spare_skipped(own, pl_module))

    def _note(self, *_: Any) -> None:
        self._is_applied = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """A step, where the optimizer made one."""
        if self.ebqm is None or trainer.global_step == self._stepped:
            return
        self._stepped = trainer.global_step
        self.ebqm.step(applied=self._is_applied)
        self._is_applied = False
        if self.logs and self.ebqm.settings.decides_at(self.ebqm.steps):
            rows = self.ebqm.report().layers
            scalars = {"ebqm/skipped": float(sum(row.skipped for row in rows))}
            scalars |= {f"ebqm/score/{r.name}": r.score for r in rows if r.score == r.score}
            pl_module.log_dict(
                {name: torch.tensor(value, device="cpu") for name, value in scalars.items()}
            )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """On every process."""
        if self.ebqm is not None:
            self.ebqm.synchronize()
            checkpoint[_KEY] = self.ebqm.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Kept until `fit` has begun."""
        self._pending = checkpoint.get(_KEY)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Decisions stay, and the report too."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.ebqm is not None:
            self.ebqm.detach()
