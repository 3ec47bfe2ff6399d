"""The training program in one of several processes, one of which is told to stop; started by tests with torchrun."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from ela_kernels.__main__ import main
from ela_kernels.training.loop import Trainer


def stop_after(last: int) -> None:
    """Have the second process send itself a signal in that step; the others are to hear of it from there."""
    step = Trainer._step

    def step_and_stop(self: Trainer, *args: Any) -> None:
        step(self, *args)
        if self.processes.rank == 1 and self.steps + 1 == last:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._step = step_and_stop  # type: ignore[method-assign]


if __name__ == "__main__":
    stop_after(int(sys.argv[1]))
    sys.exit(main(["train", *sys.argv[2:]]))
