"""Finds the C++ compiler and nvcc, and asks each what it can do."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from build_tools.options import (
    Architecture,
    default_architectures,
    parse_architectures,
    shell_words,
)

OPENMP_PROGRAM = """\
#include <omp.h>
int main() {
  int total = 0;
#pragma omp parallel for reduction(+ : total)
  for (int i = 0; i < 4; ++i) total += omp_get_num_threads() > 0;
  return total == 4 ? 0 : 1;
}
"""

# GCC 10 and Clang 9 brought what this needs.
AVX512_BF16_PROGRAM = """\
#include <immintrin.h>
__m256bh narrowed(__m512 x) { return _mm512_cvtneps_pbh(x); }
int main() { return __builtin_cpu_supports("avx512bf16") < 0; }
"""


# nvcc puts paths between double quotes for a shell, and these mean something there.
NVCC_CANNOT_TAKE = frozenset('$`"\\\n')
# Nor can it take them in TMPDIR; where it runs, there is a folder to write to.
NVCC_TMPDIR = "."


class BuildError(RuntimeError):
    """The extension cannot be built. The text is one plain sentence; `output` is what the compiler printed."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


@dataclass(frozen=True)
class CxxCompiler:
    """A C++ compiler that was seen to compile and link a C++17 program."""

    command: list[str]
    version: str
    target: str
    openmp_compile: list[str] = field(default_factory=list)
    openmp_link: list[str] = field(default_factory=list)
    has_avx512_bf16: bool = False

    @property
    def executable(self) -> str:
        """The compiler alone, without a launcher such as ccache before it or flags after it."""
        return [word for word in self.command if not word.startswith("-")][-1]

    @property
    def has_openmp(self) -> bool:
        return bool(self.openmp_link)

    @property
    def is_x86_64(self) -> bool:
        return self.target.startswith(("x86_64", "amd64"))

    @property
    def is_darwin(self) -> bool:
        return "darwin" in self.target


@dataclass(frozen=True)
class CudaCompiler:
    nvcc: str
    version: str
    architectures: list[Architecture]
    library_flags: list[str]


def run(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a compiler with its messages in English and together on stdout; raises OSError if it cannot start."""
    return subprocess.run(
        list(command),
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def first_error(output: str) -> str:
    """The line of a compiler's output that says most about why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (
        r"\b(error|fatal)\b",
        r"undefined reference|cannot find|not found|No such file",
    ):
        for line in lines:
            if re.search(pattern, line):
                return line
    return lines[-1] if lines else "it printed nothing"


