"""Runs the cases in one process, on the checkout whose package is imported, and saves what they gave."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ela_kernels as ek
from build_tools.same_numbers import layers, operations
from build_tools.same_numbers.draw import Draw
from build_tools.same_numbers.refusals import refusals


class Found(NamedTuple):
    """What a case gave: tensors with their strides, or an error."""

    tensors: dict[str, tuple[Tensor, tuple[int, ...]]]
    error: str | None
    notes: str


FORMS: dict[str, tuple[Any, int]] = {**operations.FORMS, **layers.FORMS}


def names(count: int | None, patterns: list[str]) -> list[str]:
    """Of the cases that match a pattern, `count` spread over all forms; all if None."""
    found = [f"{form} {i}" for form, (_, number) in FORMS.items() for i in range(number)]
    found += list(refusals())
    if patterns:
        found = [n for n in found if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if count is None or count >= len(found):
        return found
    return [found[i * len(found) // count] for i in range(count)]


def run_case(name: str, backend: str) -> Found:
    """One case; an error is what it gave."""
    d, tensors, error = Draw(name, backend), {}, None
    with ek.use_backend(backend):
        try:
            if name.startswith("refusal: "):
                refusals()[name]()
            else:
                tensors = FORMS[name.rpartition(" ")[0]][0](d)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return Found(
        {n: (t.detach().contiguous().clone(), t.stride()) for n, t in tensors.items()},
        error,
        ", ".join(d.notes),
    )


def main(checkout: str, backend: str, out: str, chosen: list[str]) -> None:
    """Run `chosen` and save what they gave to the file `out`; the name of the one that runs goes to stdout."""
    at = Path(ek.__file__).resolve()
    if Path(checkout).resolve() not in at.parents:
        raise SystemExit(f"the package was imported from {at}, not from {checkout}")
    status = ek.backend_status()[backend]
    if status != "available":
        raise SystemExit(f"{checkout}: the backend {backend} is not there: {status}")
    warnings.simplefilter("ignore")
    logging.getLogger("ela_kernels").setLevel(logging.ERROR)  # of calls that eager PyTorch serves
    found = {}
    for name in chosen:
        print(name, flush=True)
        found[name] = tuple(run_case(name, backend))
    torch.save(found, out)
