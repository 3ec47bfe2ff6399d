"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


def save_checkpoint(state: dict[str, Any], folder: Path) -> Path:
    """Write `folder/checkpoint.pt` at once: a run that dies meanwhile leaves the one before."""
    path = folder / NAME
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return path


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read `folder/checkpoint.pt`; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is another one, or damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"resume: {path} not found. Train without --resume first, or give the --out of that run"
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"resume: {path} is no checkpoint of this program: {error}") from error
    if not isinstance(state, dict) or "options" not in state:
        raise ValueError(
            f"resume: {path} is no checkpoint of this program; give the --out of a run"
        )
    return state
