"""The report on this installation: `python -m ela_kernels info`.

Every probe is guarded, so that a broken part becomes a line in the report and never hides the others.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from ela_kernels.command_line import Parser

PACKAGES = ("torch", "scipy", "numpy", "triton")
VARIABLES = (
    "ELA_KERNELS_BACKEND",
    "ELA_KERNELS_SIMD",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)
OPENMP_NAMES = ("libgomp", "libomp", "libiomp")


def collect_report() -> dict[str, Any]:
    """Everything the report holds, as values that JSON can carry.

    Returns:
        A dict with `versions`, `system`, `build`, `extension`, `threads`, `backends`, `devices` and `environment`. A
        probe that failed has `"failed: ..."` in the place of its value.
    """
    probes: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "system": _system,
        "build": _build,
        "extension": _extension,
        "threads": _threads,
        "backends": _backends,
        "devices": _devices,
        "environment": _environment,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    versions = {"ela_kernels": _guarded(_own_version), "python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = _guarded(partial(_installed_version, name))
    return versions


def _own_version() -> str:
    import ela_kernels

    return ela_kernels.__version__


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _system() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": sys.executable,
        "processor": _guarded(_processor),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _build() -> dict[str, Any]:
    from ela_kernels.backends.extension import build_info

    return dict(build_info())


def _extension() -> dict[str, Any]:
    from ela_kernels.backends.extension import extension, extension_problem

    module = extension()
    if module is None:
        return {"loaded": False, "problem": extension_problem()}
    report: dict[str, Any] = {"loaded": True, "file": module.__file__, "cuda": module.has_cuda}
    for name in ("simd_level", "simd_levels"):
        report[name] = _guarded(partial(_call, module, name))
    return report


def _call(module: ModuleType, name: str) -> Any:
    return getattr(module, name)()


def _threads() -> dict[str, Any]:
    import torch

    return {
        "torch": torch.get_num_threads(),
        "openmp_libraries": _guarded(_openmp_libraries),
    }


def _openmp_libraries() -> list[str]:
    """The OpenMP runtimes in this process: more than one means two pools of threads."""
    from ela_kernels.backends.extension import extension

    extension()
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps", errors="replace") as lines:
        return openmp_libraries_in(lines)


def openmp_libraries_in(maps: Iterable[str]) -> list[str]:
    """The paths of OpenMP runtimes among the lines of a process's map of its memory."""
    # Five fields, of which none holds a blank, and a path, which may.
    paths = {fields[5].rstrip("\n") for line in maps if len(fields := line.split(None, 5)) == 6}
    return sorted(path for path in paths if os.path.basename(path).startswith(OPENMP_NAMES))


def _backends() -> dict[str, str]:
    import ela_kernels

    return {name: str(status) for name, status in ela_kernels.backend_status().items()}


def _devices() -> dict[str, Any]:
    return {"torch": _guarded(_torch_devices), "extension": _guarded(_extension_devices)}


def _torch_devices() -> Any:
    import torch

    if not torch.cuda.is_available():
        built_for = torch.version.cuda or getattr(torch.version, "hip", None)
        return "no GPU found" if built_for else "this PyTorch is built for the CPU alone"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "multiprocessors": properties.multi_processor_count,
                "total_memory": properties.total_memory,
            }
        )
    return devices


def _extension_devices() -> Any:
    from ela_kernels.backends.extension import extension

    module = extension()
    if module is None or not module.has_cuda:
        return "the extension has no CUDA part"
    found = module.cuda_devices()
    if found["problem"]:
        return found["problem"]
    for device in found["devices"]:
        device["capability"] = list(device["capability"])
        # A binary that this device cannot run shows here, and not in the middle of a training run.
        code, result = module.cuda_increment(device["index"], value=41)
        device["kernel"] = "ran" if (code, result) == (0, 42) else module.cuda_error(code)
    return found["devices"]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def format_report(report: Mapping[str, Any]) -> str:
    """The report for a person: one block for each part, one line for each value."""
    lines = []
    for name, value in report.items():
        lines.append(f"{name}:")
        lines += _indented(value)
    return "\n".join(lines)


def _indented(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        if not value:
            return ["  -"]
        width = max(len(str(key)) for key in value)
        return [f"  {key!s:<{width}}  {_one_line(entry)}" for key, entry in value.items()]
    return [f"  {_one_line(value)}"]


def _one_line(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_one_line(entry)}" for key, entry in value.items()) or "-"
    if isinstance(value, list | tuple):
        separator = "; " if any(isinstance(entry, Mapping) for entry in value) else " "
        return separator.join(_one_line(entry) for entry in value) or "-"
    return str(value)


def print_report(as_json: bool = False) -> None:
    """Prints the report; it never fails, whatever is broken."""
    report = collect_report()
    print(json.dumps(report, indent=2, default=str) if as_json else format_report(report))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ela_kernels info`."""
    parser = Parser(
        "info",
        "What is installed, how it was built, which backends can run here, and why not the others.",
        examples=[("info --json > info.json", "for a report of a fault")],
    )
    parser.group("options")("--json", action="store_true", help="print the report as JSON")
    print_report(as_json=parser.parse_args(argv).json)
    return 0
