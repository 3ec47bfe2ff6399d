"""Every guard of the decision, alone and together."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from ela_kernels.ebqm import Candidate, Reason, Rules, Verdict, decide

RULES = Rules(low=0.3, high=0.5, max_share=1.0, max_row=99)


def layer(
    score: float | None,
    skipped: bool = False,
    stage: int = 0,
    first: bool = False,
    pruned: bool = False,
) -> Candidate:
    return Candidate(stage, first, skipped, pruned, score)


def one(candidate: Candidate, rules: Rules = RULES) -> Verdict:
    return decide([candidate], rules)[0]


def skipped(layers: list[Candidate], rules: Rules) -> list[int]:
    return [i for i, v in enumerate(decide(layers, rules)) if v.skipped]


def test_thresholds_with_hysteresis() -> None:
    assert one(layer(0.29)) == (True, Reason.REDUNDANT)
    assert one(layer(0.30)) == (False, Reason.DISTINCT)
    assert one(layer(0.40)) == (False, Reason.DISTINCT)
    assert one(layer(0.40, skipped=True)) == (True, Reason.HELD)
    assert one(layer(0.50, skipped=True)) == (True, Reason.HELD)
    assert one(layer(0.51, skipped=True)) == (False, Reason.RETURNED)
    assert one(layer(0.10, skipped=True)) == (True, Reason.REDUNDANT)


def test_first_layer_never() -> None:
    assert one(layer(0.0, first=True)) == (False, Reason.FIRST)
    assert one(layer(0.0, first=True, skipped=True)) == (False, Reason.FIRST)


def test_unseen_and_bad_statistics_are_kept() -> None:
    for was in (False, True):
        assert one(layer(None, skipped=was)) == (False, Reason.NOT_OBSERVED)
        assert one(layer(math.nan, skipped=was)) == (False, Reason.NOT_FINITE)


def test_share() -> None:
    layers = [layer(0.2), layer(0.1), layer(0.25), layer(0.9)]
    rules = RULES._replace(max_share=0.5)
    verdicts = decide(layers, rules)
    assert skipped(layers, rules) == [0, 1]
    assert verdicts[2] == (False, Reason.SHARE)
    assert skipped(layers, RULES._replace(max_share=0.0)) == []
    assert skipped(layers, RULES._replace(max_share=0.49)) == [1]
    # 0.29 * 100 is 28.999999999999996
    assert len(skipped([layer(0.1)] * 100, RULES._replace(max_share=0.29))) == 29


def test_share_goes_to_the_smallest_scores_and_does_not_swap() -> None:
    # high - low is 0.2: one that is skipped holds its place against those better by less than that.
    layers = [layer(0.11), layer(0.3, skipped=True), layer(0.2)]
    assert skipped(layers, RULES._replace(max_share=0.34)) == [1]
    assert skipped(layers, RULES._replace(max_share=0.67)) == [0, 1]
    layers[0] = layer(0.09)
    assert skipped(layers, RULES._replace(max_share=0.34)) == [0]
    assert decide(layers, RULES._replace(max_share=0.34))[1] == (False, Reason.SHARE)


def test_a_share_of_one_leaves_the_first_layers_alone() -> None:
    layers = [layer(0.0, stage=i // 5, first=i % 5 == 0) for i in range(20)]
    assert skipped(layers, RULES) == [i for i in range(20) if i % 5]


def test_row() -> None:
    layers = [layer(0.1), layer(0.2), layer(0.15), layer(0.1)]
    rules = RULES._replace(max_row=2)
    assert skipped(layers, rules) == [0, 2, 3]
    assert decide(layers, rules)[1] == (False, Reason.ROW)
    assert skipped(layers, RULES._replace(max_row=1)) == [0, 3]


def test_row_ends_at_a_stage() -> None:
    layers = [layer(0.1, stage=0), layer(0.1, stage=0), layer(0.1, stage=1), layer(0.1, stage=1)]
    assert skipped(layers, RULES._replace(max_row=2)) == [0, 1, 2, 3]


def test_ties_go_to_the_earlier() -> None:
    layers = [layer(0.1), layer(0.0), layer(0.0)]
    assert skipped(layers, RULES._replace(max_share=0.34)) == [1]
    assert skipped(layers, RULES._replace(max_share=0.67)) == [1, 2]


def test_pruned_layers_stay_and_count() -> None:
    layers = [layer(None, pruned=True, skipped=True), layer(0.1), layer(0.1)]
    rules = RULES._replace(max_share=0.67, max_row=1)
    assert decide(layers, rules) == [
        (True, Reason.PRUNED),
        (False, Reason.ROW),
        (True, Reason.REDUNDANT),
    ]
    assert decide(layers[:1], RULES._replace(max_share=0.0)) == [(True, Reason.PRUNED)]


candidates = st.lists(
    st.builds(
        layer,
        score=st.one_of(st.none(), st.just(math.nan), st.floats(0, 1)),
        skipped=st.booleans(),
        stage=st.integers(0, 2),
        first=st.booleans(),
    ),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(candidates, st.floats(0, 1), st.integers(1, 4))
def test_guards_hold_together(layers: list[Candidate], share: float, row: int) -> None:
    layers = sorted(layers, key=lambda c: c.stage)
    rules = RULES._replace(max_share=share, max_row=row)
    verdicts = decide(layers, rules)
    assert decide(layers, rules) == verdicts
    assert sum(v.skipped for v in verdicts) <= share * len(layers) + 1e-6
    length = 0
    for i, (candidate, verdict) in enumerate(zip(layers, verdicts, strict=True)):
        new_stage = i == 0 or layers[i - 1].stage != candidate.stage
        length = (0 if new_stage else length) + 1 if verdict.skipped else 0
        assert length <= row
        if verdict.skipped:
            assert candidate.score is not None
            assert not candidate.first
            assert candidate.score <= rules.high
            assert candidate.skipped or candidate.score < rules.low
    # a decision made again in the state that it led to stays as it is
    again = [c._replace(skipped=v.skipped) for c, v in zip(layers, verdicts, strict=True)]
    assert [v.skipped for v in decide(again, rules)] == [v.skipped for v in verdicts]


@settings(max_examples=200, deadline=None)
@given(candidates, st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=20))
def test_without_caps_no_layer_hangs_on_another(
    layers: list[Candidate], others: list[float | None]
) -> None:
    """Whatever the others' scores are, how many there are and where they stand."""
    verdicts = decide(layers, RULES)
    assert verdicts == [one(candidate) for candidate in layers]
    more = [*(layer(score, stage=5) for score in others), *reversed(layers)]
    assert decide(more, RULES)[len(others) :] == verdicts[::-1]
