"""Which cases on stand-ins for a GPU `make test` runs."""

import itertools

import pytest
from support.exhaustive import INTERPRETED, ON_CPU, left, usual_cases


@pytest.mark.parametrize(("count", "usual"), [(1, 2), (2, 2), (3, 2), (7, 3), (48, 8), (49, 8)])
def test_so_many_are_run_spread_evenly(count, usual):
    cases = list(range(count))
    run = sorted(set(cases) - set(left(cases, usual)))
    assert len(run) == min(count, usual)
    assert run[0] == 0
    gaps = [b - a for a, b in itertools.pairwise(run)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_stand_ins_are_known_by_their_names():
    of_kernels = "tests/conformance/test_op.py::test_calls[{}-3]".format
    assert usual_cases(of_kernels("triton_interpreted")) == INTERPRETED
    assert usual_cases(of_kernels("cuda_on_cpu")) == ON_CPU
    assert usual_cases(of_kernels("cpp")) is None
    assert usual_cases("tests/triton/test_plan.py::test_sizes[1]") == INTERPRETED
    assert usual_cases("tests/cuda_on_cpu/test_norm.py::test_forward[1]") == ON_CPU
    assert usual_cases("tests/ops/layer_attention/test_inference.py::test_a_stage[1]") is None
