"""What the compiler made of the CUDA kernels: registers, spills, occupancy, and the widths of memory instructions.

Compiles what is in csrc/cuda as the build does, for each architecture, and reads the disassembly; no GPU is needed.
Exits with 1 where a kernel spills or has a stack frame, or where a kernel of the aligned path reads maps in its main
loop by less than 16 bytes a thread.

    python -m build_tools.cuda_report --out docs/kernels/cuda_report.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from build_tools.compilers import (
    NVCC_TMPDIR,
    BuildError,
    CudaCompiler,
    check_nvcc_runs_in,
    find_cuda,
    find_cxx,
    first_error,
    run,
)
from build_tools.cubin import MAP_KERNELS, Row, rows_of, text_of
from build_tools.ninja_file import SOURCES, Plan, link_sources, source_files

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ARCHITECTURES = ("80", "90", "100")

WARP = 32
REGISTERS = 65536  # of a multiprocessor
SHARED_OF_THE_SYSTEM = 1024  # bytes of every block


@dataclass(frozen=True)
class Multiprocessor:
    """Limits from the table of compute capabilities in the CUDA programming guide."""

    warps: int
    blocks: int
    shared: int  # bytes


KIB = 1024
MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * KIB),
    "86": Multiprocessor(48, 16, 100 * KIB),
    "89": Multiprocessor(48, 24, 100 * KIB),
    "90": Multiprocessor(64, 32, 228 * KIB),
    "100": Multiprocessor(64, 32, 228 * KIB),
    "120": Multiprocessor(48, 24, 100 * KIB),
}


def blocks_at_once(registers: int, threads: int, limits: Multiprocessor) -> int:
    """Blocks that the registers of a multiprocessor are enough for: a warp gets them in units of 256, in fours."""
    of_warp = max(-(-registers * WARP // 256) * 256, 256)
    warps = min(REGISTERS // of_warp // 4 * 4, limits.warps)
    return min(warps // -(-threads // WARP), limits.blocks)


def find_cuobjdump(nvcc: str) -> Path:
    """The toolkit's own, else the one that Triton brings.

    Raises:
        BuildError: there is none.
    """
    beside = Path(os.path.realpath(nvcc)).parent / "cuobjdump"
    on_path = shutil.which("cuobjdump")
    candidates = [beside, *([Path(on_path)] if on_path else []), *_tritons()]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise BuildError(
        "no cuobjdump was found beside nvcc, on the PATH or in an installed Triton; it comes with CUDA's binary "
        "utilities, and with `pip install triton`"
    )


def _tritons() -> list[Path]:
    import importlib.util

    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"]


def _output(command: Sequence[str], folder: Path) -> str:
    done = run(["env", f"TMPDIR={NVCC_TMPDIR}", *command], folder)
    if done.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed: {first_error(done.stdout)}", done.stdout)
    return done.stdout


def examine(
    cuda: CudaCompiler, architecture: str, sources: Sequence[Path], folder: Path
) -> list[Row]:
    """Compiles `sources` for one architecture, with the flags of the build, and reads what came out."""
    plan = Plan(ROOT, folder / "unused", find_cxx(os.environ), replace(cuda, architectures=[]))
    cuobjdump = str(find_cuobjdump(cuda.nvcc))
    check_nvcc_runs_in(folder)
    link_sources(ROOT, folder)
    flags = [*plan.cuda_flags(), f"-arch=sm_{architecture}", f"-I{SOURCES}", "-Xptxas", "-v"]
    rows = []
    for source in sources:
        cubin = f"{source.stem}_{architecture}.cubin"
        path = str(Path(SOURCES) / source.relative_to(ROOT / "csrc"))
        log = _output([cuda.nvcc, *flags, "-cubin", path, "-o", cubin], folder)
        rows += rows_of(
            log,
            _output([cuobjdump, "-sass", cubin], folder),
            _output([cuobjdump, "-elf", cubin], folder),
        )
    return rows


def examine_built(cuobjdump: Path, binary: Path, architecture: str) -> list[Row]:
    """Reads what is compiled already: all but the bytes of spills, which show as a stack frame."""

    def dumped(what: str) -> str:
        command = [str(cuobjdump), f"-arch=sm_{architecture}", what, str(binary)]
        return _output(command, binary.parent)

    return rows_of(*map(dumped, ("-res-usage", "-sass", "-elf")))


HEADINGS = (
    "kernel",
    "registers",
    "spills",
    "stack",
    "static shared",
    "threads",
    "blocks",
    "occupancy",
    "shared left",
    "loads in the main loop",
    "stores in it",
    "all loads",
    "all stores",
)

EXPLANATION = """\
Written by `python -m build_tools.cuda_report`; no GPU was involved. Bytes, but for the memory instructions, whose
widths are bits a thread. Blocks of one multiprocessor and occupancy are what registers and threads allow; `shared
left` is the dynamic shared memory that each of these blocks may then have before there can be fewer. The main loop is
the innermost loop that reads most bytes. Template arguments: the element type; for kernels that read maps the
elements of a vector (1: addresses or strides off 16 bytes), then whether vectors span heads (`fwd`, `bwd_gather`) or
the gradients of values are written in the same pass (`bwd_dots`); last the depth that the parameters have room for,
and of these kernels before it whether maps of small weights are left out. `layer_attend_fwd` has before these two
whether moments of the output are taken; `layer_norm_bwd` has whether sums are taken, and whether the gradient is
written; `position_*` have after the elements of a vector whether the channels of a position lie together, then whether
a value is kept from its score to the sum (`fwd`) or keys are given (`bwd`).
Where `bwd_dots` writes gradients of values, it reads one weight a map in its main loop beside the maps."""


def table(rows: Sequence[Row], architecture: str) -> str:
    """A table of Markdown."""
    limits = MULTIPROCESSORS[architecture]
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" + "|--:" * (len(HEADINGS) - 1) + "|"]
    for row in sorted(rows, key=lambda row: (row.kernel.name, row.kernel.arguments)):
        usage = row.usage
        blocks = left = occupancy = "-"
        if row.threads:
            count = blocks_at_once(usage.registers, row.threads, limits)
            warps = count * -(-row.threads // WARP)
            blocks, occupancy = str(count), f"{100 * warps / limits.warps:.1f} %"
            left = str(
                limits.shared // max(count, 1) // 128 * 128 - SHARED_OF_THE_SYSTEM - usage.shared
            )
        cells = [f"`{row.kernel}`", usage.registers, usage.spills, usage.stack, usage.shared]
        cells += [row.threads or "-", blocks, occupancy, left]
        cells += [text_of(x) for x in (row.loop_loads, row.loop_stores, row.loads, row.stores)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def report(by_architecture: Mapping[str, Sequence[Row]], version: str, day: str) -> str:
    """The whole report, in Markdown."""
    parts = ["# What nvcc makes of the CUDA kernels", EXPLANATION, f"nvcc {version}, {day}."]
    for architecture, rows in by_architecture.items():
        parts += [f"## sm_{architecture}", table(rows, architecture)]
    return "\n\n".join(parts) + "\n"


def problems_of(by_architecture: Mapping[str, Sequence[Row]]) -> list[str]:
    """Every problem, with its kernel and architecture; also where the kernels to look at are not there."""
    found = []
    for architecture, rows in by_architecture.items():
        for row in rows:
            found += [f"sm_{architecture} {row.kernel}: {text}" for text in row.problems()]
        aligned = {row.kernel.name for row in rows if row.kernel.is_aligned}
        found += [
            f"sm_{architecture}: no aligned instance of {name} was compiled"
            for name in MAP_KERNELS
            if name not in aligned
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.cuda_report", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="where to write the report; printed where left out"
    )
    parser.add_argument(
        "--arch", nargs="+", choices=list(MULTIPROCESSORS), default=list(DEFAULT_ARCHITECTURES)
    )
    options = parser.parse_args(arguments)
    found: dict[str, list[Row]] = {}
    try:
        cuda = find_cuda(os.environ)
        with tempfile.TemporaryDirectory() as folder:
            for architecture in options.arch:
                sources = source_files(ROOT, "csrc/cuda/**/*.cu")
                found[architecture] = examine(cuda, architecture, sources, Path(folder))
    except BuildError as error:
        print(f"{error}\n{error.output}".rstrip(), file=sys.stderr)
        return 1
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    text = report(found, cuda.version, day)
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    problems = problems_of(found)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
