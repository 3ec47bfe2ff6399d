"""What is said of errors that others raise: one sentence for each kind that is known."""

from __future__ import annotations

import torch
from torch import distributed

from ela_kernels.optional import MissingLibraryError
from ela_kernels.torch_internals import is_of_compiler


class NotFiniteError(ArithmeticError):
    """The run diverged: a loss or a weight is NaN or infinite; the message says where, and what to try."""


def sentence(error: BaseException) -> str | None:
    """One sentence on an error that is known to end a run, or None for one that nobody foresaw."""
    if is_out_of_memory(error):
        return (
            f"out of memory: {_first_line(error)}; try a smaller --batch-size, --side or --model, fewer --workers, or "
            "--checkpointing"
        )
    if isinstance(error, (OSError, MissingLibraryError, NotFiniteError)):
        return str(error)
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
        return f"a process that reads images ended: {_first_line(error)}; try fewer --workers, or --workers 0"
    if is_of_compiler(error):
        return f"the network could not be compiled: {_first_line(error)}; leave out --compile"
    if _is_of_processes(error):
        return f"the processes of the run lost each other: {_first_line(error)}; see what the others say, and resume"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device did not suffice; PyTorch has no type of its own for the host's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and any(
            part in text
            for part in (
                "DefaultCPUAllocator",
                "not enough memory",
                "out of memory",
                "Storage size calculation overflowed",
                "can't start new thread",  # what a thread takes is memory, or a number that the system limits
            )
        )
    )


def _is_of_processes(error: BaseException) -> bool:
    if not (distributed.is_available() and isinstance(error, RuntimeError)):
        return False
    # Gloo raises a plain RuntimeError when another process is gone.
    return isinstance(error, distributed.DistError) or any(
        part in str(error)
        for part in ("gloo", "Connection closed by peer", "Connection reset by peer")
    )


def _first_line(error: BaseException) -> str:
    """PyTorch's messages have many lines, of which the first says what it is, or that the next one does."""
    line, *more = str(error).strip().splitlines() or [""]
    if line.endswith(":") and more:
        line = f"{line} {more[0]}"
    line = line.rstrip(". ")
    return line[:200] or type(error).__name__
