"""What the CUDA kernels launch for one call of layer attention, run on the CPU by the stand-in runtime.

What they compute is tested in tests/conformance.
"""

from __future__ import annotations

import pytest
from support.cases import evaluate, make_case
from support.cuda_on_cpu import FORMS, launched, name_of

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("kernels")


THROUGH = ["", "out", "weights", "kl", "out weights", "out kl", "weights kl", "out weights kl"]


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gradients_that_do_not_arrive(through, layout, kernels):
    case = make_case((2, 12, 5, 4), 4, 3, makers=layout, through=through)
    evaluate(case)
    # No value is read where no gradient arrives through `out`.
    backward = ["layer_attention_bwd_dots"] * ("out" in through) + ["layer_attention_bwd_tail"]
    assert launched(kernels) == ["layer_attention_fwd"] + (backward if through else [])


@pytest.mark.parametrize("depth", [1, 33, 256])
@pytest.mark.parametrize(
    ("channels", "heads"), [(12, 3), (7, 7), (300, 1), (37, 1), (1100, 2)], ids=str
)
def test_weights_only_read_no_value(depth, channels, heads, kernels):
    case = make_case((2, channels, 3), depth, heads, through="")
    ek.layer_attention_weights(case.q, case.keys, heads, prev_weights=case.prev_weights)
    assert launched(kernels) == ["layer_attention_fwd_weights"]
