"""The report on the CUDA kernels: what it reads from the tools' output, what it refuses, and a run."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from build_tools import cubin, cuda_report
from build_tools.compilers import BuildError, find_cuda
from build_tools.cubin import (
    Kernel,
    Row,
    Usage,
    kernel_of,
    main_loop,
    read_block_sizes,
    read_usage,
    rows_of,
    widths,
)
from build_tools.cuda_report import (
    DEFAULT_ARCHITECTURES,
    MULTIPROCESSORS,
    blocks_at_once,
    problems_of,
    report,
)
from build_tools.sass import innermost_loops, natural_loops, read_functions
from ela_kernels.backends.extension import build_info, extension

COMMITTED = cuda_report.ROOT / "docs" / "kernels" / "cuda_report.md"
FORWARD = "_ZN3ela4cuda26layer_attention_fwd_kernelIfLi4ELb0ELi32EEEvNS0_13ForwardParamsIXT2_EEE"

# What `ptxas -v`, `cuobjdump -sass` and `cuobjdump -elf` print, cut to what matters. The kernel is
#   for r < rows: { sum = 0; for i < n: sum += a float4 of x; y[r] = sum * w[r]; }
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_90'
ptxas info    : Function properties for {FORWARD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 12.316 ms
"""
SASS = f"""
\tcode for sm_90
\t\tFunction : {FORWARD}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0020*/                   ISETP.GE.AND P0, PT, R0, 0x1, PT ;          /* 0x000000010000780c */
                                                                               /* 0x004fda0003f06270 */
        /*0030*/              @!P0 EXIT ;                                      /* 0x000000000000894d */
        /*0090*/                   LDC R12, c[0x0][0x22c] ;
        /*0100*/                   LDG.E.CONSTANT R13, desc[UR6][R4.64] ;
        /*0120*/              @!P0 BRA 0x240 ;
        /*0150*/                   IMAD.MOV.U32 R0, RZ, RZ, RZ ;
        /*0170*/                   IADD3 R5, P0, R10, R8, RZ ;
        /*01b0*/                   LDG.E.128.CONSTANT R4, desc[UR6][R4.64] ;
        /*0220*/                   FADD R0, R7, R0 ;
        /*0230*/              @!P0 BRA 0x170 ;
        /*0240*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0280*/                   STG.E desc[UR6][R2.64], R13 ;
        /*0290*/              @!P0 BRA 0x90 ;
        /*02a0*/                   EXIT ;
        /*02b0*/                   BRA 0x2b0;
        /*02c0*/                   NOP;
\t\t..........
"""
ELF = f"""
.nv.info.{FORWARD}
\t<0x10>
\tAttribute:\tEIATTR_EXIT_INSTR_OFFSETS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x30 0x2a0\x20
\t<0x11>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1\x20
.nv.info.another
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
"""


def addresses(loop):
    return [instruction.address for instruction in loop]


def test_names():
    assert kernel_of(FORWARD) == Kernel("layer_attention_fwd", ("float", "4", "false", "32"))
    assert str(kernel_of(FORWARD)) == "layer_attention_fwd<float, 4, false, 32>"
    half = "_ZN3ela4cuda26layer_attention_fwd_kernelI6__halfLi8ELb1ELi256EEEvNS0_13ForwardParamsIXT2_EEE"
    assert kernel_of(half).arguments == ("half", "8", "true", "256")
    tail = "_ZN3ela4cuda31layer_attention_bwd_tail_kernelI13__nv_bfloat16Li32EEEvNS0_10TailParamsIXT0_EEE"
    assert str(kernel_of(tail)) == "layer_attention_bwd_tail<bfloat16, 32>"
    hidden = "_ZN3ela4cuda48_GLOBAL__N__c18e51e4_15_device_query_cu_08c3822a16increment_kernelEiPi"
    assert str(kernel_of(hidden)) == "increment"
    assert str(kernel_of("_Z10sum_kernelPKfPf")) == "sum"
    assert kernel_of(FORWARD).is_aligned
    assert not kernel_of(FORWARD.replace("Li4E", "Li1E")).is_aligned
    assert not kernel_of(tail).is_aligned


def test_usage():
    assert read_usage(LOG) == {FORWARD: Usage(registers=80, stack=0, spills=0, shared=512)}
    spilling = LOG.replace(
        "0 bytes stack frame, 0 bytes spill stores, 0",
        "48 bytes stack frame, 16 bytes spill stores, 20",
    )
    assert read_usage(spilling)[FORWARD] == Usage(registers=80, stack=48, spills=36, shared=512)


