"""Compiles ahead, on all cores, what the parts will run: Triton compiles a kernel at its first call, on one core.

python -m benchmarks.gpu.warm --workers 8 --parts layers floor

Compiled kernels stay in Triton's and PyTorch's caches on disk, where the parts, each a process of its own, find them.
Nothing is measured or checked here, and what fails here fails there again, where it is said.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.gpu import floor, layers, networks, positions, rivals, shapes, stages
from benchmarks.gpu.exercise import exercise
from benchmarks.gpu.footprint import OPS, PIECES, POSITION_OPS
from benchmarks.gpu.ops import LayerOps, refusing
from benchmarks.gpu.pieces import LayerPieces
from benchmarks.gpu.setting import Setting, make_setting
from ela_kernels.backends.dispatch import KERNELS

Job = Callable[[Setting], None]

# Tests may run beside this: what all processes together may take of the device's memory.
_MEMORY_SHARE = 0.7
# The eager form of a deep stage holds more; it is compiled where it is measured.
_MOST_BYTES = 8e9


def _floor(case: shapes.Case, setting: Setting) -> None:
    ops = LayerOps(case, case.shape.depth, setting.device)
    for backend in setting.backends:
        for op in OPS:
            ops.operation(op, backend)()
        ops.forward(KERNELS[backend], ops.prev_weights)


def _pieces(case: shapes.Case, setting: Setting) -> None:
    pieces = LayerPieces(case, setting.device)
    for backend in setting.backends:
        kernels = KERNELS[backend]
        for piece in PIECES:
            if pieces.is_alone(piece, kernels):
                pieces.run(piece, kernels)


def _positions(case: shapes.Case, setting: Setting) -> None:
    ops = positions.PositionOps(case, setting.device)
    for backend in setting.backends:
        for op in POSITION_OPS:
            ops.operation(op, backend)()


def _rivals(size: tuple[int, int, int, int], setting: Setting) -> None:
    # What flash-linear-attention finds beside other processes is not to be what it runs with.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    inputs, problems = rivals.Inputs(size, setting.device), list[str]()
    attends, _ = rivals.load(setting, problems)
    for name, step in rivals.contenders_of(inputs, setting, attends).items():
        is_compiled = name == stages.COMPILED and setting.on_gpu
        if is_compiled or name not in stages.BASELINES:
            with refusing(name, problems):
                step.both(inputs.dout)
    if problems:
        raise RuntimeError("; ".join(problems))


def _stage(case: shapes.Case, compiled: bool, setting: Setting) -> None:
    stage = stages.AttentionStage(case, setting.device)
    for name, step in stages.contenders_of(stage, setting, compiled).items():
        if name != stages.EAGER:
            step()


def _layers(case: shapes.Case, kind: str, compiled: bool, setting: Setting) -> None:
    stage = layers.LayerStage(case, setting.device, kind)
    for name, step in layers.contenders_of(stage, setting, compiled).items():
        if name != stages.EAGER:
            step()


def _network(case: networks.NetworkCase, setting: Setting) -> None:
    # A quarter of the images: what is compiled is the same, and others need the memory too.
    case = case._replace(batch=max(case.batch // 4, 4))
    for backend in setting.backends:
        for kind in (networks.SKIPPING, networks.FUSED):
            networks.TrainingStep(case, kind, setting.device).on(backend)


def _exercise(setting: Setting) -> None:
    for backend in setting.backends:
        exercise(backend, setting.device, setting.few)


def jobs(setting: Setting, parts: Sequence[str]) -> list[Job]:
    """Those of the steps and parts named; the first of each before the second of any."""
    lists = [found for part, found in _jobs_by_part(setting).items() if part in parts]
    rounds = itertools.zip_longest(*lists)
    return [job for jobs_of_round in rounds for job in jobs_of_round if job is not None]


def _jobs_by_part(setting: Setting) -> dict[str, list[Job]]:
    smoke, small = setting.smoke, shapes.SMOKE_CASES[:1]
    of_networks = [case for case in networks.CASES if not case.is_instead]
    return {
        "sanitizer": [] if smoke else [_exercise],
        "layers": [
            partial(_layers, case, kind, False)
            for case in (small if smoke else layers.cases_of(setting, False))
            for kind in layers.KINDS
        ],
        "networks": [
            partial(_network, case) for case in (networks.SMOKE_CASES if smoke else of_networks)
        ],
        "floor": [partial(_floor, case) for case in (small if smoke else floor.cases_of(setting))],
        "pieces": [partial(_pieces, case) for case in (small if smoke else shapes.PIECE_CASES)],
        "positions": [
            partial(_positions, case) for case in (small if smoke else positions.cases_of(setting))
        ],
        "rivals": [partial(_rivals, size) for size in rivals.sizes_of(setting)],
        "stages": [
            partial(_stage, case, False) for case in (small if smoke else shapes.STAGE_CASES)
        ],
        "memory": [
            partial(_stage, case, False) for case in (small if smoke else shapes.MEMORY_CASES)
        ],
        "compiled": [
            partial(_stage, case, True)
            for case in ([] if smoke else shapes.COMPILED_CASES)
            if stages.eager_bytes(case) < _MOST_BYTES
        ],
        "layers_compiled": [
            partial(_layers, case, kind, True)
            for case in ([] if smoke else shapes.COMPILED_LAYER_CASES)
            for kind in layers.KINDS
        ],
    }


def run_job(job: Job, setting: Setting, share: float) -> str | None:
    """One job in a process of the pool, with its share of the device's memory; what went wrong, or None."""
    torch.compiler.reset()
    if setting.on_gpu:
        torch.cuda.set_per_process_memory_fraction(share, setting.device)
    try:
        job(setting)
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"
    finally:
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
            torch.cuda.empty_cache()
    return None


def warm(todo: Sequence[Job], setting: Setting, workers: int) -> list[str]:
    """All jobs in `workers` processes; what went wrong."""
    share = _MEMORY_SHARE / workers
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        found = list(pool.map(partial(run_job, setting=setting, share=share), todo))
    return [problem for problem in found if problem is not None]


def main(argv: list[str] | None = None) -> int:
    """Compile all, and say what could not be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--parts", nargs="+", required=True)
    parser.add_argument("--smoke", action="store_true", help="a few tiny shapes")
    parser.add_argument("--few", action="store_true", help="the largest shapes alone")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    setting = make_setting(args.device, None, args.smoke, args.few)
    todo = jobs(setting, args.parts)
    problems = warm(todo, setting, args.workers)
    for problem in problems:
        print(problem[:300], file=sys.stderr)
    done = len(todo) - len(problems)
    print(f"compiled ahead: {done} of {len(todo)}, in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
