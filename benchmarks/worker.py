"""One process of a run: measures some parts for one shape under the environment that it was started with.

Started by benchmarks.run, since malloc's settings are read when a process starts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.blocks import measure_blocks
from benchmarks.compiled import measure_compiled
from benchmarks.converted import measure_converted
from benchmarks.depth import measure_depth
from benchmarks.floor import measure_divergence, measure_floor
from benchmarks.history_dtype import measure_history_dtype
from benchmarks.layer_floor import measure_layer_floor
from benchmarks.left_out import measure_left_out
from benchmarks.left_out_network import measure_left_out_networks
from benchmarks.light import measure_light
from benchmarks.memory import measure_memory
from benchmarks.mixes import measure_mixes
from benchmarks.networks import measure_networks
from benchmarks.overhead import measure_overhead
from benchmarks.position import measure_position
from benchmarks.shapes import StageShape, parse_shape
from benchmarks.stages import measure_stage

PARTS = (
    "stages",
    "blocks",
    "light",
    "floor",
    "layer_floor",
    "divergence",
    "history_dtype",
    "left_out",
    "mixes",
    "memory",
    "overhead",
    "networks",
    "left_out_networks",
    "converted",
    "compiled",
    "position",
    "depth",
)
# Whose numbers do not depend on the shape.
ONCE = ("overhead", "networks", "left_out_networks", "converted", "compiled", "position", "depth")


def measure(
    part: str, shape: StageShape, contenders: list[str], rounds: dict[str, int], small: bool
) -> dict[str, Any]:
    """One part's results. `small`: small networks where a part's do not depend on the shape."""
    with_contenders = {
        "stages": measure_stage,
        "blocks": measure_blocks,
        "light": measure_light,
        "mixes": measure_mixes,
    }
    if part in with_contenders:
        return with_contenders[part](shape, contenders, rounds[part])
    if part == "networks":
        return measure_networks(rounds[part], small)
    if part == "left_out_networks":
        return measure_left_out_networks(rounds[part], small)
    if part == "converted":
        return measure_converted(rounds[part], small)
    if part == "compiled":
        return measure_compiled(rounds[part], small)
    if part == "position":
        return measure_position(rounds[part], small)
    if part == "depth":
        return measure_depth(contenders, rounds[part], small)
    if part == "memory":
        return measure_memory(shape, contenders)
    if part == "overhead":
        return measure_overhead(rounds[part])
    with_rounds = {
        "floor": measure_floor,
        "layer_floor": measure_layer_floor,
        "divergence": measure_divergence,
        "history_dtype": measure_history_dtype,
        "left_out": measure_left_out,
    }
    return with_rounds[part](shape, rounds[part])


def main() -> None:
    """Measure, and write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=parse_shape, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, required=True)
    parser.add_argument("--contenders", nargs="+", required=True)
    parser.add_argument("--rounds", type=json.loads, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    log = {}
    for part in args.parts:
        load, start = os.getloadavg()[0], time.perf_counter()
        results[part] = measure(part, args.shape, args.contenders, args.rounds, args.small)
        seconds = time.perf_counter() - start
        log[part] = {"load_before": round(load, 2), "seconds": round(seconds, 1)}
    with tempfile.NamedTemporaryFile("w", dir=args.out.parent, delete=False) as file:
        json.dump({"results": results, "log": log}, file)
    os.replace(file.name, args.out)


if __name__ == "__main__":
    main()