def test_usage_of_what_is_built():
    built = f" Function {FORWARD}:\n  REG:80 STACK:16 SHARED:512 LOCAL:0 CONSTANT[0]:1968 TEXTURE:0"
    assert read_usage(f"Resource usage:\n Common:\n  GLOBAL:0\n{built}") == {
        FORWARD: Usage(registers=80, stack=16, spills=0, shared=512)
    }


def test_block_sizes():
    assert read_block_sizes(ELF) == {FORWARD: 256}


def test_loops():
    instructions = read_functions(SASS)[FORWARD]
    assert len(instructions) == 16
    assert instructions[1] == (0x30, "@!P0", "EXIT", "")
    inner = [0x170, 0x1B0, 0x220, 0x230]
    outer = [0x90, 0x100, 0x120, 0x150, *inner, 0x240, 0x280, 0x290]
    loops = [
        addresses(instructions[i] for i in sorted(loop)) for loop in natural_loops(instructions)
    ]
    assert sorted(loops) == sorted([outer, inner])
    # What follows the last exit cannot be reached, and is no loop.
    assert [addresses(loop) for loop in innermost_loops(instructions)] == [inner]
    assert addresses(main_loop(instructions)) == inner


def test_a_part_of_a_loop_that_lies_elsewhere_belongs_to_it():
    text = f"""
\t\tFunction : {FORWARD}
        /*0000*/                   MOV R0, RZ ;
        /*0010*/               @P1 BRA 0x50 ;
        /*0020*/                   LDG.E.128 R4, desc[UR6][R4.64] ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
        /*0050*/                   LDG.E R4, desc[UR6][R4.64] ;
        /*0060*/                   BRA 0x20 ;
"""
    instructions = read_functions(text)[FORWARD]
    assert addresses(main_loop(instructions)) == [0x10, 0x20, 0x30, 0x50, 0x60]
    assert widths(main_loop(instructions), ["LDG"]) == {128: 1, 32: 1}


def test_a_loop_that_is_left_by_a_call_under_a_condition():
    """Else the outer loop would not hold the inner one, and would itself be an innermost one."""
    text = f"""
\t\tFunction : {FORWARD}
        /*0000*/                   MOV R0, RZ ;
        /*0010*/                   LDG.E R4, desc[UR6][R4.64] ;
        /*0020*/                   LDG.E.128 R4, desc[UR6][R4.64] ;
        /*0030*/              @!P0 CALL.REL.NOINC 0x50 ;
        /*0040*/                   BRA 0x20 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   EXIT ;
"""
    instructions = read_functions(text)[FORWARD]
    assert len(natural_loops(instructions)) == 2
    assert [addresses(loop) for loop in innermost_loops(instructions)] == [[0x20, 0x30, 0x40]]


def test_no_loop():
    assert natural_loops([]) == []
    assert main_loop(read_functions(SASS.replace("@!P0 BRA", "@!P0 EXIT"))[FORWARD]) == ()


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.CONSTANT", 32),
        ("LDG.E.U16.CONSTANT", 16),
        ("LDG.E.S8", 8),
        ("LDG.E.64", 64),
        ("LDG.E.EF.128.CONSTANT", 128),
        ("LDG.E.ENL2.256", 256),
        ("LDGSTS.E.BYPASS.128", 128),
    ],
)
def test_widths(opcode, bits):
    assert cubin.width(opcode) == bits


@pytest.mark.parametrize(
    ("registers", "threads", "architecture", "blocks"),
    [
        (32, 256, "90", 8),  # 64 warps: all that there can be
        (33, 256, "90", 6),  # 40 registers a thread: 51 warps, 48 in fours
        (80, 256, "90", 3),
        (96, 256, "80", 2),
        (128, 128, "80", 4),
        (255, 256, "90", 1),
        (32, 256, "86", 6),  # 48 warps
        (16, 32, "86", 16),  # 16 blocks
        (255, 1024, "90", 0),
    ],
)
def test_occupancy(registers, threads, architecture, blocks):
    assert blocks_at_once(registers, threads, MULTIPROCESSORS[architecture]) == blocks


def row_of(log: str = LOG, sass: str = SASS) -> Row:
    (row,) = rows_of(log, sass, ELF)
    return row


def test_a_kernel_as_it_should_be():
    row = row_of()
    assert row.problems() == []
    assert row.threads == 256
    assert (row.loop_loads, row.loop_stores) == ({128: 1}, {})
    assert (row.loads, row.stores) == ({128: 1, 32: 1}, {32: 1})


