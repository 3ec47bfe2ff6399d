"""Probes: how fast this machine reads the same tensors, and writes some, when nothing is computed."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Probe = Callable[[Sequence[Tensor]], object]
TransferProbe = Callable[[Sequence[Tensor], Sequence[Tensor]], int]

_SOURCE = Path(__file__).with_name("read_probe.cpp")


def _torch_sum(maps: Sequence[Tensor]) -> object:
    return [m.sum() for m in maps]


def _torch_dot(maps: Sequence[Tensor]) -> object:
    return [torch.dot(flat, flat) for flat in (m.view(-1) for m in maps)]


@functools.cache
def _build() -> ctypes.CDLL | None:
    """The compiled probe, or None without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_probe.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
        done = subprocess.run(
            [compiler, *flags, str(_SOURCE), "-o", str(library)], capture_output=True, check=False
        )
        if done.returncode != 0:
            return None
        loaded = ctypes.CDLL(str(library))  # torch is imported already: its OpenMP is the one used
    loaded.read_probe.restype = ctypes.c_uint64
    loaded.transfer_probe.restype = ctypes.c_uint64
    return loaded


def _addresses(maps: Sequence[Tensor]) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.c_int64]:
    pointers = (ctypes.c_void_p * len(maps))(*(m.data_ptr() for m in maps))
    return pointers, ctypes.c_int64(len(maps))


def _words(maps: Sequence[Tensor]) -> ctypes.c_int64:
    return ctypes.c_int64(maps[0].numel() * maps[0].element_size() // 8)


def _compiled(library: ctypes.CDLL, four: bool) -> Probe:
    def run(maps: Sequence[Tensor]) -> object:
        return library.read_probe(
            *_addresses(maps),
            _words(maps),
            ctypes.c_int(four),
            ctypes.c_int(torch.get_num_threads()),
        )

    return run


def read_probes() -> dict[str, Probe]:
    """Candidates by name; the fastest one on a footprint is the probe for it."""
    probes: dict[str, Probe] = {"torch.sum": _torch_sum, "torch.dot": _torch_dot}
    library = _build()
    if library is not None:
        check = torch.arange(1 << 14).chunk(5)
        sizes = [c.numel() for c in check]
        if len(set(sizes)) != 1:
            check = check[:-1]
        want = sum(int(c.sum()) for c in check)
        for name, four in (("C++, map by map", False), ("C++, four maps side by side", True)):
            probe = _compiled(library, four)
            if probe(check) != want:
                raise RuntimeError(f"read probe {name!r} does not read what it should")
            probes[name] = probe
    return probes


def _transferring(library: ctypes.CDLL, beside: bool) -> TransferProbe:
    def run(read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
        return int(
            library.transfer_probe(
                *_addresses(read),
                *_addresses(written),
                _words(read),
                ctypes.c_int(beside),
                ctypes.c_int(torch.get_num_threads()),
            )
        )

    return run


def transfer_probes() -> dict[str, TransferProbe]:
    """Candidates by name that read some maps and overwrite others; none without a compiler.

    A map that is written through the caches is read first and written back later, and so counts as two here.
    """
    library = _build()
    if library is None:
        return {}
    probes: dict[str, TransferProbe] = {}
    for name, beside in (("written after", False), ("written beside", True)):
        probe = _transferring(library, beside)
        read = list(torch.arange(1 << 14).view(8, -1)[:7])
        written = [torch.zeros_like(read[0]) for _ in range(2)]
        total = probe(read, written)
        if total != sum(int(r.sum()) for r in read) or not all(bool(w[1:].all()) for w in written):
            raise RuntimeError(f"transfer probe {name!r} does not read and write what it should")
        probes[name] = probe
    return probes
