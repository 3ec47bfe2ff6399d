"""What the compiler made of the CUDA kernels: registers, spills, occupancy, and the widths of memory instructions.

Compiles csrc/cuda/*.cu as the build does, for each architecture, and reads the disassembly; no GPU is needed. Exits
with 1 where a kernel spills or has a stack frame, or where a kernel of the aligned path reads maps in its main loop
by less than 16 bytes a thread.

    python -m build_tools.cuda_report --out docs/kernels/cuda_report.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from build_tools.compilers import BuildError, CudaCompiler, find_cuda, find_cxx, first_error, run
from build_tools.ninja_file import Plan, source_files
from build_tools.sass import Instruction, innermost_loops, read_functions

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

MAP_KERNELS = (
    "layer_attention_fwd",
    "layer_attention_bwd_dots",
    "layer_attention_bwd_gather",
    "layer_attend_fwd",
    "layer_norm_fwd",
    "layer_norm_bwd",
    "layer_producer_fwd",
    "layer_producer_bwd",
)
"""Kernels that read maps; their second template argument is the number of elements in a vector."""

ELEMENT_BYTES = {"float": 4, "bfloat16": 2, "half": 2}


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel, by its template arguments."""

    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        arguments = f"<{', '.join(self.arguments)}>" if self.arguments else ""
        return self.name + arguments

    @property
    def is_aligned(self) -> bool:
        """It reads maps in vectors of 16 bytes."""
        return self.name in MAP_KERNELS and self.arguments[1] != "1"

    @property
    def narrow_loads_allowed(self) -> bool:
        """The push form multiplies by a weight of each map, read in the main loop, in the same pass."""
        return self.name == "layer_attention_bwd_dots" and self.arguments[2] == "true"


def kernel_of(symbol: str) -> Kernel:
    """The kernel that a mangled name stands for: the last of its nested names, and that one's template arguments."""
    name, rest = symbol, re.sub(r"^_ZN?", "", symbol)
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        name, rest = rest[match.end() : end], rest[end:]
    arguments = []
    if rest.startswith("I"):
        for integer, boolean, type_name in re.findall(
            r"Li(\d+)E|Lb([01])E|(f|13__nv_bfloat16|6__half)", rest[1 : rest.find("EEE") + 1]
        ):
            names = {"f": "float", "13__nv_bfloat16": "bfloat16", "6__half": "half"}
            truth = "true" if boolean == "1" else "false"
            arguments.append(names.get(type_name) or integer or truth)
    return Kernel(name.removesuffix("_kernel"), tuple(arguments))


@dataclass
class Usage:
    """What ptxas says of one kernel."""

    registers: int = 0
    stack: int = 0
    spills: int = 0  # bytes, stores and loads
    shared: int = 0  # static


def read_usage(log: str) -> dict[str, Usage]:
    """Usage by mangled name, from what `ptxas -v` prints."""
    found: dict[str, Usage] = {}
    usage = Usage()
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            usage = found.setdefault(match[1], Usage())
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            usage.stack += int(match[1])
            usage.spills += int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            usage.registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                usage.shared = int(shared[1])
    return found


def read_block_sizes(elf: str) -> dict[str, int]:
    """Threads of a block by mangled name: the kernels' `__launch_bounds__`, as the binary holds them."""
    found = {}
    for section in re.split(r"^(?=\.nv\.info\.)", elf, flags=re.MULTILINE):
        name = re.match(r"\.nv\.info\.(\w+)", section)
        threads = re.search(
            r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", section
        )
        if name and threads:
            found[name[1]] = int(threads[1], 16) * int(threads[2], 16) * int(threads[3], 16)
    return found


