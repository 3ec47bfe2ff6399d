"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from ela_kernels.training.failures import is_out_of_memory
from ela_kernels.training.files import write_whole

NAME = "checkpoint.pt"
# Of what a checkpoint holds. Those written before there was a version have none, and hold the same.
VERSION = 1

# The file is what torch.save writes, a zip archive, and a comment at the archive's end that every reader of such files
# skips: a mark, and the SHA-256 of all bytes before it (the mark and the comment's length among them) in hexadecimal.
_MARK = b"sha256:"
_COMMENT = len(_MARK) + hashlib.sha256().digest_size * 2
# An archive without a comment ends in a record of this size, which this signature begins.
_END, _END_SIGNATURE = 22, b"PK\x05\x06"

# By the argument that asks for one.
_ADVICE = {
    "resume": "give the --out of an earlier run, or train into another folder without --resume",
    "evaluate": "give the --out of an earlier run, or the path of its checkpoint",
    "run": "give the folder of a run, or the path of its checkpoint",
}
_ABSENT = {
    "resume": "Train without --resume first, or give the --out of that run",
    "evaluate": "Train first, or give the folder of a run or the path of its checkpoint",
    "run": "Train first, or give the folder of a run or the path of its checkpoint",
}


def save_checkpoint(state: dict[str, Any], folder: Path) -> Path:
    """Write `folder/checkpoint.pt` at once: a run that dies meanwhile leaves the one before.

    Raises:
        UnwritableFileError: it could not be written, as on a full disk; the one before is whole.
    """
    path = folder / NAME
    # In memory first: a disk that fills up while torch.save writes is a RuntimeError, with nothing said of the disk.
    content = io.BytesIO()
    torch.save({"version": VERSION, **state}, content)
    content.seek(-2, io.SEEK_END)  # the comment's length ends the archive
    content.write(_COMMENT.to_bytes(2, "little") + _MARK)
    content.write(hashlib.sha256(content.getbuffer()).hexdigest().encode())
    write_whole(path, content.getbuffer())
    return path


def load_checkpoint(
    folder: Path,
    name: str = NAME,
    argument: str = "resume",
) -> dict[str, Any]:
    """Read a checkpoint, `folder/checkpoint.pt` unless another is named; its tensors are put on the CPU.

    Nothing in the file is executed, and nothing damaged is taken for whole.

    Args:
        folder: where it is.
        name: of the file.
        argument: of the command, that asks for it, `"resume"`, `"evaluate"` or `"run"`; errors name it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is another one, damaged, or cannot be read.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{argument}: {path} not found. {_ABSENT[argument]}") from None
    except OSError as error:
        raise ValueError(
            f"{argument}: {path} cannot be read: {error.strerror or error}; {_ADVICE[argument]}"
        ) from error
    state = _decoded(content, path, argument)
    if not isinstance(state, dict) or not isinstance(state.get("options"), dict):
        raise ValueError(
            f"{argument}: {path} is no checkpoint of this program, without the options of a run; {_ADVICE[argument]}"
        )
    version = state.pop("version", VERSION)
    if type(version) is not int or version != VERSION:
        got = version if type(version) is int else type(version).__name__
        raise ValueError(
            f"{argument}: {path} was written by another release of this program, in version {got}; this one reads "
            f"version {VERSION}. Take that release for it, or train into another folder"
        )
    return state


def _decoded(content: bytes, path: Path, argument: str) -> object:
    reason = _damage(content)
    if reason is None:
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            # A pickle of anything else, or of code, raises nearly anything: KeyError, UnpicklingError, TypeError ...
            if is_out_of_memory(error):
                raise
            reason = f"PyTorch finds no plain values and tensors in it ({type(error).__name__})"
    raise ValueError(
        f"{argument}: {path} is no checkpoint of this program or a damaged one: {reason}; {_ADVICE[argument]}"
    )


def _damage(content: bytes) -> str | None:
    """What is wrong with the bytes of the file, None if they are those that were written."""
    if not content:
        return "it is empty"
    if not content.startswith(b"PK\x03\x04"):
        return "it is no file of PyTorch"
    if content[-_COMMENT:].startswith(_MARK):
        digest = hashlib.sha256(memoryview(content)[: len(_MARK) - _COMMENT])
        if digest.hexdigest().encode() == content[len(_MARK) - _COMMENT :]:
            return None
        return "its checksum does not fit its content"
    if not content[-_END:].startswith(_END_SIGNATURE):
        return "its end is missing or changed"
    # Written before checkpoints had a checksum of the whole: the archive holds one of each record.
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            record = archive.testzip()
    except Exception as error:
        # A changed header raises what its field stands for: an encrypted, compressed or overlapping record ...
        if is_out_of_memory(error):
            raise
        return f"its archive cannot be read ({type(error).__name__})"
    return None if record is None else f"the checksum of its record {record} does not fit"
