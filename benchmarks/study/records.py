"""The file of finished runs: a line of JSON each, written when the run is done."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.study.settings import key_of

FORMAT = 1
Record = dict[str, Any]
_HEAD = json.dumps({"format": FORMAT}).encode()[:-1]
_FIELDS = ("settings", "machine", "train_loss", "test_accuracy", "training_seconds", "skipping")


class Records:
    """The runs that a file holds, and those that are added to it.

    A last line that was cut off, as when the machine went down while it was written, is removed, and said so; its run
    is not among those that are done.

    Args:
        path: of the file; made, with its folder, if it is not there.

    Raises:
        ValueError: the file holds something else, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise ValueError(
                f"out: got {path}, which cannot be written ({error.strerror or error}); allowed is a file in a folder "
                "that can be written to"
            ) from error
        try:
            self._lock()
            self.records, whole = _parse(path)
            if whole < path.stat().st_size:
                print(
                    f"{path}: the last line was cut off; it is removed, and its run is done again",
                    file=sys.stderr,
                )
                self._file.truncate(whole)
            self._by_key = {key_of(record["settings"]): record for record in self.records}
        except BaseException:
            self._file.close()
            raise

    def find(self, key: str) -> Record | None:
        """The run with these settings, if it is done."""
        return self._by_key.get(key)

    def add(self, record: Record) -> None:
        """Write a finished run; it is on the disk when this returns."""
        line = json.dumps({"format": FORMAT, **record}, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)
        self._by_key[key_of(record["settings"])] = record

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"out: {self.path} is being written by another process; allowed is one at a time. Wait for it, or give "
                "another file"
            ) from error


def read(paths: Sequence[Path]) -> list[Record]:
    """All finished runs of some files, which are left as they are; a last line that was cut off is passed over."""
    found: list[Record] = []
    for path in paths:
        try:
            records, whole = _parse(path)
            size = path.stat().st_size
        except OSError as error:
            raise ValueError(
                f"file: got {path}, which cannot be read ({error.strerror or error}); allowed is a file that "
                "`python -m benchmarks.study run` wrote"
            ) from error
        if whole < size:
            print(f"{path}: the last line was cut off, and is passed over", file=sys.stderr)
        found += records
    keys = [key_of(record["settings"]) for record in found]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"file: the run {twice} is there more than once; allowed is each run once. Leave out one of the files, or "
            "remove one of the lines"
        )
    return found


def _parse(path: Path) -> tuple[list[Record], int]:
    """The runs of a file, and how many of its bytes they are: fewer than it has where the last line is cut off."""
    content = path.read_bytes()
    lines = content.split(b"\n")
    last = lines.pop()  # never finished, even where it happens to be JSON
    if not last and lines and _is_cut_off(lines[-1]):
        last = lines.pop() + b"\n"
    if last and not _may_be_ours(last):
        raise _refused(path, len(lines) + 1, f"it begins with {last[:20]!r}")
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1)]
    return records, len(content) - len(last)


def _is_cut_off(line: bytes) -> bool:
    """Whether a line is what is left of one of ours, though it has an end: some file systems fill up with zeros."""
    try:
        json.loads(line)
    except ValueError:
        return _may_be_ours(line)
    return False


def _may_be_ours(line: bytes) -> bool:
    """Whether a line begins as ours do: of a file of something else nothing is removed."""
    return line[: len(_HEAD)] == _HEAD[: len(line)] or not line.strip(b"\0\n")


def _refused(path: Path, number: int, why: str) -> ValueError:
    return ValueError(
        f"file: line {number} of {path} is no finished run ({why}); allowed are the lines that `python -m "
        "benchmarks.study run` wrote. Remove the line, and the run is done again"
    )


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _refused(path, number, str(error)) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        got = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise _refused(path, number, f"format {got!r}; allowed is {FORMAT}")
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        raise _refused(path, number, f"without {', '.join(missing)}")
    del record["format"]
    return record


def read_results(path: Path, name: str, command: str) -> dict[str, Any]:
    """The results of `command --measure`, which hold `name`.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"file: got {path}, which cannot be read ({error}); allowed is a file that `{command} --measure` wrote"
        ) from error
    if not isinstance(found, dict) or not {"machine", name} <= found.keys():
        raise ValueError(
            f"file: got {path}, which has no 'machine' and {name!r}; allowed is a file that `{command} --measure` wrote"
        )
    return found
