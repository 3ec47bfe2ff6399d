"""Builds the CUDA kernels with the host compiler, against the stand-in runtime in tests/native/cuda_on_cpu.

A build lies in a folder named after everything that it depends on, so it is made once, and several test processes can
ask for it at the same time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import HALF_TYPES, Maker
from support.layouts import channels_last, contiguous
from torch import Tensor

# `make asan` starts in another folder, with the package that it built first on the path.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import ela_kernels as ek
from build_tools.compilers import BuildError, CxxCompiler, find_cxx
from build_tools.options import available_memory, core_count, job_count
from ela_kernels.backends import dispatch
from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.cuda.backend import CudaBackend

DTYPES = (torch.float32, *HALF_TYPES)
FORMS = (contiguous, channels_last)
UNIT = torch.finfo(torch.float32).eps / 2
SHAPES_OF_INSTANCES = [
    ((1, 16, 4, 4), 2, contiguous),
    ((1, 16, 4, 4), 2, channels_last),
    ((1, 16, 4, 4), 16, channels_last),
    ((1, 9, 3, 3), 3, contiguous),
]
"""Shape, heads and layout of maps for which every instance of the attention's kernels runs, at depths of 3 and 33."""

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "native" / "cuda_on_cpu"
BUILDS = ROOT / "build" / "cuda_on_cpu"
# Links to the sources in the folder of a build: a checkout may have a name that ninja or the shell would not take.
LINKS = {"csrc": ROOT / "csrc", "stand_in": STAND_IN}

KERNELS = "cuda_on_cpu"
SELFTEST = "cuda_on_cpu_selftest"


def sources_of(module: str) -> list[Path]:
    """What is compiled into a module."""
    runtime = [STAND_IN / "fibers.cpp", STAND_IN / "runtime.cpp"]
    if module == SELFTEST:
        return [*runtime, STAND_IN / "selftest_module.cpp", STAND_IN / "selftest.cu"]
    # device_query.cu launches with <<<>>>, which is no C++; it holds no kernel of the package.
    kernels = sorted(
        set((ROOT / "csrc" / "cuda").rglob("*.cu")) - {ROOT / "csrc/cuda/common/device_query.cu"}
    )
    bindings = sorted((ROOT / "csrc" / "binding").glob("cuda*.cpp"))
    return [*runtime, STAND_IN / "device_query.cpp", STAND_IN / "module.cpp", *bindings, *kernels]


def linked(path: Path) -> Path:
    """The path of a source in the folder of a build."""
    name = next(name for name, target in LINKS.items() if path.is_relative_to(target))
    return Path(name) / path.relative_to(LINKS[name])


SANITIZE = "-fsanitize=address,undefined"


