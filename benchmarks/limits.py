"""The most that any kernel could reach on the machine of a run, from what the run measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.environment import DEFAULT, KEPT
from benchmarks.measure import fastest_baseline
from benchmarks.shapes import StageShape, parse_shape

Results = dict[str, Any]

# Maps that a residual block in training moves beyond a layer `x + o`, with statistics of the batch. Forward: the
# retrieval and x once more, and the output. Backward: the output's gradient and the retrieval, twice.
_BLOCK_FORWARD, _BLOCK_BACKWARD = 3, 4


class Limit(NamedTuple):
    """How many times faster than a baseline, and how many times a kernel could be that does nothing but read."""

    what: str
    shape: str
    reached: float
    most: float


def limits(results: Results) -> list[Limit]:
    """All limits that this run has numbers for."""
    return list(_limits(results))


def _limits(results: Results) -> Iterator[Limit]:
    for name, floor in results["layer_floor"].items():
        shape = parse_shape(name)
        probe = _probe_ms(floor)
        for setting, label in ((KEPT, "kept"), (DEFAULT, "default")):
            stage = results["stages"].get(setting, {}).get(name)
            if stage is None:
                continue
            # With the default malloc the targets are over eager alone.
            baseline = stage["fastest_baseline"] if setting == KEPT else "eager"
            ms = stage["contenders"][baseline]["ms"]["median"]
            reached = stage["times_ours"][baseline]["of_medians"]
            what = f"stage, {label} malloc, over {baseline}"
            yield Limit(what, name, reached, ms / (probe["forward"] + probe["backward"]))
        blocks = results["blocks"].get(name)
        if blocks is None:
            continue
        extra = _block_ms(shape, floor)
        least = {
            "training": probe["forward"] + probe["backward"] + extra,
            "inference": probe["forward"],
        }
        for phase, probe_ms in least.items():
            found = blocks[phase]
            baseline = fastest_baseline(found["ms"])
            slower = found["ms"][baseline]["median"]
            reached = found["times_ours"][baseline]["of_medians"]
            yield Limit(f"blocks, {phase}, over {baseline}", name, reached, slower / probe_ms)
    for network, found in results["networks"].items():
        ms = {n: m["median"] for n, m in found["training"]["ms"].items()}
        yield Limit(
            "network, a step, concatenating over mrla",
            network,
            ms["concatenating"] / ms["mrla"],
            ms["concatenating"] / ms["plain"],
        )


def _probe_ms(floor: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a read probe over a whole stage's least maps, by direction."""
    return {
        name: phase["least_bytes"] / phase["probe_gb_per_s"] / 1e6
        for name, phase in floor["phases"].items()
    }


def _block_ms(shape: StageShape, floor: dict[str, Any]) -> float:
    """Milliseconds of a read probe over what blocks move beyond layers."""
    map_bytes = 4 * shape.map_elements * shape.depth
    rates = {name: phase["probe_gb_per_s"] for name, phase in floor["phases"].items()}
    return (
        map_bytes * (_BLOCK_FORWARD / rates["forward"] + _BLOCK_BACKWARD / rates["backward"]) / 1e6
    )
