"""Files of a run: written whole or not at all, and named when they cannot be written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ela_kernels.command_line import forget_output


class UnwritableFileError(OSError):
    """A file of the run that could not be written; the message says which and why."""


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in an error of the system, which tells it where a file is opened and not where it is written."""
    try:
        yield
    except UnwritableFileError:
        raise
    except OSError as error:
        raise UnwritableFileError(
            f"{path} could not be written: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Say that it was the results which could not be printed, where a terminal or a file behind it takes no more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_output()
        raise UnwritableFileError(
            f"the results could not be printed: {error.strerror or error}"
        ) from error


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file at once: whoever dies meanwhile leaves the one before, and no half of the new one.

    Raises:
        UnwritableFileError: it could not be written, as on a full disk.
    """
    unfinished = path.with_suffix(".unfinished")
    with named(path):
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the folder's new entry on disk too. Some file systems cannot be asked for that, and need not be."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
