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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

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


_TOLERANCE = 2.0**-24  # kernels are the same for every one above zero


class Launch(NamedTuple):
    """One kernel with the arguments of one call."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class Case(NamedTuple):
    """A call to be compiled: maps `[batch, channels, size, size]`."""

    batch: int
    channels: int
    size: int
    head_dim: int
    depth: int
    dtype: torch.dtype
    interleaved: bool

    def __str__(self) -> str:
        form = "interleaved" if self.interleaved else "planar"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = [self.batch, self.channels, self.size, self.size]
        return f"T={self.depth} {shape} D={self.head_dim} {dtype} {form}"


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


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records the launches of the package's Triton backend instead of making them."""
    from ela_kernels.backends.triton import (
        attention,
        attention_backward,
        light,
        mix,
        norm,
        position,
        producer,
    )

    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: found.append(Launch(self.kernel, args, options))

    kernels = [
        (module, name, kernel)
        for module in (attention, attention_backward, light, mix, norm, position, producer)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel))
        yield found
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def launches_of(case: Case) -> list[Launch]:
    """Every launch of a layer of this depth: forward, weights, both forms of the backward, whole layer and block.

    And those of a tolerance, and of a light layer, whose shape has no depth.
    """
    from ela_kernels.backends.triton.backend import TritonBackend
    from ela_kernels.backends.types import Saved

    shape = (case.batch, case.channels, case.size, case.size)
    form = torch.channels_last if case.interleaved else torch.contiguous_format
    value = torch.empty(shape, dtype=case.dtype).contiguous(memory_format=form)
    q = torch.empty(shape[:2], dtype=case.dtype)
    heads, scale, T = case.channels // case.head_dim, case.head_dim**-0.5, case.depth
    keys, values = [q] * T, [value] * T
    weights = torch.empty(case.batch, heads, T)
    kl = torch.empty(case.batch, heads)
    saved = Saved(q, keys, values, heads, scale, weights, weights, False)
    kernels = TritonBackend()
    with recorded() as found:
        kernels.attend(q, keys, values, heads, scale, weights, False)
        kernels.weights(q, keys, heads, scale, weights)
        kernels.attend_backward(saved, value, weights, kl, True, True)
        every = [True] * T
        kernels.attend_backward(saved, value, weights, kl, True, True, every, every)
        left = kernels.contribution(q, weights, weights, value, False)
        kernels.gather([left] * T, 0, heads, False, True, True)
        _call_layer(kernels, saved, [left] * (T - 1))
        _call_leaving_out(kernels, saved, value)
        _call_light_layer(kernels, value, q, heads, scale)
        call_position(kernels, value)
    return found


