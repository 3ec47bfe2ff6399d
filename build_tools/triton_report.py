"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compilers made of them.

`python -m build_tools.triton_report --out docs/kernels/triton_report.md` writes the table. The launches are recorded
from real calls of the package, so what is compiled is what a stage of that shape would compile.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from build_tools.triton_launches import Case, Launch, launches_of, launches_of_mix

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


# Options that name a form of a kernel in the table.
_VARIANTS = (
    "PUSH",
    "HAS_RESIDUAL",
    "STATISTICS",
    "SUMS",
    "WRITES",
    "HAS_GATES",
    "HAS_ALSO",
    "HAS_WEIGHTS",
    "LEAVES_OUT",
    "HAS_KEYS",
    "HAS_QUERY",
    "HAS_PREV",
)


class Compiled(NamedTuple):
    """What a compiler made of one kernel."""

    kernel: str
    case: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: str
    seconds: float


CASES = (
    *(
        Case(8, 256, 56, 16, depth, dtype, interleaved)
        for depth in (4, 32)
        for dtype in (torch.float32, torch.bfloat16)
        for interleaved in (False, True)
    ),
    *(Case(32, 64, 8, 1, 8, torch.float32, interleaved) for interleaved in (False, True)),
    *(Case(8, 512, 14, 512, 8, torch.float32, interleaved) for interleaved in (False, True)),
    Case(8, 256, 14, 16, 128, torch.float32, False),
    Case(32, 256, 7, 8, 32, torch.bfloat16, False),
    Case(32, 256, 7, 1, 32, torch.bfloat16, False),
    Case(32, 256, 7, 4, 64, torch.bfloat16, False),
    Case(32, 37, 7, 37, 32, torch.bfloat16, True),
    Case(2, 4, 1, 4, 2, torch.float32, False),  # strides of one are constants
)


def _signature(launch: Launch) -> tuple[dict[str, Any], dict[str, Any], dict[Any, Any]]:
    """Types, constants and attributes as Triton's own launcher derives them from the arguments."""
    names = launch.kernel.arg_names
    unspecialized = {
        names.index(name) if isinstance(name, str) else name
        for name in launch.kernel.do_not_specialize or ()
    }
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(x, (*path, i)) for i, x in enumerate(value))
        if isinstance(value, torch.Tensor):
            if value.data_ptr() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            names = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64"}
            return names[str(value.dtype).removeprefix("torch.")]
        if isinstance(value, float):
            return "fp32"
        if path[0] not in unspecialized:
            if value == 1:
                constants[path] = 1
                return "constexpr"
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
        return "i64" if abs(value) >= 2**31 else "i32"

    for i, value in enumerate(launch.args):
        types[names[i]] = type_of(value, (i,))
    for name, value in launch.options.items():
        if name in names:
            types[name] = "constexpr"
            constants[(names.index(name),)] = value
    return types, constants, attributes


def compile_launch(launch: Launch, case: str, target: str) -> Compiled:
    """Compile one launch for `sm_90` and the like, or an AMD `gfx` target.

    Raises:
        Exception: whatever Triton raises where it cannot compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = _signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    start = time.perf_counter()
    options = {"num_warps": launch.options["num_warps"]}
    compiled = triton.compile(source, target=gpu, options=options)
    seconds = time.perf_counter() - start
    shared = int(compiled.metadata.shared)
    name = launch.kernel.fn.__name__
    if gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (_amd_number(text, key) for key in ("vgpr_count", "vgpr_spill_count"))
        found = re.findall(r"(?:global|buffer)_load_(?:dwordx?(\d?)|[us]?short|d16)", text)
        loads = _counted([32 * int(n or 1) for n in found])
        return Compiled(name, case, target, registers, 4 * spilled, shared, loads, seconds)
    registers, spilled = _cuda_resources(compiled.asm["cubin"])
    return Compiled(
        name, case, target, registers, spilled, shared, _loads(compiled.asm["ptx"]), seconds
    )


def _amd_number(text: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s*(\d+)", text)
    return int(found[1]) if found else 0


def _loads(ptx: str) -> str:
    """How many global loads there are of each width, the widest first: `8 x 128, 3 x 32`."""
    found = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return _counted([int(vector or 1) * int(bits) for vector, bits in found])


def _counted(widths: list[int]) -> str:
    counts = sorted(Counter(widths).items(), reverse=True)
    return ", ".join(f"{count} x {width}" for width, count in counts)


def cuobjdump() -> str:
    """The machine's own disassembler, or the one that comes with Triton.

    Raises:
        FileNotFoundError: there is neither.
    """
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not bundled.exists():
            raise FileNotFoundError("no cuobjdump: neither on the PATH nor in the triton package")
        found = str(bundled)
    return found


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory, which is where registers are spilled to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(cubin)
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", "kernel.cubin"],
            cwd=folder,  # it cannot read every name of a folder
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump --dump-resource-usage printed no resources: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def compile_cases(cases: tuple[Case, ...], targets: tuple[str, ...]) -> list[Compiled]:
    """Each distinct kernel of the cases for each target."""
    found = []
    for case in cases:
        seen = set()
        for launch in (*launches_of(case), *launches_of_mix(case)):
            types, constants, attributes = _signature(launch)
            key = (launch.kernel.fn.__name__, str((types, constants, attributes)))
            if key in seen:
                continue
            seen.add(key)
            variant = "".join("+" + flag.lower() for flag in _VARIANTS if launch.options.get(flag))
            for target in targets:
                result = compile_launch(launch, str(case), target)
                found.append(result._replace(kernel=result.kernel + variant))
                print(*result, flush=True)
    return found


def markdown(rows: list[Compiled], triton_version: str) -> str:
    """The table, with the compiler that made it."""
    lines = [
        "# What Triton's compiler makes of the kernels",
        "",
        f"Triton {triton_version}, compiled ahead of time, no GPU; written by `python -m build_tools.triton_report`.",
        "Registers are those of a thread, spills bytes of a thread's stack and local memory, loads the global loads in",
        "the code by their width in bits: those of maps are 128 wide where rows lie on 16 bytes, those of keys and",
        "weights narrower. The last calls have rows that do not.",
        "",
        "| kernel | call | target | registers | spilled | shared memory | loads | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.kernel}` | {r.case} | {r.target} | {r.registers} | {r.spilled_bytes} | {r.shared_bytes} | "
        f"{r.loads} | {r.seconds:.1f} s |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    parser.add_argument("--targets", nargs="+", default=list(DEFAULT_TARGETS))
    parser.add_argument("--quick", action="store_true", help="the first two calls only")
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of the calls only")
    options = parser.parse_args()
    import triton

    print(f"Triton {triton.__version__}", flush=True)
    cases = CASES[: 2 if options.quick else options.cases]
    rows = compile_cases(cases, tuple(options.targets))
    spilling = [r for r in rows if r.spilled_bytes]
    for r in spilling:
        print(
            f"Triton {triton.__version__} spills: {r.kernel} {r.case} {r.target}: {r.spilled_bytes} bytes",
            file=sys.stderr,
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(markdown(rows, triton.__version__))
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
