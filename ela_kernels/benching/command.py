"""`python -m ela_kernels bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ela_kernels
from ela_kernels.benching.measuring import WrongResultError, measure
from ela_kernels.benching.workloads import COMPILED, EAGER, FULL, OURS, QUICK
from ela_kernels.command_line import Parser
from ela_kernels.info import collect_report
from ela_kernels.training.failures import is_out_of_memory
from ela_kernels.training.files import UnwritableFileError, write_whole
from ela_kernels.training.logs import print_table
from ela_kernels.training.processes import choose_device

# Of measuring; loading PyTorch, making networks and the last rounds come on top of it.
_SECONDS, _QUICK_SECONDS = 70.0, 7.0
_MOST_THREADS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        Exit status: 0 when done, 1 where the kernels are wrong, memory does not suffice or a file cannot be written, 2
        for arguments that do not fit.
    """
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.threads is not None and not 1 <= asked.threads <= _MOST_THREADS:
        parser.error(f"--threads: got {asked.threads}; allowed is an int from 1 to {_MOST_THREADS}")
    if asked.json is not None and (asked.json.is_dir() or not asked.json.parent.is_dir()):
        parser.error(f"--json: got {asked.json}; allowed is a file in a folder that is there")
    try:
        device = choose_device(asked.device)
    except ValueError as error:
        parser.error(f"--{error}")
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    try:
        found = _measured(asked, device)
        _print(found)
        if asked.json is not None:
            write_whole(asked.json, (json.dumps(found, indent=2, default=str) + "\n").encode())
            print(f"\nAll of it is in {asked.json}.")
    except (WrongResultError, UnwritableFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory; try {'fewer threads' if asked.quick else '--quick'}",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> Parser:
    parser = Parser(
        "bench",
        "Measure layer attention on this machine, in at most two minutes: stages and a network, as published in eager "
        "PyTorch (the earlier maps are concatenated) and by the kernels, which are compared first. On a machine that "
        "does nothing else; benchmarks/ in the sources measures more, and with more care.",
        examples=(
            ("bench --quick", "does it run, and how fast, about?"),
            ("bench --json bench.json", "for a report of something that is slow"),
        ),
    )
    add = parser.group("options")
    add("--quick", action="store_true", help="small sizes, in fifteen seconds")
    add("--compile", action="store_true", help="also torch.compile of the eager form: minutes more")
    add("--json", type=Path, help="also write everything to this file")
    add("--threads", type=int, help="of the CPU; if not given, PyTorch's choice")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    return parser


def _measured(asked: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    start = time.monotonic()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def tell(name: str) -> None:
        print(f"measuring {name}", file=sys.stderr, flush=True)

    workloads, seconds = (QUICK, _QUICK_SECONDS) if asked.quick else (FULL, _SECONDS)
    found = measure(workloads, device, seconds, asked.compile, tell)
    return {
        "report": collect_report(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "quick": asked.quick,
        "compile": asked.compile,
        "seconds": round(time.monotonic() - start, 1),
        **found,
    }


def _print(found: dict[str, Any]) -> None:
    report = found["report"]
    system, extension = _part(report, "system"), _part(report, "extension")
    cores, load = os.cpu_count() or 1, found["load_before"]
    print(
        f"ela_kernels {ela_kernels.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}\n"
        f"{system.get('processor', 'unknown processor')}, {cores} cores, {found['threads']} in use; "
        f"kernels: {extension.get('simd_level', 'no extension')}\n"
        f"device {found['device']}"
    )
    if load is not None and load > 0.5:
        print(f"warning: other programs are running (load {load:.1f}); the times mean less for it")
    names = [EAGER, *([COMPILED] if found["compile"] else []), OURS]
    head = ["", "mode", *(f"{name}, ms" for name in names), f"{EAGER} / {OURS}"]
    rows = [
        [
            row["workload"],
            row["mode"],
            *(f"{row['ms'][name]['median']:.2f}" for name in names),
            _ratio(row["times_ours"][EAGER]),
        ]
        for row in found["rows"]
    ]
    print_table(
        "medians; the ratio of them, and the quartiles of the rounds' own ratios", head, rows
    )
    if found["left_out"]:
        print(f"left out, as time was over: {', '.join(found['left_out'])}")
    print("what serves the layers, in training:")
    for name, lines in found["serves"].items():
        print("\n".join((f"  {name}", *(f"    {line}" for line in lines))))


def _part(report: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the report; nothing where its probe failed."""
    part = report.get(name)
    return part if isinstance(part, dict) else {}


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['of_medians']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
