"""What a compiled CUDA kernel is: registers, spills, threads of a block, and the memory instructions.

Read from what `ptxas -v`, `cuobjdump -sass` and `cuobjdump -elf` print.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from build_tools.compilers import BuildError
from build_tools.sass import Instruction, innermost_loops, read_functions

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
    """Usage by mangled name, from what `ptxas -v` prints, or `cuobjdump -res-usage`, which knows no spills."""
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
        elif match := re.search(r"Function (\w+):", line):
            usage = found.setdefault(match[1], Usage())
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            usage.registers, usage.stack, usage.shared = map(int, match.groups())
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