def _compiles(
    command: list[str], program: str, flags: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        return run([*command, "-std=c++17", str(source), "-o", str(Path(folder, "probe")), *flags])


def _find_openmp(command: list[str], is_darwin: bool) -> tuple[list[str], list[str]]:
    candidates = [(["-fopenmp"], ["-fopenmp"])]
    if (
        is_darwin
    ):  # Apple's clang knows the pragmas, but leaves the flag and the library to the user
        prefixes = [
            os.environ.get("LIBOMP_PREFIX", ""),
            "/opt/homebrew/opt/libomp",
            "/usr/local/opt/libomp",
        ]
        for prefix in prefixes:
            if prefix and Path(prefix, "include/omp.h").exists():
                compile_flags = ["-Xpreprocessor", "-fopenmp", f"-I{prefix}/include"]
                candidates.append((compile_flags, [f"-L{prefix}/lib", "-lomp"]))
    for compile_flags, link_flags in candidates:
        if _compiles(command, OPENMP_PROGRAM, [*compile_flags, *link_flags]).returncode == 0:
            return compile_flags, link_flags
    return [], []


def find_cxx(environ: Mapping[str, str]) -> CxxCompiler:
    """The compiler named by `CXX`, else the first of g++, clang++, c++ on the PATH.

    Raises:
        BuildError: if there is none, or it cannot compile and link an empty program.
    """
    if sys.platform == "win32":
        raise BuildError(
            "on Windows the extension is not built: its kernels need g++ or clang++, not MSVC"
        )
    names = ("clang++", "c++", "g++") if sys.platform == "darwin" else ("g++", "clang++", "c++")
    if environ.get("CXX", "").strip():
        command = [environ["CXX"]]
        if shutil.which(command[0]) is None:  # no path, with a space in it perhaps: a command line
            command = shell_words(environ, "CXX")
        if shutil.which(command[0]) is None:
            raise BuildError(f"the C++ compiler named by CXX, {environ['CXX']!r}, was not found")
        if os.path.dirname(command[0]):  # it is run from another folder
            command[0] = os.path.abspath(command[0])
    else:
        command = next(([name] for name in names if shutil.which(name)), [])
        if not command:
            raise BuildError(
                f"no C++ compiler was found: there is no {', '.join(names)} on the PATH"
            )
    try:
        trial = _compiles(command, "int main() { return 0; }\n", [])
        if trial.returncode != 0:
            raise BuildError(
                f"the C++ compiler {shlex.join(command)} cannot build an empty program: "
                f"{first_error(trial.stdout)}",
                trial.stdout,
            )
        version = run([*command, "--version"]).stdout.partition("\n")[0].strip()
        target = run([*command, "-dumpmachine"]).stdout.strip()
    except OSError as error:
        raise BuildError(
            f"the C++ compiler {shlex.join(command)} could not be run: {error}"
        ) from error
    openmp_compile, openmp_link = _find_openmp(command, "darwin" in target)
    found = CxxCompiler(command, version, target, openmp_compile, openmp_link)
    if not found.is_x86_64:
        return found
    trial = _compiles(command, AVX512_BF16_PROGRAM, ["-mavx512f", "-mavx512bf16"])
    return replace(found, has_avx512_bf16=trial.returncode == 0)


def check_nvcc_runs_in(folder: Path) -> None:
    """nvcc records where a source is, and has a shell read that: a variable in it does no harm, a command would run.

    Raises:
        BuildError: nvcc must not be run in this folder.
    """
    found = re.search(r'["`\\]|\$[({]', str(folder))
    if found:
        raise BuildError(
            f"nvcc cannot compile in {str(folder)!r}: it would have a shell read {found[0]!r}; allowed is a folder "
            "whose path holds no quote, backquote, backslash, $( or ${"
        )


def _nvcc_path(environ: Mapping[str, str]) -> str:
    """An explicit choice is taken at its word; only without one the usual places are searched."""
    if environ.get("CUDACXX"):
        nvcc = shutil.which(environ["CUDACXX"])
        if nvcc is None:
            raise BuildError(
                f"the CUDA compiler named by CUDACXX, {environ['CUDACXX']!r}, was not found"
            )
        return nvcc
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            nvcc = shutil.which("nvcc", path=str(Path(environ[variable], "bin")))
            if nvcc is None:
                raise BuildError(f"{variable}={environ[variable]} holds no bin/nvcc")
            return nvcc
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise BuildError(
            "no CUDA compiler was found: there is no nvcc on the PATH or in /usr/local/cuda/bin"
        )
    return nvcc


def find_cuda(environ: Mapping[str, str]) -> CudaCompiler:
    """The nvcc named by `CUDACXX`, `CUDA_HOME` or `CUDA_PATH`, else the one on the PATH or in /usr/local/cuda.

    Raises:
        BuildError: if there is none, or it cannot be run.
    """
    nvcc = os.path.abspath(_nvcc_path(environ))
    try:
        version_output = run([nvcc, "--version"])
        listed = run([nvcc, "--list-gpu-arch"]).stdout
    except OSError as error:
        raise BuildError(f"the CUDA compiler {nvcc} could not be run: {error}") from error
    if version_output.returncode != 0:
        raise BuildError(f"the CUDA compiler {nvcc} failed: {first_error(version_output.stdout)}")
    match = re.search(r"release [\d.]+, V([\d.]+)", version_output.stdout)
    version = match[1] if match else "unknown"
    wanted = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wanted:
        architectures = parse_architectures(wanted)
    else:
        architectures = default_architectures(re.findall(r"compute_(\d+)\b", listed))
    # nvcc alone knows where its runtime library is: the folder differs between its installers.
    dry_run = run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]).stdout
    toolkit = re.search(r"^#\$ TOP=(.*)$", dry_run, flags=re.MULTILINE)
    if toolkit and set(toolkit[1]) & NVCC_CANNOT_TAKE:
        raise BuildError(
            f"the CUDA compiler {nvcc!r} cannot work in the folder {toolkit[1]!r}: it would have a shell read that "
            "name; name by CUDA_HOME a link to the toolkit, in a folder with a plain name"
        )
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry_run, flags=re.MULTILINE)
    library_flags = shlex.split(libraries[1]) if libraries else []
    return CudaCompiler(nvcc, version, architectures, library_flags)
