"""What is compiled with which flags, and the build.ninja that says so."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from build_tools.compilers import (
    NVCC_CANNOT_TAKE,
    NVCC_TMPDIR,
    BuildError,
    CudaCompiler,
    CxxCompiler,
    check_nvcc_runs_in,
    first_error,
)
from build_tools.options import core_count, shell_words
from build_tools.progress import follow, forecast

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *AVX2_FLAGS,
    "-mprefer-vector-width=512",
]
AVX512_BF16_FLAGS = [*AVX512_FLAGS, "-mavx512bf16"]
# The link to the sources in the folder of a build. All that is compiled is named by it: the names of a checkout's own
# folders then stand nowhere in a build, and may be any. Of what ninja, the shell and a depfile take for their own,
# ninja's writer and shlex could escape all; but nvcc hands paths to a shell unescaped.
SOURCES = "csrc"
CARRIED = "carried"  # the same for objects that are not compiled here

SIMD_FLAGS = {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS, "avx512_bf16": AVX512_BF16_FLAGS}


@dataclass(frozen=True)
class Plan:
    """Everything that decides the content of the extension."""

    root: Path
    output: Path
    cxx: CxxCompiler
    cuda: CudaCompiler | None
    sanitizers: list[str] = field(default_factory=list)
    extra_compile: list[str] = field(default_factory=list)
    extra_link: list[str] = field(default_factory=list)
    carried: Mapping[Path, Path] = field(default_factory=dict)
    """Objects that are there already, all in one folder, by the source that they are of."""

    def common_flags(self) -> list[str]:
        flags = ["-std=c++17", "-O1" if self.sanitizers else "-O3", "-fPIC", "-fvisibility=hidden"]
        flags += ["-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi", *self.cxx.openmp_compile]
        if self.sanitizers:
            flags += ["-g", "-fno-omit-frame-pointer", _sanitize_flag(self.sanitizers)]
        if self.cxx.is_x86_64:
            flags.append("-DELA_X86_SIMD")
        if "avx512_bf16" in self.simd_levels():
            flags.append("-DELA_X86_BF16")
        return flags + self.extra_compile

    def binding_flags(self) -> list[str]:
        import pybind11

        paths = [
            sysconfig.get_path("include"),
            sysconfig.get_path("platinclude"),
            pybind11.get_include(),
        ]
        return [f"-isystem{path}" for path in dict.fromkeys(paths)]

    def cuda_flags(self) -> list[str]:
        assert self.cuda is not None
        if set(self.cxx.executable) & NVCC_CANNOT_TAKE:
            raise BuildError(
                f"nvcc cannot start a C++ compiler of this name, {self.cxx.executable!r}: it would have a shell read "
                "it; name by CXX one, or a link to it, in a folder with a plain name"
            )
        flags = ["-std=c++17", "-O3", "-ccbin", self.cxx.executable]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
        for architecture in self.cuda.architectures:
            flags += architecture.nvcc_flags()
        return flags

    def link_flags(self) -> list[str]:
        kind = ["-bundle", "-undefined", "dynamic_lookup"] if self.cxx.is_darwin else ["-shared"]
        flags = [*kind, *self.cxx.openmp_link]
        if self.cuda is not None:
            flags += [*self.cuda.library_flags, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        flags += self.extra_link
        if self.sanitizers:
            flags.append(_sanitize_flag(self.sanitizers))
        return flags

    def simd_levels(self) -> list[str]:
        if not self.cxx.is_x86_64:
            return ["baseline"]
        return [
            "baseline",
            "avx2",
            "avx512",
            *(["avx512_bf16"] if self.cxx.has_avx512_bf16 else []),
        ]

    def sources(self) -> list[Path]:
        found = [
            *source_files(self.root, "csrc/binding/*.cpp"),
            *source_files(self.root, "csrc/cpu/*.cpp"),
        ]
        left_out = tuple(f"_{level}" for level in SIMD_FLAGS if level not in self.simd_levels())
        found = [source for source in found if not source.stem.endswith(left_out)]
        if self.cuda is None:
            return [
                source
                for source in found
                if source.parent.name != "binding" or not source.name.startswith("cuda")
            ]
        return found + source_files(self.root, "csrc/cuda/**/*.cu")

    def flags_for(self, source: Path) -> list[str]:
        """The flags beyond the rule's own that one source needs."""
        if source.parent.name == "binding":
            # Read by that file alone: the other objects of a build for the CPU serve one with CUDA too.
            with_cuda = self.cuda is not None and source.name == "module.cpp"
            return self.binding_flags() + (["-DELA_WITH_CUDA"] if with_cuda else [])
        for level, flags in SIMD_FLAGS.items():
            if source.stem.endswith(f"_{level}"):
                return flags
        return []


