"""Objects that were compiled elsewhere, for a machine whose time is short: it links them, and compiles what is stale.

    TORCH_CUDA_ARCH_LIST=9.0 python -m build_tools.carried build/gpu/objects    # where there is time, by its Python
    ELA_KERNELS_OBJECTS=build/gpu/objects python setup.py build_ext --inplace   # there

An object is named by a hash of all that it is made from: every file below csrc/, the flags, the architectures and the
release of nvcc, and for the binding the Python that it is for. One that nothing asks for by this name is not taken, so
that after a change of any of these the build compiles as it would without the folder. Which C++ compiler made an
object is not part of it: g++ and clang++ of the same system link each other's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from build_tools import options
from build_tools.compilers import BuildError, find_cuda, find_cxx
from build_tools.ninja_file import Plan, compile_plan, environment_flags, object_of

ROOT = Path(__file__).resolve().parent.parent


def carried_in(plan: Plan, folder: Path) -> dict[Path, Path]:
    """The objects in `folder` that this build would make just so, by their source."""
    paths = {source: folder / name for source, name in carried_names(plan).items()}
    return {source: path for source, path in paths.items() if path.is_file()}


def carried_names(plan: Plan) -> dict[Path, str]:
    """What the object of each source is called among those that are carried."""
    sources = _digest(
        part
        for path in sorted(p for p in (plan.root / "csrc").rglob("*") if p.is_file())
        for part in (str(path.relative_to(plan.root)).encode(), path.read_bytes())
    )
    return {source: f"{source.name}-{_key(plan, source, sources)}.o" for source in plan.sources()}


def _key(plan: Plan, source: Path, sources: str) -> str:
    if source.suffix == ".cu":
        assert plan.cuda is not None
        flags = plan.cuda_flags()
        host = flags.index("-ccbin")
        made = [*flags[:host], *flags[host + 2 :], ".".join(plan.cuda.version.split(".")[:2])]
    else:
        made = plan.common_flags() + plan.flags_for(source)
        made = [flag for flag in made if not flag.startswith("-isystem")]
        if source.parent.name == "binding":
            made.append(str(sysconfig.get_config_var("EXT_SUFFIX")))
    made += [plan.cxx.target, sources, str(source.relative_to(plan.root))]
    return _digest(part.encode() for part in made)[:16]


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def make(folder: Path) -> list[Path]:
    """Compile the extension with CUDA as this Python would, and keep its objects alone in `folder`.

    Raises:
        BuildError: it cannot be compiled.
    """
    jobs = options.job_count(os.environ, options.core_count(), options.available_memory())
    flags = environment_flags(os.environ)
    work = ROOT / "build" / f"carried-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    output = work / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    plan = Plan(ROOT, output, find_cxx(os.environ), find_cuda(os.environ), [], *flags)
    compile_plan(plan, work, jobs)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = []
    for source, name in carried_names(plan).items():
        kept.append(Path(shutil.copy(work / object_of(plan, source), folder / name)))
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.carried", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="it is emptied first")
    folder = parser.parse_args().folder
    try:
        kept = make(folder)
    except BuildError as error:
        print(f"{error.output}\nnothing is carried, because {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in kept) / 2**20
    print(f"{len(kept)} objects, {size:.1f} MiB, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
