"""Read probes: how fast this machine reads the same tensors when nothing is computed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Probe = Callable[[Sequence[Tensor]], object]

_SOURCE = Path(__file__).with_name("read_probe.cpp")


def _torch_sum(maps: Sequence[Tensor]) -> object:
    return [m.sum() for m in maps]


def _torch_dot(maps: Sequence[Tensor]) -> object:
    return [torch.dot(flat, flat) for flat in (m.view(-1) for m in maps)]


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
    return loaded


def _compiled(library: ctypes.CDLL, four: bool) -> Probe:
    def run(maps: Sequence[Tensor]) -> object:
        words = maps[0].numel() * maps[0].element_size() // 8
        pointers = (ctypes.c_void_p * len(maps))(*(m.data_ptr() for m in maps))
        return library.read_probe(
            pointers,
            ctypes.c_int64(len(maps)),
            ctypes.c_int64(words),
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
