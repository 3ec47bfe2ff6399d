"""The generator of cases in which every pair of values appears."""

from __future__ import annotations

import itertools

from support.pairs import held, pairs

FACTORS = {"a": list(range(7)), "b": list("xyz"), "c": [None, 0.5], "d": [True, False], "e": [()]}


def test_every_pair_appears_in_few_cases():
    cases = pairs(FACTORS)
    for first, second in itertools.combinations(FACTORS, 2):
        expected = set(itertools.product(FACTORS[first], FACTORS[second]))
        assert held(cases, first, second) == expected
    assert 7 * 3 <= len(cases) <= 24  # of 84 combinations


def test_the_same_cases_every_time():
    assert pairs(FACTORS) == pairs(FACTORS)


def test_the_first_cases_hold_the_most_pairs():
    cases = pairs(FACTORS)
    names = list(itertools.combinations(FACTORS, 2))

    def count(some):
        return sum(len(held(some, a, b)) for a, b in names)

    half = len(cases) // 2
    assert count(cases[:half]) > 0.6 * count(cases)


def test_pairs_that_are_not_needed():
    cases = pairs(FACTORS, lambda pair: set(pair) != {"a", "b"} or pair["a"] < 2)
    assert len(cases) < 21
    assert {case["a"] for case in cases} == set(range(7))
    assert held(cases, "a", "b") >= {(i, letter) for i in range(2) for letter in "xyz"}
    assert held(cases, "a", "c") == set(itertools.product(range(7), (None, 0.5)))


def test_a_value_that_needs_no_pair_appears():
    assert len(pairs({"a": [1, 2, 3], "b": [4]}, lambda pair: False)) == 3