def _sanitize_flag(names: Sequence[str]) -> str:
    return f"-fsanitize={','.join(names)}"


def source_files(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(pattern))


def environment_flags(environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What the user's CPPFLAGS, CXXFLAGS and LDFLAGS add to compiling and linking."""
    compile_flags = [*shell_words(environ, "CPPFLAGS"), *shell_words(environ, "CXXFLAGS")]
    return compile_flags, shell_words(environ, "LDFLAGS")


def ninja_text(plan: Plan) -> str:
    """The build.ninja of a plan: one rule for each compiler, one edge for each object, one link to :func:`library_of`.

    Raises:
        BuildError: a path or flag that ninja cannot take.
    """
    from ninja.ninja_syntax import Writer

    text = io.StringIO()
    writer = Writer(text, width=sys.maxsize)  # a line that is continued loses one of two spaces
    writer.variable("ninja_required_version", "1.5")
    writer.variable("cxx", _shell(plan.cxx.command))
    writer.variable("cxxflags", _shell([*plan.common_flags(), f"-I{SOURCES}"]))
    writer.rule(
        "cxx",
        command="$cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="$in",
    )
    if plan.cuda is not None:
        writer.variable("nvcc", _shell([plan.cuda.nvcc]))
        writer.variable("nvccflags", _shell([*plan.cuda_flags(), f"-I{SOURCES}"]))
        writer.rule(
            "nvcc",
            command=f"TMPDIR={NVCC_TMPDIR} $nvcc $nvccflags -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="$in",
        )
    writer.variable("ldflags", _shell(plan.link_flags()))
    writer.rule("link", command="$cxx $in $ldflags -o $out", description="$out")
    objects = []
    for source in plan.sources():
        if source in plan.carried:
            objects.append(str(Path(CARRIED, plan.carried[source].name)))
            continue
        name = source.relative_to(plan.root / "csrc")
        target = object_of(plan, source)
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        flags = plan.flags_for(source)
        variables = {"flags": _shell(flags)} if flags else None
        writer.build(str(target), rule, str(Path(SOURCES, name)), variables=variables)
        objects.append(str(target))
    writer.build(library_of(plan), "link", objects)
    return text.getvalue()


def object_of(plan: Plan, source: Path) -> Path:
    """What ninja compiles a source to, in the folder of the build."""
    return Path("objects", f"{source.relative_to(plan.root / 'csrc')}.o")


def library_of(plan: Plan) -> str:
    """What ninja links, in the folder of the build."""
    return f"linked{plan.output.suffix}"


def _shell(words: Sequence[str]) -> str:
    """For a ninja variable that becomes a part of a command."""
    from ninja.ninja_syntax import escape

    for word in words:
        if "\n" in word or "\r" in word:
            raise BuildError(
                f"{word!r} holds a line break, which ninja cannot take; allowed are folders and flags without one"
            )
    escaped: str = escape(shlex.join(words))
    return escaped


def link_sources(root: Path, folder: Path) -> None:
    """Makes or renews the link to the sources; objects of other sources are not taken for theirs."""
    link, sources = folder / SOURCES, root / "csrc"
    if link.is_symlink() and os.readlink(link) == str(sources):
        return
    link.unlink(missing_ok=True)
    (folder / ".ninja_log").unlink(missing_ok=True)
    link.symlink_to(sources)


def compile_plan(plan: Plan, folder: Path, jobs: int) -> None:
    """Writes `folder/build.ninja` and runs it.

    Raises:
        BuildError: if a compiler or the linker fails; `output` holds what it printed.
    """
    try:
        import ninja
        import pybind11  # noqa: F401
    except ImportError as error:
        raise BuildError(
            f"the Python package {error.name}, which a build needs, is missing"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    if plan.cuda is not None:
        check_nvcc_runs_in(folder)
    link_sources(plan.root, folder)
    if plan.carried:
        link = folder / CARRIED
        link.unlink(missing_ok=True)
        link.symlink_to(next(iter(plan.carried.values())).parent.resolve())
    (folder / "build.ninja").write_bytes(os.fsencode(ninja_text(plan)))
    plan.output.parent.mkdir(parents=True, exist_ok=True)
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-j", str(jobs), "-k", "0"]
    print(f"building {plan.output.name} in {folder}", flush=True)
    print(forecast(plan, jobs, core_count()), flush=True)
    try:
        status, printed = follow(command, folder)
    except OSError as error:
        raise BuildError(f"ninja could not be run: {error}") from error
    if status != 0:
        raise BuildError(f"compiling failed: {first_error(printed)}", printed)
    print(printed, end="", flush=True)
    shutil.copy2(folder / library_of(plan), plan.output)
