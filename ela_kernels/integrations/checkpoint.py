"""EBQM in checkpoints of `torch.distributed.checkpoint`."""

from __future__ import annotations

import io
from typing import Any

import torch

from ela_kernels.ebqm import EBQM


class EBQMState:
    """The state of an EBQM as one value of a distributed checkpoint.

    `torch.distributed.checkpoint` takes a state apart and loads it into one of the same parts, but EBQM's grows by a
    record at each decision. Equivalent PyTorch: a `Stateful` whose state is `torch.save(ebqm.state_dict())`.

    Every process calls :meth:`ela_kernels.EBQM.synchronize` before it saves, as for any checkpoint of several
    processes. The decisions themselves are in the model's state too.

    Args:
        ebqm: whose state is saved, and set when it is loaded.

    Raises:
        TypeError: no EBQM.

    Example:
        >>> import tempfile, ela_kernels as ek
        >>> from torch.distributed import checkpoint
        >>> from ela_kernels.integrations.checkpoint import EBQMState
        >>> ebqm = ek.EBQM(ek.ELA(32))
        >>> folder = tempfile.mkdtemp()
        >>> _ = checkpoint.save({"ebqm": EBQMState(ebqm)}, checkpoint_id=folder, no_dist=True)
        >>> checkpoint.load({"ebqm": EBQMState(ebqm)}, checkpoint_id=folder, no_dist=True)
    """

    def __init__(self, ebqm: EBQM) -> None:
        if not isinstance(ebqm, EBQM):
            raise TypeError(
                f"ebqm: got {type(ebqm).__name__}; allowed is an ela_kernels.EBQM, whose state is saved"
            )
        self.ebqm = ebqm

    def state_dict(self) -> dict[str, Any]:
        """One value, that no checkpoint takes apart."""
        stored = io.BytesIO()
        torch.save(self.ebqm.state_dict(), stored)
        return {"state": stored.getvalue()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`ela_kernels.EBQM.load_state_dict`."""
        self.ebqm.load_state_dict(torch.load(io.BytesIO(state["state"]), weights_only=True))
