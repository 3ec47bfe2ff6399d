"""Where the time of a training step goes: what kernels save of it and what skipping does, measured in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.contenders import check_close
from benchmarks.environment import MALLOC_SETTINGS, describe, process_environment
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.study.variants import make_network
from benchmarks.tables import table
from ela_kernels.models import ResNet
from ela_kernels.modules.skipping import SKIP_MODES

ROOT = Path(__file__).resolve().parents[2]
PLAIN, CONCATENATING, FUSED, WATCHED = "plain", "concatenating", "fused", "fused, watched"
# Every third layer of a stage, and every second; never the first.
SHARES = {"third": 3, "half": 2}
DEPTHS = (9, 18)
# Relative L2 norm of the scores in float32, summed in another order through up to 54 layers: 2e-7 to 8e-7 were found. A
# single channel of one layer with another sign is 3e-5 away.
CLOSE = 1e-5


def skipping(mode: str, share: str) -> str:
    """The name of a network with so many layers skipped in that mode."""
    return f"{mode}, {share}"


def measure(layers: int, batch: int, side: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a training step with SGD, of three stages of so many layers each.

    Nothing wrong is timed: all networks that skip nothing give the scores of the concatenating one.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, side, side, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    make = partial(make_network, blocks=layers, classes=10, channels=1, seed=0)
    networks: dict[str, ResNet] = {
        PLAIN: make("none"),
        CONCATENATING: make("mrla", fused=False),
        FUSED: make("mrla"),
        WATCHED: make("ela"),
    }
    _check(networks, images[:8])
    skipped = {}
    for mode in SKIP_MODES:
        for share, every in SHARES.items():
            name = skipping(mode, share)
            networks[name] = network = make("ela", skip=mode)
            skipped[name] = _skip(network, every)
    # It watches and never decides: its cost is that of the statistics alone.
    ebqm = ek.EBQM(networks[WATCHED], warmup=10**9, interval=10**9)
    steps: dict[str, Callable[[], object]] = {}
    for name, network in networks.items():
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        steps[name] = partial(_step, network.train(), images, labels, optimizer)
    unwatched = steps[WATCHED]

    def watched() -> None:
        unwatched()
        ebqm.step()

    steps[WATCHED] = watched
    seconds = interleave(steps, rounds)
    return {
        "layers": layers,
        "shape": [batch, 1, side, side],
        "skipped_of_a_stage": skipped,
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "over_concatenating": {
            name: ratio(times, seconds[CONCATENATING]) for name, times in seconds.items()
        },
        "over_fused": {name: ratio(times, seconds[FUSED]) for name, times in seconds.items()},
    }


def _step(
    network: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _skip(network: ResNet, every: int) -> int:
    """Skip every so many-th layer of each stage; how many of one stage."""
    count = 0
    for stage in network.attentions:
        assert isinstance(stage, nn.ModuleList)
        count = 0
        for i, layer in enumerate(stage):
            assert isinstance(layer, ek.ELA)
            layer.skipped = i % every == every - 1
            count += layer.skipped
    return count


@torch.no_grad()
def _check(networks: dict[str, ResNet], images: Tensor) -> None:
    # Statistics of the batch, since running ones are those of no data yet.
    want = networks[CONCATENATING].train()(images).double()
    for name in (FUSED, WATCHED):
        check_close(f"{name}: scores", networks[name].train()(images), want, CLOSE)


def measure_all(
    depths: tuple[int, ...], batch: int, side: int, rounds: int, threads: int | None
) -> dict[str, Any]:
    """:func:`measure` of each depth under each setting of malloc, each in a process of its own."""
    results: dict[str, Any] = {"machine": describe(threads), "steps": {}}
    with tempfile.TemporaryDirectory(prefix="ela-study-") as folder:
        for setting, malloc in MALLOC_SETTINGS.items():
            for layers in depths:
                out = Path(folder) / f"{setting}-{layers}.json"
                command = [sys.executable, "-m", "benchmarks.study.steps", str(out)]
                command += [str(n) for n in (layers, batch, side, rounds, threads or 0)]
                done = subprocess.run(
                    command,
                    env=process_environment(malloc, Path(folder)),
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode != 0:
                    raise RuntimeError(f"T={layers}, {setting} malloc failed:\n{done.stderr}")
                found = json.loads(out.read_text())
                results["steps"].setdefault(setting, {})[str(layers)] = found
                print(f"{setting} malloc, T={layers}: done", file=sys.stderr)
    return results


def time_table(results: dict[str, Any]) -> str:
    """What is saved, of a concatenating step by the kernels and of a fused step by skipping."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['simd_level']}, torch {machine['torch']}, "
        f"{machine['date']}, load before {machine['load_before'][0]}",
        "",
    ]
    for setting, depths in results["steps"].items():
        for found in depths.values():
            size = found["layers"]
            rows = [_row(name, found) for name in found["ms"]]
            shape = ", ".join(map(str, found["shape"]))
            lines += [
                f"{setting} malloc, {size} layers a stage (resnet{6 * size + 2}), [{shape}]",
                "",
                *table(
                    ["network", "skipped of a stage", "a step, ms", "to concatenating", "to fused"],
                    rows,
                ),
                "",
            ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(name: str, found: dict[str, Any]) -> list[str]:
    ms = found["ms"][name]
    count = found["skipped_of_a_stage"].get(name)
    cells = []
    for base, of in (("over_concatenating", CONCATENATING), ("over_fused", FUSED)):
        r = found[base][name]
        cells.append(
            ""
            if name == of
            else f"{change(r['of_medians'])} [{change(r['q1'])}, {change(r['q3'])}]"
        )
    return [
        name,
        "" if count is None else f"{count} of {found['layers']}",
        f"{ms['median']:.1f} [{ms['q1']:.1f}, {ms['q3']:.1f}]",
        *cells,
    ]


def change(quotient: float) -> str:
    """A quotient of times as a change in percent."""
    return f"{100 * (quotient - 1):+.1f} %"


def main(argv: list[str]) -> None:
    """One process of :func:`measure_all`: malloc's settings are read when a process starts."""
    out, *numbers = argv
    layers, batch, side, rounds, threads = map(int, numbers)
    if threads:
        torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    found = {"load_before": round(load, 2), **measure(layers, batch, side, rounds)}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