def launches_of_mix(case: Case) -> list[Launch]:
    """Those of a sum by given weights, of the gradients of weights and values, and of the weights alone."""
    from ela_kernels.backends.triton.backend import TritonBackend

    shape = (case.batch, case.channels, case.size, case.size)
    form = torch.channels_last if case.interleaved else torch.contiguous_format
    value = torch.empty(shape, dtype=case.dtype).contiguous(memory_format=form)
    weights = torch.empty(case.batch, case.channels // case.head_dim, case.depth)
    values, kernels = [value] * case.depth, TritonBackend()
    with recorded() as found:
        kernels.mix(weights, values, False)
        for need_values in (True, False):
            every = [need_values] * case.depth
            kernels.mix_backward(weights, values, value, False, True, every)
    return found


def call_position(kernels: Any, value: torch.Tensor) -> None:
    """Attention over depth at every position, which is compiled for no depth: with what is given least and most."""
    from ela_kernels.backends.position import PositionCall, PositionLeft, PositionNeeds

    row, values = torch.empty(value.shape[1]), [value] * 2
    planes = torch.empty(value.shape[0], 2, *value.shape[2:])
    for query, keys in ((None, None), (value, values)):
        prev = None if keys is None else planes
        call = PositionCall(row, query, values, keys, True, 1e-6, prev, False)
        kernels.position_attend(call)
        every = [True] * 2
        needs = PositionNeeds(
            True, query is not None, prev is not None, every, every if keys else ()
        )
        dkl = None if prev is None else planes[:, 0]
        kernels.position_attend_backward(call, planes, value, prev, dkl, needs)
        left = PositionLeft(row, query, planes, torch.empty(3, *planes.shape), value, 0)
        kernels.position_gather(value, [left] * 2, 0, False)


def _call_layer(kernels: Any, saved: Any, left: list[Any]) -> None:
    """A whole layer as the last of a stage, and a whole block, each forward and backward."""
    from ela_kernels.backends.types import (
        RESIDUAL,
        Arrived,
        Filters,
        LayerNeeds,
        NormAct,
        SavedLayer,
    )

    x, q, heads, weights = saved.values[-1], saved.q, saved.heads, saved.weights
    channels, dtype = q.shape[1], q.dtype
    row = torch.empty(1, 1, 5, dtype=dtype)
    filters = Filters(row, row, torch.empty(channels, 1, 3, 3, dtype=dtype))
    before = saved.keys[:-1], saved.values[:-1], heads, saved.scale, weights
    for tolerance in (0.0, _TOLERANCE):
        kernels.retrieve(x, filters, *before, True, False, tolerance)
        kernels.retrieve(x, filters, *before, False, True, tolerance)
    of_layer = SavedLayer(x, filters, q, heads, saved, RESIDUAL, None, None)
    arrived = Arrived(x, None, None, None, None)
    index, every = len(saved.keys) - 1, LayerNeeds(*(True,) * 5)
    kernels.layer_backward(of_layer, arrived, left, index, every)
    gamma, statistics = torch.empty(channels, dtype=dtype), torch.empty(2, channels)
    mask = torch.empty(len(x), dtype=dtype)
    for given in (None, statistics):
        norm = NormAct(gamma, gamma, given, mask, 1e-5, True)
        kernels.norm_forward(x, x, statistics, norm)
        kernels.norm_backward(x, x, statistics, norm)


def _call_leaving_out(kernels: Any, saved: Any, dout: Any) -> None:
    """What a tolerance above zero changes outside of a whole layer."""
    q, keys, values, heads, scale, _, weights, channels_last, _ = saved
    kernels.attend(q, keys, values, heads, scale, weights, channels_last, _TOLERANCE)
    saved = saved._replace(tolerance=_TOLERANCE)
    for every in ([], [True] * len(values)):
        kernels.attend_backward(saved, dout, weights, None, True, False, every, every)
    left = kernels.contribution(q, weights, weights, dout, channels_last, _TOLERANCE)
    kernels.gather([left] * len(values), 0, heads, channels_last, True, True)


def _call_light_layer(kernels: Any, x: Any, q: Any, heads: int, scale: float) -> None:
    """A light layer alone and in a block, forward and backward."""
    from ela_kernels.backends.triton import light
    from ela_kernels.backends.types import LightFilters, LightNeeds, NormAct, SavedLightLayer
    from ela_kernels.ops.checks import VALUE_ACTS

    channels, dtype = q.shape[1], q.dtype
    row, decay = torch.empty(1, 1, 5, dtype=dtype), torch.empty(channels, 1, 1, dtype=dtype)
    filters = LightFilters(row, row, torch.empty(channels, 1, 3, 3, dtype=dtype), decay)
    gates = torch.empty(len(x), heads)
    for act in VALUE_ACTS:
        for norm in (None, NormAct(None, None, None, None, 1e-5, True)):
            light.light_layer(x, filters, x, heads, scale, norm, act)
        saved = SavedLightLayer(
            x, filters, x, heads, scale, act, None, q, q, q, x, gates, None, None
        )
        light.light_layer_backward(saved, x, x, LightNeeds(*(True,) * 6))
    gamma, mask = torch.empty(channels, dtype=dtype), torch.empty(len(x), dtype=dtype)
    norm = NormAct(gamma, gamma, None, mask, 1e-5, True)
    kernels.norm_backward(x, x, torch.empty(2, channels), norm, x)


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
