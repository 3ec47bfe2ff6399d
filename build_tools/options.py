"""What the environment asks of a build: the mode, the CUDA architectures, the number of jobs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "none")
SANITIZERS = ("address", "undefined", "thread", "leak")

# Binaries for one generation of each data-centre and desktop line since Turing; a minor revision runs the
# binary of an earlier one of its generation (8.9 runs 8.6), and newer generations compile the PTX.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")

NAMED_ARCHITECTURES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

# g++ -O3 on a large SIMD unit and cicc on a templated kernel both stay below this.
BYTES_PER_JOB = 3 * 1024**3 // 2


class BuildOptionError(ValueError):
    """A build variable has a value that is not allowed."""


@dataclass(frozen=True)
class Architecture:
    """One CUDA architecture, as `9.0`, `9.0a` or `9.0+PTX`."""

    name: str
    ptx: bool = False

    @property
    def number(self) -> str:
        return self.name.replace(".", "")

    @property
    def sort_key(self) -> tuple[int, int, str]:
        major, minor, suffix = _split_architecture(self.name)
        return int(major), int(minor), suffix

    def nvcc_flags(self) -> list[str]:
        number = self.number
        flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    def __str__(self) -> str:
        return self.name + ("+PTX" if self.ptx else "")


def _split_architecture(name: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)", name)
    if match is None:
        raise BuildOptionError(
            f"TORCH_CUDA_ARCH_LIST: {name!r} is no CUDA architecture; write for example '8.0;9.0+PTX', "
            f"or one of the names {', '.join(NAMED_ARCHITECTURES)}"
        )
    return match[1], match[2], match[3]


def parse_architectures(text: str) -> list[Architecture]:
    """Reads PyTorch's syntax: entries parted by `;`, `,` or spaces, each `8.0`, `9.0a`, `9.0+PTX` or a name."""
    for name, numbers in NAMED_ARCHITECTURES.items():
        text = re.sub(rf"(?<![\w.]){name}(\+PTX)?(?![\w.+])", numbers, text, flags=re.IGNORECASE)
    wanted: dict[str, bool] = {}
    for entry in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        name = entry.removesuffix("+PTX")
        _split_architecture(name)
        wanted[name] = wanted.get(name, False) or entry.endswith("+PTX")
    architectures = [Architecture(name, ptx) for name, ptx in wanted.items()]
    return sorted(architectures, key=lambda architecture: architecture.sort_key)


def default_architectures(supported: Sequence[str]) -> list[Architecture]:
    """The default list as far as this nvcc knows it, with PTX for the newest.

    Args:
        supported: numbers as `nvcc --list-gpu-arch` prints them, e.g. `["75", "80", "90"]`; empty if unknown.
    """
    chosen = [Architecture(name) for name in DEFAULT_ARCHITECTURES]
    if supported:
        chosen = [architecture for architecture in chosen if architecture.number in supported]
    if not chosen:
        newest = max((number for number in supported if number.isdigit()), key=int)
        chosen = [Architecture(f"{newest[:-1]}.{newest[-1]}")]
    return [*chosen[:-1], Architecture(chosen[-1].name, ptx=True)]


def build_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("ELA_KERNELS_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise BuildOptionError(f"ELA_KERNELS_BUILD={mode!r}; allowed are {', '.join(MODES)}")
    return mode


def carried_objects(environ: Mapping[str, str]) -> Path | None:
    """The folder of objects compiled elsewhere (`ELA_KERNELS_OBJECTS`, see `build_tools.carried`), if one is named."""
    name = environ.get("ELA_KERNELS_OBJECTS", "").strip()
    if not name:
        return None
    if not Path(name).is_dir():
        raise BuildOptionError(
            f"ELA_KERNELS_OBJECTS={name!r}; allowed is a folder that `python -m build_tools.carried` has filled"
        )
    return Path(name)


def shell_words(environ: Mapping[str, str], variable: str) -> list[str]:
    """A variable's words, parted and quoted as in a shell."""
    text = environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BuildOptionError(
            f"{variable}={text!r}: {error}; allowed are words quoted as in a shell, or one path"
        ) from error


def sanitizers(environ: Mapping[str, str]) -> list[str]:
    """The compiler's sanitizers to build with (`ELA_KERNELS_SANITIZE=address,undefined`)."""
    names = [
        name for name in environ.get("ELA_KERNELS_SANITIZE", "").replace(" ", "").split(",") if name
    ]
    for name in names:
        if name not in SANITIZERS:
            raise BuildOptionError(
                f"ELA_KERNELS_SANITIZE names {name!r}; allowed are {', '.join(SANITIZERS)}"
            )
    return names


def job_count(environ: Mapping[str, str], cores: int, available_bytes: int | None) -> int:
    """How many compilers to run at once: `MAX_JOBS`, else one a core, and never more than memory holds."""
    text = environ.get("MAX_JOBS", "").strip()
    if text and not (text.isdigit() and int(text) > 0):
        raise BuildOptionError(f"MAX_JOBS={text!r}; allowed is a whole number of at least 1")
    jobs = int(text) if text else cores
    if available_bytes is not None:
        jobs = min(jobs, available_bytes // BYTES_PER_JOB)
    return max(jobs, 1)


def core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that may still be used: what the system has free, or the container's limit leaves; None if unknown."""
    amounts = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), flags=re.MULTILINE)
        if match:
            amounts.append(int(match[1]) * 1024)
    for limit_file, used_file in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limit = (root / limit_file).read_text().strip()
            used = (root / used_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():
            amounts.append(max(int(limit) - int(used), 0))
    return min(amounts) if amounts else None
