"""What only the interpreter is asked: histories so deep that it takes minutes for them."""

from __future__ import annotations

import pytest
from support.cases import evaluate, make_case
from support.layouts import channels_last, contiguous
from support.oracle import assert_matches


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("depth", [127, 128])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_great_depths(depth, layout):
    case = make_case((1, 4, 3, 5), depth, 2, makers=layout)
    assert_matches(evaluate(case), case)
