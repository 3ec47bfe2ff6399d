"""What a run is asked to do, and what its numbers depend on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

import torch

import ela_kernels as ek
from ela_kernels.backends.extension import build_info

PACKAGES = ("triton", "liger-kernel", "fla-core", "flash-attn-res")

# A cache of this size where PyTorch does not tell: that of the largest GPUs, so that inputs are surely rotated.
_L2_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Setting:
    """Device and backends of a run.

    `smoke`: tiny shapes and a few rounds, to see that everything runs. `few`: the largest shapes alone, a first look.
    """

    device: torch.device
    backends: tuple[str, ...]
    smoke: bool = False
    few: bool = False

    @property
    def on_gpu(self) -> bool:
        """True where there are CUDA graphs, events and an allocator that counts."""
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """Most rounds of one measurement."""
        return 3 if self.smoke else 50

    @property
    def l2_bytes(self) -> int:
        """Size of the device's last cache."""
        if self.smoke or not self.on_gpu:
            return 2**14
        properties = torch.cuda.get_device_properties(self.device)
        return int(getattr(properties, "L2_cache_size", _L2_BYTES))

    def free_bytes(self) -> int:
        """Memory that a measurement may take."""
        if not self.on_gpu:
            return 2**30
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free


def make_setting(
    device: str, backends: list[str] | None, smoke: bool, few: bool = False
) -> Setting:
    """The setting, with those of `backends` that are available; all GPU backends if None."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    if backends is None:
        backends = ["cuda", "triton"] if found.type == "cuda" else ["cpp"]
    status = ek.backend_status()
    return Setting(found, tuple(b for b in backends if status[b] == "available"), smoke, few)


def describe(setting: Setting) -> dict[str, Any]:
    """The device by its public name, and the versions."""
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": "CPU (a dry run; its times mean nothing)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ela_kernels": ek.__version__,
        "nvcc": build_info().get("nvcc"),
        "cuda_architectures": build_info().get("cuda_architectures"),
        "backends": ek.backend_status(),
        "smoke": setting.smoke,
        "few": setting.few,
    }
    report |= {package: _version(package) for package in PACKAGES}
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        report |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": setting.l2_bytes,
        }
    return report


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
