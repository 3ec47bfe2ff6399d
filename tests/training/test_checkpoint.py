"""The file of a checkpoint: whole or refused, whatever happened to it."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import largest_file

from ela_kernels.training import files
from ela_kernels.training.checkpoint import NAME, VERSION, load_checkpoint, save_checkpoint
from ela_kernels.training.files import UnwritableFileError, write_whole

STATE = {
    "options": {"lr": 0.1},
    "epoch": 1,
    "weights": torch.arange(40.0),
    "steps": [torch.tensor(3), 4.5, "text"],
}


def assert_loaded(state: dict[str, Any]) -> None:
    assert state.keys() == STATE.keys()
    assert torch.equal(state["weights"], STATE["weights"])
    assert (state["options"], state["epoch"], state["steps"][1:]) == ({"lr": 0.1}, 1, [4.5, "text"])
    assert int(state["steps"][0]) == 3


def save_as_before_there_was_a_checksum(folder: Path) -> None:
    torch.save(STATE, folder / NAME)


@pytest.mark.parametrize(
    "save", [lambda f: save_checkpoint(STATE, f), save_as_before_there_was_a_checksum]
)
def test_what_was_saved_is_loaded(tmp_path: Path, save: Any) -> None:
    save(tmp_path)
    assert_loaded(load_checkpoint(tmp_path))
    # The file is still one that PyTorch and tools for archives read.
    assert torch.equal(torch.load(tmp_path / NAME, weights_only=True)["weights"], STATE["weights"])
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        assert archive.testzip() is None


def test_the_checksum_is_of_all_that_is_before_it(tmp_path: Path) -> None:
    save_checkpoint(STATE, tmp_path)
    content = (tmp_path / NAME).read_bytes()
    assert content[-71:-64] == b"sha256:"
    assert content[-64:].decode() == hashlib.sha256(content[:-64]).hexdigest()
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        assert archive.comment == content[-71:]


def test_no_changed_byte_is_taken_for_whole(tmp_path: Path) -> None:
    save_checkpoint(STATE, tmp_path)
    path = tmp_path / NAME
    content = bytearray(path.read_bytes())
    for place in range(len(content)):
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no checkpoint of this program or a damaged one"):
            load_checkpoint(tmp_path)
        content[place] ^= 1 << (place % 8)
    path.write_bytes(content)
    assert_loaded(load_checkpoint(tmp_path))


def test_a_changed_byte_in_a_file_without_checksum_changes_nothing_that_is_read(
    tmp_path: Path,
) -> None:
    save_as_before_there_was_a_checksum(tmp_path)
    path = tmp_path / NAME
    content = bytearray(path.read_bytes())
    refused = 0
    for place in range(0, len(content), 3):
        content[place] ^= 0x41
        path.write_bytes(content)
        try:
            # Padding between records and times of files are covered by no checksum, and nothing reads them.
            assert_loaded(load_checkpoint(tmp_path))
        except ValueError as error:
            refused += "is no checkpoint of this program or a damaged one" in str(error)
        content[place] ^= 0x41
    assert refused > len(content) // 10


class _Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def _archive(**records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"checkpoint/{name.replace('_', '.')}", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"hello\n", "it is no file of PyTorch"),
        (b"PK\x03\x04", "its end is missing"),
        (pickle.dumps({"options": {}}), "it is no file of PyTorch"),
        (_archive(), "it is no file of PyTorch"),
        (_archive(text=b"hello"), r"finds no plain values and tensors in it \(\w+\)"),
        (_archive(data_pkl=b"hello"), r"finds no plain values and tensors in it \(\w+\)"),
        (_Command(Path("made")), r"in it \(UnpicklingError\)"),
        (torch.zeros(3), "without the options of a run"),
        ([], "without the options of a run"),
        ({}, "without the options of a run"),
        ({"options": None}, "without the options of a run"),
        (
            {"options": {}, "version": VERSION + 1},
            f"in version {VERSION + 1}; this one reads version {VERSION}",
        ),
        ({"options": {}, "version": True}, "in version bool; this one reads"),
        ({"options": {}, "version": torch.zeros(2)}, "in version Tensor; this one reads"),
        ({"options": torch.nn.Linear(1, 1)}, r"in it \(UnpicklingError\)"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / NAME).write_bytes(content)
    else:
        torch.save(content, tmp_path / NAME)
    with pytest.raises(ValueError, match=f"^resume: .*{message}") as refused:
        load_checkpoint(tmp_path)
    assert str(tmp_path / NAME) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    for save in (lambda f: save_checkpoint(STATE, f), save_as_before_there_was_a_checksum):
        save(tmp_path)
        content = (tmp_path / NAME).read_bytes()
        (tmp_path / NAME).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="no checkpoint of this program or a damaged one"):
            load_checkpoint(tmp_path)


def test_what_is_no_readable_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "else"):
        with pytest.raises(FileNotFoundError, match=r"^resume: .*checkpoint\.pt not found"):
            load_checkpoint(missing)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"^resume: .*checkpoint\.pt not found"):
        load_checkpoint(tmp_path / "file")
    (tmp_path / NAME).mkdir()
    with pytest.raises(
        ValueError, match=r"^resume: .*checkpoint\.pt cannot be read: Is a directory"
    ):
        load_checkpoint(tmp_path)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read: Permission denied; give"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(
    tmp_path: Path, share: float
) -> None:
    save_checkpoint(STATE, tmp_path)
    size = (tmp_path / NAME).stat().st_size
    failure = r"checkpoint\.pt could not be written: File too large"
    with largest_file(int(size * share)), pytest.raises(UnwritableFileError, match=failure):
        save_checkpoint({**STATE, "epoch": 2}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert_loaded(load_checkpoint(tmp_path))


def test_a_file_is_written_through_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the content, then the entry in the folder: the other way round a power cut leaves an empty file."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(number: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file")
        fsync(number)

    def replaced(old: Path, new: Path) -> None:
        done.append("replace")
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", noted)
    monkeypatch.setattr(files.os, "replace", replaced)
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    if os.path.isdir("/proc/self/fd"):
        assert done == ["file", "replace", "folder"]
    else:
        assert len(done) == 3