def flags_of(sanitized: bool, defines: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Compiler flags of the kernels and the runtime, and of the bindings, which would take most of the time."""
    import pybind11

    common = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi"]
    common += [f"-D{name}" for name in defines]
    common += [f"-I{linked(STAND_IN)}", f"-I{linked(ROOT / 'csrc')}"]
    paths = [
        sysconfig.get_path("include"),
        sysconfig.get_path("platinclude"),
        pybind11.get_include(),
    ]
    binding = [*common, "-O0", *(f"-isystem{path}" for path in dict.fromkeys(paths))]
    # A vector is read from an array of its elements, which nvcc allows.
    kernels = [*common, "-fno-strict-aliasing", "-fno-math-errno", "-Wno-unknown-pragmas"]
    if sanitized:
        kernels += ["-O1", "-g1", "-fno-omit-frame-pointer", SANITIZE]
    else:
        kernels += ["-O2"]
    return {"binding": binding, "kernels": kernels, "link": [SANITIZE] if sanitized else []}


def is_binding(source: Path) -> bool:
    return source.parent.name == "binding" or source.stem.endswith("module")


def _fingerprint(cxx: CxxCompiler, flags: dict[str, list[str]], sources: list[Path]) -> str:
    """Of compiler, flags, interpreter and every file that can be included."""
    digest = hashlib.sha256(repr((cxx.command, cxx.version, flags, sys.version)).encode())
    patterns = [(STAND_IN, "*")]
    if any(source.parent != STAND_IN for source in sources):
        csrc = ROOT / "csrc"  # less cpu/, of which nothing is included here
        patterns += [(csrc, "*"), (csrc / "cuda", "**/*"), (csrc / "binding", "*")]
    files = {
        path for folder, pattern in patterns for path in folder.glob(pattern) if path.is_file()
    }
    for path in sorted(files | set(sources)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(module: str, sanitized: bool = False, defines: tuple[str, ...] = ()) -> Path:
    """The built extension module; compiled where it is not there yet.

    Raises:
        BuildError: there is no C++ compiler, or it fails; `output` holds what it printed.
    """
    cxx = find_cxx(os.environ)
    flags = flags_of(sanitized, defines)
    sources = sources_of(module)
    folder = (
        BUILDS / f"{module}{'_sanitized' if sanitized else ''}_{_fingerprint(cxx, flags, sources)}"
    )
    library = folder / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _locked(folder.with_suffix(".lock")):
        if not library.exists():
            folder.mkdir(exist_ok=True)
            _compile(cxx, flags, sources, library)
    return library


def _compile(
    cxx: CxxCompiler, flags: dict[str, list[str]], sources: list[Path], library: Path
) -> None:
    import ninja
    from ninja.ninja_syntax import Writer, escape

    for name, target in LINKS.items():
        (library.parent / name).unlink(missing_ok=True)
        (library.parent / name).symlink_to(target)
    with (library.parent / "build.ninja").open("w", encoding="utf-8") as file:
        writer = Writer(file, width=sys.maxsize)  # a line that is continued loses one of two spaces
        for rule in ("binding", "kernels"):
            command = escape(shlex.join([*cxx.command, *flags[rule]]))
            writer.rule(rule, f"{command} -x c++ -c $in -o $out")
        command = escape(shlex.join([*cxx.command, "-shared", *flags["link"]]))
        writer.rule("link", f"{command} $in -ldl -o $out")
        objects = [f"{source.name}.o" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            writer.build(
                target, "binding" if is_binding(source) else "kernels", str(linked(source))
            )
        writer.build("linked", "link", objects)
    jobs = job_count(os.environ, core_count(), available_memory())
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(library.parent), "-j", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError("the CUDA kernels do not compile for the CPU", done.stdout + done.stderr)
    (library.parent / "linked").replace(library)


@functools.cache
def load(module: str, library: Path | None = None) -> Any:
    """A module as Python sees it, from `library` or built now."""
    path = build(module, is_sanitized()) if library is None else library
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def load_or_skip(module: str) -> Any:
    """:func:`load`; skips the test where the stand-in runtime cannot be built. A compiler's error is a failure."""
    problem = _nothing_to_build_with()
    if problem is not None:
        pytest.skip(problem)
    try:
        return load(module)
    except BuildError as error:
        pytest.fail(f"{error}:\n{error.output}")


@functools.cache
def _nothing_to_build_with() -> str | None:
    if sys.platform != "linux":
        return "the stand-in for the CUDA runtime is written for Linux"
    try:
        find_cxx(os.environ)
    except BuildError as error:
        return str(error)
    return None


def is_sanitized() -> bool:
    """Whether this process was started to run the sanitized build (see :func:`sanitized_environment`)."""
    return os.environ.get("ELA_CUDA_ON_CPU_SANITIZED") == "1"


def sanitized_environment() -> dict[str, str]:
    """The environment of a process that loads the sanitized build; skips where the compiler has no sanitizers.

    The sanitizer has to be in the process before the interpreter, which is itself not free of leaks.
    """
    command = find_cxx(os.environ).command
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            [*command, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{shlex.join(command)} has no {name}")
        libraries.append(path)
    return {
        **os.environ,
        "ELA_CUDA_ON_CPU_SANITIZED": "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def kernels_on_cpu() -> Iterator[Any]:
    """Forces the cuda backend, lets it take tensors on the CPU, and gives the module that runs its kernels there."""
    kernels = load_or_skip(KERNELS)
    kernels.set_order(0)
    kernels.limit_grid(0)
    kernels.take_launches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CudaBackend, "device_types", frozenset({"cpu"}))
        patch.setattr(CudaBackend, "unavailable_reason", lambda self: None)
        patch.setattr(CudaBackend, "device_reason", lambda self, device: None)
        patch.setattr(cuda, "_kernels", lambda: kernels)
        patch.setattr(cuda, "_device", lambda tensor: (0, 0))
        with ek.use_backend("cuda"):
            yield kernels
    dispatch._plan.cache_clear()  # it remembers that this backend served tensors on the CPU


def instances(prefix: str) -> set[str]:
    """Every instance of a kernel template that the sources have, as the linker knows them, by how its name begins."""
    library = build(KERNELS, is_sanitized())
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True
    )
    return set(re.findall(rf" [TWt] (void ela::cuda::{prefix}\w+_kernel<.*)", symbols.stdout))


def leaving_out(kernels: set[str]) -> set[str]:
    """Those instances that a call with a tolerance takes: the argument before the depth says so."""
    return {kernel for kernel in kernels if re.search(r"_kernel<[^<>]*, true, \d+>\(", kernel)}


def launched(kernels: Any) -> list[str]:
    """The kernels launched since the last look, without their template arguments."""
    names = [re.search(r"(\w+)_kernel", launch[0]) for launch in kernels.take_launches()]
    return [name[1] for name in names if name is not None]


def off_by(elements: int, layout: Maker) -> Maker:
    """`layout`, with every address that many elements after a 16-byte boundary."""

    def make(shape: Any, dtype: torch.dtype) -> Tensor:
        x = layout(shape, dtype)
        memory = torch.empty(x.numel() + elements, dtype=dtype)
        assert memory.data_ptr() % 16 == 0
        moved = memory[elements:].as_strided(x.shape, x.stride(), elements)
        return moved.copy_(x)

    return make


def padded(shape: Any, dtype: torch.dtype, gap: int | None = None) -> Tensor:
    """Rows of the last dimension with gaps between them, which hold NaN; aligned rows unless a gap is given."""
    row = (shape[-1] // 16 + 1) * 16 if gap is None else shape[-1] + gap
    memory = torch.full((*shape[:-1], row), torch.nan, dtype=dtype)
    return memory[..., : shape[-1]].copy_(torch.randn(shape))


def odd_rows(shape: Any, dtype: torch.dtype) -> Tensor:
    return padded(shape, dtype, 1)


def name_of(value: object) -> str:
    """Of a layout, a dtype or a number, in a test's name."""
    return getattr(value, "__name__", str(value))
