"""Ahead-of-time compilation, without a GPU: in a process of its own, where kernels are not interpreted."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import triton_launches
from build_tools.triton_report import Compiled, _amd_number, _loads, markdown

ROOT = Path(__file__).resolve().parents[2]


def compile_report(*arguments: str, timeout: int) -> str:
    return run_apart("-m", "build_tools.triton_report", *arguments, timeout=timeout)


def run_apart(*arguments: str, timeout: int) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # 1 where a kernel spills
    return done.stdout


def test_kernels_compile_for_hopper_without_spills():
    lines = compile_report("--quick", "--targets", "sm_90", timeout=300).splitlines()
    assert lines[0] == f"Triton {importlib.metadata.version('triton')}"
    forms = [line for line in lines if "layer_attention_fwd_kernel" in line]
    # Planar and interleaved: alone, with a residual, with statistics, each also leaving out small weights; and by given
    # weights.
    assert len(forms) == 12 + 2
    # Four vectors of a map: four maps in groups, or the two and three of a light layer.
    fewest = {
        "attention_fwd_": 16,
        "_dots_": 16,
        "attention_bwd_gather_": 16,
        "light_layer_fwd_": 8,
        "light_layer_bwd_kernel": 12,
        # Every position beside all of its channels: 16 elements of each map, a map or two at a time.
        "position_fwd_": 2,
        "position_bwd_sums_": 4,
        "position_bwd_maps_": 4,
        "position_gather_": 4,
    }
    for line in lines:
        found = re.search(r"(\d+) x 128", line)
        maps = 0 if found is None else int(found[1])
        assert all(maps >= n for name, n in fewest.items() if name in line), f"narrow loads: {line}"
    assert all(any(name in line for line in lines) for name in fewest)


LEAVING_OUT = """
import re
import torch
from build_tools.triton_launches import Case, launches_of
from build_tools.triton_report import compile_launch

for head_dim in (16, 4):  # 16 bytes are of one head, and of two
    for launch in launches_of(Case(8, 256, 56, head_dim, 4, torch.bfloat16, True)):
        name = launch.kernel.fn.__name__
        if re.search("attention_(fwd|bwd_dots|bwd_gather)_", name):
            options = {k: v for k, v in launch.options.items() if k not in ("LEAVES_OUT", "FOLD")}
            compiled = compile_launch(launch, "", "sm_90")
            wide = re.search(r"(\\d+) x 128", compiled.loads)
            print(head_dim, name, options, launch.options["LEAVES_OUT"], sep="|", end="|")
            print(0 if wide is None else wide[1], compiled.spilled_bytes, sep="|")
"""


def test_interleaved_maps_are_read_as_wide_where_something_is_left_out():
    """A predicate for each channel would make reads of single elements."""
    found: dict[str, dict[str, set[int]]] = {}
    for line in run_apart("-c", LEAVING_OUT, timeout=600).splitlines():
        head_dim, name, options, leaves_out, wide, spilled = line.split("|")
        assert spilled == "0", line
        of_kernel = found.setdefault(f"{head_dim} {name} {options}", {})
        of_kernel.setdefault(leaves_out, set()).add(int(wide))
    assert len(found) >= 12
    for kernel, by_form in found.items():
        assert by_form["True"] == by_form["False"], kernel
        assert min(by_form["True"]) >= 8, kernel


@pytest.mark.slow
def test_every_default_configuration_compiles_without_spills():
    compile_report(timeout=3600)


def test_launches_are_recorded_and_not_made():
    case = triton_launches.Case(2, 8, 4, 4, 3, torch.float32, False)
    kernels = [launch.kernel.fn.__name__ for launch in triton_launches.launches_of(case)]
    # Alone, of a layer, of a block; pull and push form, of a layer. What leaves out: all but the latter's.
    assert kernels.count("layer_attention_fwd_kernel") == 3 + 3
    assert kernels.count("layer_attention_bwd_dots_kernel") == 3 + 2
    assert kernels.count("layer_attention_bwd_gather_kernel") == 2 + 1
    for name in ("producer_fwd", "producer_bwd", "norm_statistics", "norm_sums", "norm_fwd"):
        assert f"layer_{name}_kernel" in kernels
    assert kernels.count("light_layer_fwd_kernel") == 6  # alone, of a block, by activation
    for name in ("light_layer_bwd_kernel", "light_layer_bwd_rows_kernel"):
        assert kernels.count(name) == 3
    kernels = [launch.kernel.fn.__name__ for launch in triton_launches.launches_of_mix(case)]
    dots, tail = "layer_attention_bwd_dots_kernel", "depth_mix_bwd_tail_kernel"
    assert kernels == ["layer_attention_fwd_kernel", dots, tail, dots, tail]
    wide = triton_launches.launches_of(case._replace(channels=512, head_dim=512, size=2))
    assert "light_layer_gates_kernel" in [launch.kernel.fn.__name__ for launch in wide]


def test_what_is_read_from_compiled_text():
    assert _loads("ld.global.v4.b32 {%r1}; ld.global.b16 %h;") == "1 x 128, 1 x 16"
    assert _loads("@%p ld.global.L1::evict_first.v2.b32 {%r1};") == "1 x 64"
    assert _loads("st.global.v4.b32 [%r];") == ""
    assert _amd_number("  .vgpr_count:     52\n  .vgpr_spill_count: 0", "vgpr_count") == 52


def test_the_table():
    row = Compiled("k", "T=4", "sm_90", 64, 0, 32, "8 x 128", 1.25)
    assert "| `k` | T=4 | sm_90 | 64 | 0 | 32 | 8 x 128 | 1.2 s |" in markdown([row], "3.7.0")