def test_problems():
    spilling = LOG.replace(
        "0 bytes stack frame, 0 bytes spill stores", "8 bytes stack frame, 4 bytes spill stores"
    )
    assert row_of(log=spilling).problems() == ["spills 4 bytes", "has a stack frame of 8 bytes"]
    narrow = SASS.replace("LDG.E.128", "LDG.E.64")
    assert row_of(sass=narrow).problems() == ["has no 128-bit load in its main loop"]
    both = SASS.replace("FADD R0, R7, R0", "LDG.E R0, desc[UR6][R7.64]")
    assert row_of(sass=both).problems() == [
        "reads less than 128 bits in its main loop: 1 x 128, 1 x 32"
    ]
    short = row_of()
    short.kernel = Kernel("layer_attention_fwd", ("half", "4", "false", "32"))
    assert short.problems() == ["has vectors of 4 x half, which are not 16 bytes"]
    # Kernels for single elements may read what they like, but not spill.
    single = FORWARD.replace("Li4E", "Li1E")
    (row,) = rows_of(LOG.replace(FORWARD, single), narrow.replace(FORWARD, single), ELF)
    assert row.problems() == []


def test_the_push_form_may_read_a_weight_for_each_map():
    push = Kernel("layer_attention_bwd_dots", ("float", "4", "true", "32"))
    pull = Kernel("layer_attention_bwd_dots", ("float", "4", "false", "32"))
    loads = Counter({128: 12, 32: 2})
    assert Row(push, Usage(), 256, loads).problems() == []
    assert len(Row(pull, Usage(), 256, loads).problems()) == 1
    assert len(Row(push, Usage(), 256, Counter({128: 12, 32: 4})).problems()) == 1


def test_a_kernel_that_is_not_there_is_a_problem():
    problems = problems_of({"90": [row_of()]})
    assert len(cubin.MAP_KERNELS) > 1
    assert problems == [
        f"sm_90: no aligned instance of {name} was compiled"
        for name in cubin.MAP_KERNELS
        if name != "layer_attention_fwd"
    ]
    with pytest.raises(BuildError, match="no function"):
        rows_of(LOG, SASS.replace(FORWARD, "other"), ELF)


def test_the_text():
    text = report({"90": [row_of()]}, "13.0", "2026-01-01")
    assert "nvcc 13.0, 2026-01-01." in text
    assert "## sm_90" in text
    # 80 registers: 24 of 64 warps; 228 KiB for three blocks, each with 1 KiB for the system and 512 bytes of its own.
    assert (
        "| `layer_attention_fwd<float, 4, false, 32>` | 80 | 0 | 0 | 512 | 256 | 3 | 37.5 % | 76288 "
        "| 1 x 128 | - | 1 x 128, 1 x 32 | 1 x 32 |" in text
    )


def test_the_kernels_that_are_built():
    """What the build left is read; compiled for the report they are below, which takes two minutes."""
    if "9.0" not in {
        name.removesuffix("+PTX") for name in build_info().get("cuda_architectures", ())
    }:
        pytest.skip("the extension was built without CUDA kernels of compute capability 9.0")
    try:
        cuobjdump = cuda_report.find_cuobjdump(find_cuda(os.environ).nvcc)
    except BuildError as error:
        pytest.skip(str(error))
    rows = cuda_report.examine_built(cuobjdump, Path(extension().__file__), "90")
    assert problems_of({"90": rows}) == []
    assert {str(row.kernel) for row in rows} == kernels_in(of_architecture("90")), (
        "run `make cuda-report`: the kernels are others by now"
    )


@pytest.mark.exhaustive
def test_the_kernels_of_the_package(tmp_path, capsys):
    try:
        cuda = find_cuda(os.environ)
        cuda_report.find_cuobjdump(cuda.nvcc)
    except BuildError as error:
        pytest.skip(str(error))
    out = tmp_path / "folder" / "report.md"
    code = cuda_report.main(["--arch", "90", "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    text = out.read_text()
    for name in cubin.MAP_KERNELS:
        for element, vector in (("float", 4), ("bfloat16", 8), ("half", 8)):
            assert re.search(rf"\| `{name}<{element}, {vector}[,>]", text), (name, element)
    for architecture in DEFAULT_ARCHITECTURES:
        assert kernels_in(of_architecture(architecture)) == kernels_in(text), (
            "run `make cuda-report`: the kernels are others by now"
        )


def test_the_committed_report_explains_itself():
    assert cuda_report.EXPLANATION in COMMITTED.read_text()


def of_architecture(architecture: str) -> str:
    """The part of the committed report."""
    return COMMITTED.read_text().partition(f"## sm_{architecture}\n")[2].partition("\n## ")[0]


def kernels_in(text: str) -> set[str]:
    return set(re.findall(r"^\| `(.+?)`", text, flags=re.MULTILINE))
