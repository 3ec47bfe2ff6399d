"""The options of a build, as the environment gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_tools import options
from build_tools.options import Architecture, BuildOptionError

GIB = 1024**3


# Options
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", ["8.0"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0+PTX 8.0", ["8.0", "9.0+PTX"]),
        ("8.0, 8.6", ["8.0", "8.6"]),
        (" 9.0a; ", ["9.0a"]),
        ("10.0;9.0", ["9.0", "10.0"]),
        ("9.0;9.0+PTX", ["9.0+PTX"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("hopper;7.5", ["7.5", "9.0+PTX"]),
        ("12.0f", ["12.0f"]),
    ],
)
def test_architecture_list(text: str, expected: list[str]) -> None:
    assert [str(architecture) for architecture in options.parse_architectures(text)] == expected


@pytest.mark.parametrize("text", ["sm_80", "80", "8.0+SASS", "8", "Amperes", "8.0;;x"])
def test_architecture_list_refuses(text: str) -> None:
    with pytest.raises(BuildOptionError, match="TORCH_CUDA_ARCH_LIST"):
        options.parse_architectures(text)


def test_architecture_flags() -> None:
    assert Architecture("9.0a").nvcc_flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert Architecture("12.0", ptx=True).nvcc_flags() == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_default_architectures_are_those_nvcc_knows_with_ptx_for_the_newest() -> None:
    def names(supported: list[str]) -> list[str]:
        return [str(architecture) for architecture in options.default_architectures(supported)]

    assert names(["75", "80", "86", "89", "90"]) == ["7.5", "8.0", "8.6", "9.0+PTX"]
    assert names(["90", "100", "103", "120", "121"]) == ["9.0", "10.0", "12.0+PTX"]
    assert names(["130", "140"]) == ["14.0+PTX"]
    assert names([])[-1] == "12.0+PTX"


@pytest.mark.parametrize(
    ("max_jobs", "cores", "available", "expected"),
    [
        ("", 8, 64 * GIB, 8),
        ("3", 8, 64 * GIB, 3),
        ("16", 8, 64 * GIB, 16),
        ("16", 8, 6 * GIB, 4),
        ("", 64, 3 * GIB, 2),
        ("4", 8, GIB // 2, 1),
        ("5", 8, None, 5),
    ],
)
def test_job_count(max_jobs: str, cores: int, available: int | None, expected: int) -> None:
    assert options.job_count({"MAX_JOBS": max_jobs}, cores, available) == expected


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_job_count_refuses(text: str) -> None:
    with pytest.raises(BuildOptionError, match="MAX_JOBS"):
        options.job_count({"MAX_JOBS": text}, 4, None)


def test_available_memory_is_the_smaller_of_system_and_container(tmp_path: Path) -> None:
    assert options.available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   8388608 kB\n")
    assert options.available_memory(tmp_path) == 8 * GIB
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text(f"{4 * GIB}\n")
    (cgroup / "memory.current").write_text(f"{GIB}\n")
    assert options.available_memory(tmp_path) == 3 * GIB
    (cgroup / "memory.max").write_text("max\n")
    assert options.available_memory(tmp_path) == 8 * GIB


def test_mode_and_sanitizers() -> None:
    assert options.build_mode({}) == "auto"
    assert options.build_mode({"ELA_KERNELS_BUILD": "CPU"}) == "cpu"
    with pytest.raises(BuildOptionError, match=r"ELA_KERNELS_BUILD='gpu'; allowed are auto, cpu"):
        options.build_mode({"ELA_KERNELS_BUILD": "gpu"})
    assert options.sanitizers({"ELA_KERNELS_SANITIZE": "address, undefined"}) == [
        "address",
        "undefined",
    ]
    with pytest.raises(BuildOptionError, match="ELA_KERNELS_SANITIZE"):
        options.sanitizers({"ELA_KERNELS_SANITIZE": "memory"})
