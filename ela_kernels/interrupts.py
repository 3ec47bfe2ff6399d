"""Ctrl-C in the commands before they begin, while PyTorch is imported, and after they are done."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def end_at_once() -> None:
    """Have Ctrl-C end this process in one line, if it is a command and not a program that imports the package.

    As an exception it would come out of whatever is imported at that moment, with a traceback; some imports catch it.
    """
    if _is_command() and _is_to_be_told():
        signal.signal(signal.SIGINT, _end)


def raise_as_usual() -> None:
    """Have Ctrl-C raise `KeyboardInterrupt` again, for a command to end in its own way."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_to_the_system() -> None:
    """Have Ctrl-C end this process without Python, which is about to end."""
    if _is_to_be_told():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_command() -> bool:
    arguments = getattr(sys, "argv", [])
    if not arguments:
        return False
    # This is there until Python has imported the package of the module that it runs.
    if arguments[0] != "-m":
        return Path(arguments[0]).stem == "ela-kernels"
    return sys.orig_argv[-len(arguments)].removeprefix("-m") == "ela_kernels"


def _is_to_be_told() -> bool:
    """Not where somebody has set the signal otherwise (nohup), nor in a thread, which may not."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return usual and threading.current_thread() is threading.main_thread()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nStopped.\n")
    os._exit(130)
