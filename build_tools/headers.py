"""Compiles every header of the extension by itself: it includes what it needs, and can be included twice.

An editor, and whoever includes a header next, then need not know in which order a source includes them. CUDA headers
are compiled by the C++ compiler, against the headers that stand in for CUDA's in the tests: no nvcc is needed, and
nothing takes longer than parsing. Exits with 1 where a header does not compile, and names it.

    python -m build_tools.headers
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_tools import options
from build_tools.compilers import BuildError, CxxCompiler, find_cxx, run
from build_tools.ninja_file import Plan, source_files

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = Path("tests/native/cuda_on_cpu")


def headers(root: Path) -> list[Path]:
    """Every header of a checkout, relative to it."""
    patterns = ("csrc/**/*.h", "csrc/**/*.cuh", "tests/native/**/*.h")
    return [path.relative_to(root) for p in patterns for path in source_files(root, p)]


def command_for(header: Path, plan: Plan) -> list[str]:
    """The command, in the root of a checkout, that compiles a header and nothing else."""
    command = [*plan.cxx.command, *plan.common_flags(), "-Icsrc"]
    if header.suffix == ".cuh" or header.is_relative_to(STAND_IN):
        command += [f"-I{STAND_IN}", "-Wno-unknown-pragmas"]
    if header.is_relative_to("csrc/binding") or header.is_relative_to(STAND_IN):
        command += plan.binding_flags()
    # Included twice into an empty source: compiled as the source itself, its `#pragma once` is warned about.
    return [*command, "-fsyntax-only", *(2 * ["-include", str(header)]), "-x", "c++", os.devnull]


def problems_of(root: Path, cxx: CxxCompiler, jobs: int) -> dict[Path, str]:
    """What the compiler says of each header that does not compile alone.

    Raises:
        BuildError: there is no header, so that nothing was looked at.
    """
    plan = Plan(root, root / "unused", cxx, None)
    found = headers(root)
    if not found:
        raise BuildError(f"there is no header below {root}")

    def output_of(header: Path) -> str:
        done = run(command_for(header, plan), cwd=root)
        return "" if done.returncode == 0 else done.stdout or "it printed nothing\n"

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        outputs = dict(zip(found, pool.map(output_of, found), strict=True))
    return {header: output for header, output in outputs.items() if output}


def main(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> int:
    try:
        jobs = options.job_count(environ, options.core_count(), options.available_memory())
        problems = problems_of(root, find_cxx(environ), jobs)
    except BuildError as error:
        print(f"headers: {error}\n{error.output}".rstrip(), file=sys.stderr)
        return 1
    for header, output in problems.items():
        print(f"{header} does not compile alone:\n{output}", file=sys.stderr)
    if not problems:
        print(f"{len(headers(root))} headers compile alone")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
