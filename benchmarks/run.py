"""Measure layer attention on this machine and write what was found.

python -m benchmarks.run --quick --out results/bench     one stage, the compiled baseline left out: under a minute
python -m benchmarks.run --full --out results/bench      everything: an hour
python -m benchmarks.run --smoke --out results/bench     tiny sizes: does everything run? its numbers mean nothing
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders import COMPILED, EAGER, LAYER, PULL, PUSH
from benchmarks.environment import (
    KEPT,
    MALLOC_EXACT,
    MALLOC_SETTINGS,
    describe,
    process_environment,
)
from benchmarks.report import plot, text_report
from benchmarks.shapes import QUICK_STAGES, SMOKE_STAGES, STAGES, StageShape, parse_shape
from benchmarks.worker import ONCE, PARTS

ROOT = Path(__file__).resolve().parent.parent

FULL_ROUNDS = {
    "stages": 15,
    "blocks": 15,
    "light": 15,
    "floor": 15,
    "layer_floor": 15,
    "divergence": 60,
    "history_dtype": 15,
    "left_out": 9,
    "mixes": 15,
    "overhead": 400,
    "networks": 11,
    "left_out_networks": 11,
    "converted": 7,
    "compiled": 9,
    "position": 15,
    "depth": 9,
}
QUICK_ROUNDS = {
    "stages": 5,
    "blocks": 5,
    "light": 5,
    "floor": 5,
    "layer_floor": 5,
    "divergence": 15,
    "history_dtype": 5,
    "left_out": 3,
    "mixes": 5,
    "overhead": 60,
    "networks": 3,
    "left_out_networks": 3,
    "converted": 3,
    "compiled": 3,
    "position": 5,
    "depth": 3,
}
# Parts that --quick and --smoke leave out: whole networks take minutes, except small ones, and float64 takes long.
LEFT_OUT = {
    "quick": (
        "history_dtype",
        "left_out",
        "networks",
        "left_out_networks",
        "converted",
        "compiled",
        "position",
        "depth",
    ),
    "smoke": ("compiled", "position"),
    "full": (),
}


class Run:
    """One run's options, and the processes that it starts."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.threads: int | None = args.threads
        size = "full" if args.full else "quick" if args.quick else "smoke"
        self.small = size == "smoke"
        self.rounds = FULL_ROUNDS if size == "full" else QUICK_ROUNDS
        rounds = 2 if self.small and args.rounds is None else args.rounds
        if rounds is not None:
            self.rounds = dict.fromkeys(self.rounds, rounds)
        stages = {"full": STAGES, "quick": QUICK_STAGES, "smoke": SMOKE_STAGES}[size]
        self.shapes: list[StageShape] = args.shapes or list(stages)
        self.parts: list[str] = args.parts or [p for p in PARTS if p not in LEFT_OUT[size]]
        compiled = args.full if args.compile is None else args.compile
        self.processes: list[dict[str, Any]] = []
        self.contenders = [EAGER, *([COMPILED] if compiled else []), LAYER, PULL, PUSH]

    def measure(self) -> dict[str, Any]:
        """All parts for all shapes, each shape and setting of malloc in a process of its own."""
        results: dict[str, Any] = {"processes": self.processes, **{part: {} for part in PARTS}}
        for setting, malloc in MALLOC_SETTINGS.items():
            for i, shape in enumerate(self.shapes):
                parts = ["stages"]
                if setting == KEPT:
                    parts += [
                        "blocks",
                        "light",
                        "floor",
                        "layer_floor",
                        "divergence",
                        "history_dtype",
                        "left_out",
                        "mixes",
                        *(ONCE if i == 0 else ()),
                    ]
                parts = [part for part in parts if part in self.parts]
                if not parts:
                    continue
                for part, numbers in self._worker(setting, shape, parts, malloc).items():
                    if part == "stages":
                        results[part].setdefault(setting, {})[shape.name] = numbers
                    elif part in ONCE:
                        results[part] = numbers
                    else:
                        results[part][shape.name] = numbers
        if "memory" in self.parts:
            for shape in self.shapes:
                found = self._worker("memory", shape, ["memory"], MALLOC_EXACT)
                results["memory"][shape.name] = found["memory"]
        return results

    def _worker(
        self, label: str, shape: StageShape, parts: list[str], malloc: dict[str, str]
    ) -> dict[str, Any]:
        out = self.folder / f"{label}-{shape.name}.json"
        command = [sys.executable, "-m", "benchmarks.worker", "--shape", shape.name, "--parts"]
        command += [*parts, "--contenders", *self.contenders, "--out", str(out)]
        command += ["--rounds", json.dumps(self.rounds)]
        if self.threads is not None:
            command += ["--threads", str(self.threads)]
        if self.small:
            command.append("--small")
        start = time.perf_counter()
        done = subprocess.run(
            command,
            env=process_environment(malloc, self.folder / "inductor"),
            cwd=ROOT,
            stdout=sys.__stderr__,  # what a part says while it runs
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{shape} ({label}: {', '.join(parts)}) failed:\n{done.stderr}")
        seconds = time.perf_counter() - start
        print(f"{label:8} {shape}  {', '.join(parts)}: {seconds:.0f} s", file=sys.stderr)
        written = json.loads(out.read_text())
        self.processes.append({"malloc": label, "shape": shape.name, "parts": written["log"]})
        found: dict[str, Any] = written["results"]
        return found


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="one stage, few rounds")
    size.add_argument("--full", action="store_true", help="all stages")
    size.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", metavar="TxBxCxHxD", help="other stages"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="all with --full; else no networks of full size"
    )
    parser.add_argument("--rounds", type=int, help="rounds of every part")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="time the compiled baseline as well (default: with --full)",
    )
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}; allowed is 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run, print the tables, write `results.json`, `tables.md` and `stages.png`."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe(args.threads)
    with tempfile.TemporaryDirectory(prefix="ela-benchmarks-") as folder:
        run = Run(args, Path(folder))
        results = {
            "machine": machine,
            "rounds": run.rounds,
            "small": run.small,
            **run.measure(),
        }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = text_report(results)
    (args.out / "tables.md").write_text(text)
    if results["stages"] and importlib.util.find_spec("matplotlib") is not None:
        plot(results, args.out / "stages.png")
    print(text)
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
