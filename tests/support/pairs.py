"""Cases that hold every pair of values of any two factors, in place of every combination of all values.

Most mistakes show where two things meet: a dtype and a layout, a depth and a missing gradient. A few dozen cases hold
all such pairs of ten factors, of which all combinations would be millions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Factors = Mapping[str, Sequence[Any]]
Needed = Callable[[Mapping[str, Any]], bool]


def pairs(factors: Factors, needed: Needed = lambda pair: True) -> list[dict[str, Any]]:
    """The same list for the same factors; the first cases hold the most pairs.

    Args:
        needed: whether two values have to meet, of `{factor: value, other factor: other value}`. Each value appears in
            any case.
    """
    draw = random.Random(len(factors))  # among values that are as good as each other
    names = list(factors)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for (i, x), (j, y) in itertools.product(enumerate(factors[a]), enumerate(factors[b]))
        if needed({a: x, b: y})
    }
    unseen = {(a, i) for a in names for i in range(len(factors[a]))}
    order = {name: n for n, name in enumerate(names)}

    def key(a: tuple[str, int], b: tuple[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
        return (a, b) if order[a[0]] < order[b[0]] else (b, a)

    cases = []
    while open_pairs or unseen:
        # A pair that is open yet, or else a value that met nothing, and then what closes the most pairs with it.
        row = dict(min(open_pairs)) if open_pairs else dict([min(unseen)])
        for name in draw.sample(names, len(names)):
            if name in row:
                continue
            gains = []
            for i in range(len(factors[name])):
                closed = sum(key(known, (name, i)) in open_pairs for known in row.items())
                gains.append((closed, (name, i) in unseen, draw.random(), i))
            row[name] = max(gains)[-1]
        chosen = list(row.items())
        unseen -= set(chosen)
        open_pairs -= {key(a, b) for a, b in itertools.combinations(chosen, 2)}
        cases.append({name: factors[name][row[name]] for name in names})
    return cases


def held(cases: Iterable[Mapping[str, Any]], first: str, second: str) -> set[tuple[Any, Any]]:
    """The pairs of values of two factors that some cases hold."""
    return {(case[first], case[second]) for case in cases}