def blocks_at_once(registers: int, threads: int, limits: Multiprocessor) -> int:
    """Blocks that the registers of a multiprocessor are enough for: a warp gets them in units of 256, in fours."""
    of_warp = max(-(-registers * WARP // 256) * 256, 256)
    warps = min(REGISTERS // of_warp // 4 * 4, limits.warps)
    return min(warps // -(-threads // WARP), limits.blocks)


GLOBAL_LOADS = ("LDG", "LD", "LDGSTS")
GLOBAL_STORES = ("STG", "ST")


def width(opcode: str) -> int:
    """Bits that a memory instruction moves for each thread."""
    parts = opcode.split(".")
    for bits in (256, 128, 64):
        if str(bits) in parts:
            return bits
    narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
    return next((narrow[part] for part in parts if part in narrow), 32)


def widths(instructions: Sequence[Instruction], opcodes: Sequence[str]) -> Counter[int]:
    """How many memory instructions there are of each width."""
    return Counter(width(i.opcode) for i in instructions if i.opcode.split(".")[0] in opcodes)


def text_of(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{counts[bits]} x {bits}" for bits in sorted(counts, reverse=True)) or "-"


def main_loop(instructions: Sequence[Instruction]) -> Sequence[Instruction]:
    """The innermost loop that reads most bytes; empty where none reads."""

    def bits(loop: Sequence[Instruction]) -> int:
        return sum(bits * count for bits, count in widths(loop, GLOBAL_LOADS).items())

    return max((loop for loop in innermost_loops(instructions) if bits(loop)), key=bits, default=())


@dataclass
class Row:
    """One kernel on one architecture."""

    kernel: Kernel
    usage: Usage
    threads: int
    loop_loads: Counter[int] = field(default_factory=Counter)
    loop_stores: Counter[int] = field(default_factory=Counter)
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)

    def problems(self) -> list[str]:
        """What must not be, one sentence each."""
        found = []
        if self.usage.spills:
            found.append(f"spills {self.usage.spills} bytes")
        if self.usage.stack:
            found.append(f"has a stack frame of {self.usage.stack} bytes")
        if not self.kernel.is_aligned:
            return found
        elements, name = int(self.kernel.arguments[1]), self.kernel.arguments[0]
        if elements * ELEMENT_BYTES.get(name, 0) != 16:
            found.append(f"has vectors of {elements} x {name}, which are not 16 bytes")
        wide = sum(count for bits, count in self.loop_loads.items() if bits >= 128)
        narrow = self.loop_loads.total() - wide
        if not wide:
            found.append("has no 128-bit load in its main loop")
        # One weight for the four vectors or more that a thread reads of a map.
        elif narrow and not (self.kernel.narrow_loads_allowed and 4 * narrow <= wide):
            found.append(f"reads less than 128 bits in its main loop: {text_of(self.loop_loads)}")
        return found


def rows_of(log: str, sass: str, elf: str) -> list[Row]:
    """One row for each kernel, from what ptxas, the disassembler and the dump of the binary print."""
    functions, threads = read_functions(sass), read_block_sizes(elf)
    rows = []
    for symbol, usage in read_usage(log).items():
        if symbol not in functions:
            raise BuildError(f"the disassembly has no function {symbol}")
        instructions = functions[symbol]
        loop = main_loop(instructions)
        rows.append(
            Row(
                kernel_of(symbol),
                usage,
                threads.get(symbol, 0),
                widths(loop, GLOBAL_LOADS),
                widths(loop, GLOBAL_STORES),
                widths(instructions, GLOBAL_LOADS),
                widths(instructions, GLOBAL_STORES),
            )
        )
    return rows


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


def _output(command: Sequence[str]) -> str:
    done = run(command)
    if done.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed: {first_error(done.stdout)}", done.stdout)
    return done.stdout


def examine(
    cuda: CudaCompiler, architecture: str, sources: Sequence[Path], folder: Path
) -> list[Row]:
    """Compiles `sources` for one architecture, with the flags of the build, and reads what came out."""
    plan = Plan(ROOT, folder / "unused", find_cxx(os.environ), replace(cuda, architectures=[]))
    cuobjdump = str(find_cuobjdump(cuda.nvcc))
    rows = []
    for source in sources:
        cubin = folder / f"{source.stem}_{architecture}.cubin"
        flags = [*plan.cuda_flags(), f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}"]
        log = _output([cuda.nvcc, *flags, "-Xptxas", "-v", "-cubin", str(source), "-o", str(cubin)])
        rows += rows_of(
            log, _output([cuobjdump, "-sass", str(cubin)]), _output([cuobjdump, "-elf", str(cubin)])
        )
    return rows


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
the gradients of values are written in the same pass (`bwd_dots`); last the depth that the parameters have room for.
`layer_attend_fwd` has before the depth whether moments of the output are taken; `layer_norm_bwd` has whether sums are
taken, and whether the gradient is written.
`bwd_dots` with `true` reads one weight a map in its main loop beside the maps."""


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
                sources = source_files(ROOT, "csrc/cuda/*.cu")
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
