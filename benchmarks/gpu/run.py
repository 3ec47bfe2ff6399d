"""Parts of the GPU benchmarks in one process, added to OUT/results.json; or the tables of what is there.

python -m benchmarks.gpu.run floor --out OUT --seconds 60
python -m benchmarks.gpu.run memory=8 divergence=4 --out OUT
python -m benchmarks.gpu.run report --out OUT
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import (
    divergence,
    floor,
    layers,
    memory,
    networks,
    overhead,
    pieces,
    positions,
    rivals,
    stages,
)
from benchmarks.gpu.floor import Save
from benchmarks.gpu.report import write_pictures, write_report
from benchmarks.gpu.setting import Setting, describe, make_setting
from benchmarks.gpu.timing import Budget

PARTS: dict[str, Callable[[Setting, Budget, Save], None]] = {
    "floor": floor.measure,
    "layers": layers.measure,
    "networks": networks.measure,
    "pieces": pieces.measure,
    "positions": positions.measure,
    "stages": stages.measure,
    "compiled": stages.measure_compiled,
    "layers_compiled": layers.measure_compiled,
    "memory": memory.measure,
    "divergence": divergence.measure,
    "overhead": overhead.measure,
    "rivals": rivals.measure,
}


def read_results(folder: Path) -> dict[str, Any]:
    """What the parts so far have written."""
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    return results


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """In one step, so that a process that is cut off leaves what was there."""
    new = folder / "results.json.new"
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, folder / "results.json")


def run_part(name: str, folder: Path, seconds: float, setting: Setting) -> None:
    """Measure one part; every save goes to the file at once."""
    start = time.perf_counter()
    results = read_results(folder)
    results["machine"] = describe(setting)

    def save(report: dict[str, Any]) -> None:
        taken = round(time.perf_counter() - start, 1)
        results["parts"][name] = report | {"seconds": taken}
        write_results(folder, results)

    PARTS[name](setting, Budget(seconds), save)
    report = results["parts"].get(name, {})
    for line in report.get("refused", []):
        print(f"{name}: REFUSED {line}", file=sys.stderr)
    if report.get("left_out"):
        print(f"{name}: no time or memory for {'; '.join(report['left_out'])}", file=sys.stderr)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="+", type=_part, metavar="part", help="a name, or name=seconds of its own"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--seconds", type=_seconds, default=60.0, help="about how long each other may take"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", choices=["cuda", "triton", "cpp"])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes and few rounds, to see that it runs"
    )
    parser.add_argument("--few", action="store_true", help="the largest shapes alone")
    return parser.parse_args(argv)


def _part(text: str) -> tuple[str, float | None]:
    """`name` or `name=seconds`."""
    name, sign, seconds = text.partition("=")
    allowed = [*PARTS, "report"]
    if name not in allowed:
        raise argparse.ArgumentTypeError(f"got {name!r}; allowed are {', '.join(allowed)}")
    return name, _seconds(seconds) if sign else None


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r} seconds; allowed is a positive number")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run parts, or write the tables and pictures and print the tables; 1 where a part could not be run."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part, seconds in args.parts:
        if part == "report":
            results = read_results(args.out)
            print(write_report(results, args.out), flush=True)
            write_pictures(results, args.out)
            continue
        setting = make_setting(args.device, args.backends, args.smoke, args.few)
        if not setting.backends:
            print(f"{part}: none of our backends can run here", file=sys.stderr)
        try:
            run_part(part, args.out, seconds or args.seconds, setting)
        except Exception:
            traceback.print_exc()
            print(f"{part}: FAILED; what it had measured is kept", file=sys.stderr)
            failed.append(part)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
