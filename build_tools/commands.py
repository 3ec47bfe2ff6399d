"""The setuptools commands that build the extension and record how."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_tools import options
from build_tools.carried import carried_in
from build_tools.compilers import BuildError, CudaCompiler, CxxCompiler, find_cuda, find_cxx
from build_tools.ninja_file import (
    SIMD_FLAGS,
    Plan,
    compile_plan,
    environment_flags,
    source_files,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ela_kernels"
MODULE = f"{PACKAGE}._C"
INFO_FILE = "_build_info.json"


def extensions() -> list[Extension]:
    """The one extension module, or none under `ELA_KERNELS_BUILD=none`."""
    mode = options.build_mode(os.environ)
    if mode == "none":
        return []
    sources = [
        str(path.relative_to(ROOT))
        for pattern in ("csrc/**/*.cpp", "csrc/**/*.cu")
        for path in source_files(ROOT, pattern)
    ]
    return [Extension(MODULE, sources, language="c++", optional=mode == "auto")]


def keep_names_of_folders(environ: MutableMapping[str, str], prefix: str) -> None:
    """Makes setuptools leave a `$name` in the path of an environment as it is.

    It takes it for a variable, and stops where there is none of that name: there is one then, which stands for itself.
    """
    for name in re.findall(r"\$([a-zA-Z_]\w*)", prefix, flags=re.ASCII):
        environ.setdefault(name, f"${name}")


def empty_record(mode: str, problem: str | None = None) -> dict[str, Any]:
    return {
        "mode": mode,
        "built": False,
        "problem": problem,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cuda": False,
        "cuda_problem": None,
    }


def build(mode: str, output: Path, folder: Path) -> dict[str, Any]:
    """Builds the extension as `mode` asks and returns the record of it.

    Under `auto` a part that cannot be built is left out, with the reason under `problem` (the whole extension)
    or `cuda_problem` in the record.

    Raises:
        BuildError: if a part that `mode` forces cannot be built.
    """
    record = empty_record(mode)
    jobs = options.job_count(os.environ, options.core_count(), options.available_memory())
    sanitizers = options.sanitizers(os.environ)
    compile_flags, link_flags = environment_flags(os.environ)

    def compiled(cxx: CxxCompiler, cuda: CudaCompiler | None) -> Plan:
        plan = Plan(ROOT, output, cxx, cuda, sanitizers, compile_flags, link_flags)
        objects = options.carried_objects(os.environ)
        if objects is not None:
            plan = dataclasses.replace(plan, carried=carried_in(plan, objects))
            print(f"{len(plan.carried)} of {len(plan.sources())} objects are taken from {objects}")
        compile_plan(plan, folder, jobs)
        return plan

    try:
        cxx = find_cxx(os.environ)
        cuda, record["cuda_problem"] = _cuda_for(mode)
        try:
            plan = compiled(cxx, cuda)
        except BuildError as error:
            if cuda is None or mode == "cuda":
                raise
            plan = compiled(cxx, None)
            print(error.output, file=sys.stderr)
            record["cuda_problem"] = str(error)
    except BuildError as error:
        print(error.output, file=sys.stderr)
        if mode != "auto":
            raise
        record["problem"] = str(error)
        return record
    return record | describe(plan)


def _cuda_for(mode: str) -> tuple[CudaCompiler | None, str | None]:
    """The CUDA compiler that `mode` asks for, or the reason why the build does without."""
    if mode == "cpu":
        return None, "left out by ELA_KERNELS_BUILD=cpu"
    try:
        return find_cuda(os.environ), None
    except BuildError as error:
        if mode == "cuda":
            raise
        return None, str(error)


def describe(plan: Plan) -> dict[str, Any]:
    """The record of a finished build: nothing in it depends on the day or the folder of the build."""
    import pybind11

    record: dict[str, Any] = {
        "built": True,
        "compiler": plan.cxx.version,
        "target": plan.cxx.target,
        "flags": plan.common_flags(),
        "simd_levels": plan.simd_levels(),
        "simd_flags": {k: flags for k, flags in SIMD_FLAGS.items() if k in plan.simd_levels()},
        "openmp": plan.cxx.has_openmp,
        "pybind11": pybind11.__version__,
        "sanitizers": plan.sanitizers,
        "carried_objects": len(plan.carried),
    }
    if not plan.cxx.is_x86_64:
        del record["simd_flags"]
    if plan.cuda is not None:
        record |= {
            "cuda": True,
            "nvcc": plan.cuda.version,
            "cuda_architectures": [str(architecture) for architecture in plan.cuda.architectures],
        }
    return record


def write_record(record: dict[str, Any], *folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INFO_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def announce(record: dict[str, Any]) -> None:
    """Says in one sentence each what was left out."""
    if record["problem"]:
        print(
            f"ela_kernels: installed without its compiled extension, because {record['problem']}. "
            "Everything works through PyTorch, only slower.",
            file=sys.stderr,
        )
    elif record["cuda_problem"] and record["mode"] == "auto":
        print(
            f"ela_kernels: built without CUDA, because {record['cuda_problem']}.", file=sys.stderr
        )


def in_place_binaries() -> list[Path]:
    return list((ROOT / PACKAGE).glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"))


class BuildExtension(build_ext):
    """Compiles with ninja, in place of setuptools' own compiler driver."""

    def run(self) -> None:
        in_place, self.inplace = self.inplace, False
        try:
            for extension in self.extensions:
                record = self._build(extension, bool(in_place))
        finally:
            self.inplace = in_place
        if in_place and self.extensions:
            for binary in in_place_binaries():  # it must not outlive a build that leaves it out
                binary.unlink()
            self.copy_extensions_to_source()
            write_record(record, ROOT / PACKAGE)

    def _build(self, extension: Extension, in_place: bool) -> dict[str, Any]:
        mode = options.build_mode(os.environ)
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.unlink(missing_ok=True)
        folder = Path(self.build_temp).resolve()
        if in_place:
            # pip gives every editable install a new temporary folder; in a lasting one only what changed is rebuilt.
            folder = (
                ROOT
                / "build"
                / f"in-place-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            )
        try:
            record = build(mode, output, folder)
        except BuildError as error:
            raise SystemExit(
                f"ela_kernels: ELA_KERNELS_BUILD={mode} was asked for, but {error}."
            ) from error
        announce(record)
        write_record(record, output.parent)
        return record


class BuildPython(build_py):
    """Records, where no extension is to be built, that this was asked for."""

    def run(self) -> None:
        super().run()
        if self.distribution.has_ext_modules():
            return
        record = empty_record("none", "it was left out by ELA_KERNELS_BUILD=none")
        if self.editable_mode:
            for binary in in_place_binaries():
                binary.unlink()
            write_record(record, ROOT / PACKAGE)
        else:
            write_record(record, Path(self.build_lib, PACKAGE))
