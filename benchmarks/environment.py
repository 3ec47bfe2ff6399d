"""What a number depends on: machine, versions, threads, malloc."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import ela_kernels
from ela_kernels.backends.extension import build_info, extension

DEFAULT, KEPT = "default", "kept"

# Read by glibc when a process starts. `kept` never gives memory back to the system, so that a map is not paid for again
# with page faults in every step; it shows the kernels' own merit. `default` is what a user has.
MALLOC_SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    KEPT: {
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_MMAP_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "1000000000",
    },
}

# For resident memory: every map is given back at once, so that the peak is of what is in use.
MALLOC_EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def process_environment(malloc: dict[str, str], compiler_cache: Path) -> dict[str, str]:
    """This process's environment, with other settings of malloc and torch.compile's cache in a folder of the run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return kept | malloc | {"TORCHINDUCTOR_CACHE_DIR": str(compiler_cache)}


def describe(threads: int | None) -> dict[str, Any]:
    """The machine and the versions, as far as they are public."""
    module = extension()
    info = build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ela_kernels": ela_kernels.__version__,
        "compiler": info.get("compiler"),
        "simd_level": None if module is None else module.simd_level(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "malloc": MALLOC_SETTINGS,
    }


def malloc_of_process() -> str:
    """Which of the settings of malloc this process was started with; the variables themselves where it is none."""
    set_here = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    for name, setting in MALLOC_SETTINGS.items():
        if set_here == setting:
            return name
    return ", ".join(f"{name}={value}" for name, value in sorted(set_here.items()))


def cpu_name() -> str:
    """The processor's own name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()
