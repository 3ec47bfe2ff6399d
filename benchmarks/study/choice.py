"""Which layers are skipped where EBQM does not decide: as many as it did, at random or the last ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

Skipped = list[list[bool]]
"""For each stage, whether each of its layers is skipped."""


def ranking(stages: Sequence[int], max_row: int, seed: str) -> list[tuple[int, int]]:
    """All layers that may be skipped, in the random order in which they are: stage and place of each.

    As for EBQM the first layer of a stage is none of them, and `max_row` skipped layers may stand in a row; those that
    would break that come last, since EBQM never skips as many.

    Args:
        stages: number of layers of each stage.
        max_row: as EBQM's.
        seed: of the order.
    """
    layers = [(i, j) for i, count in enumerate(stages) for j in range(1, count)]
    random.Random(seed).shuffle(layers)
    taken: set[tuple[int, int]] = set()
    rest = []
    first = []
    for layer in layers:
        if _row_with(layer, taken) > max_row:
            rest.append(layer)
        else:
            taken.add(layer)
            first.append(layer)
    return first + rest


def _row_with(layer: tuple[int, int], taken: set[tuple[int, int]]) -> int:
    stage, place = layer
    length = 1
    for direction in (-1, 1):
        there = place + direction
        while (stage, there) in taken:
            length += 1
            there += direction
    return length


def at_random(paired: Skipped, order: Sequence[tuple[int, int]]) -> Skipped:
    """As many layers in all as in `paired`, the first ones of the order."""
    chosen = set(order[: sum(map(sum, paired))])
    return [[(i, j) in chosen for j in range(len(stage))] for i, stage in enumerate(paired)]


def the_last(paired: Skipped) -> Skipped:
    """In each stage as many layers as in `paired`, its last ones."""
    return [[j >= len(stage) - sum(stage) for j in range(len(stage))] for stage in paired]
