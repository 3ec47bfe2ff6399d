"""Gradients by the outputs they arrive through and the inputs that ask for them; numerical derivatives."""

from __future__ import annotations

import pytest
import torch
from support.cases import evaluate, make_case
from support.layouts import channels_last, contiguous
from support.oracle import assert_matches, oracle

import ela_kernels as ek

THROUGH = ["out", "weights", "kl", "out weights", "out kl", "weights kl", "out weights kl"]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_through_each_output(layout, through):
    case = make_case((2, 8, 3, 5), 4, 2, makers=layout, through=through)
    found = evaluate(case)
    assert_matches(found, case)
    # Each of these gradients is something: a test of zeros against zeros would prove nothing.
    for name in ("d q", "d keys[0]", "d keys[3]"):
        assert found[name].abs().max() > 1e-3
    assert (found["d values[1]"].abs().max() > 1e-3) == ("out" in through)
    assert (found["d prev_weights"].abs().max() > 1e-3) == ("kl" in through)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "wanted",
    [
        ["q"],
        ["keys[1]"],
        ["keys[0]", "keys[2]"],
        ["values[0]"],
        ["values[1]", "values[2]"],
        ["prev_weights"],
        ["q", "values[2]"],
        ["keys[2]", "prev_weights"],
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_only_some_inputs_need_gradients(layout, wanted):
    case = make_case((2, 8, 3, 5), 3, 2, makers=layout)
    case.wanted = wanted
    assert_matches(evaluate(case), case)


@pytest.mark.usefixtures("backend")
def test_an_input_that_needs_none_gets_none():
    q, k = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6)
    values = [torch.randn(2, 6, 4), torch.randn(2, 6, 4, requires_grad=True)]
    ek.layer_attention(q, [k, k], values, 2).out.sum().backward()
    assert q.grad is not None
    assert values[1].grad is not None
    assert k.grad is None
    assert values[0].grad is None


@pytest.mark.usefixtures("backend")
def test_zeros_in_the_previous_weights():
    # A zero contributes zero to the divergence and to both gradients, also where this layer's weight is zero too.
    case = make_case((2, 8, 3), 3, 2, prev_depth=2)
    case.prev_weights = torch.tensor([[[0.0, 1.0], [0.3, 0.7]], [[1.0, 0.0], [0.0, 0.0]]])
    found = evaluate(case)
    assert_matches(found, case)
    assert found["d prev_weights"][0, 0, 0] == 0
    assert found["kl"][1, 1] == 0


@pytest.mark.usefixtures("backend")
def test_one_hot_weights_keep_a_finite_divergence():
    # exp(-300) is zero in float32: the divergence has to come from the scores, not from the rounded weight.
    q = torch.tensor([[300.0]])
    keys = [torch.tensor([[0.0]]), torch.tensor([[1.0]])]
    q.requires_grad_()
    prev = torch.tensor([[[1.0]]])
    r = ek.layer_attention(
        q, keys, [torch.zeros(1, 1, 2), torch.ones(1, 1, 2)], 1, prev_weights=prev
    )
    assert r.weights.tolist() == [[[0.0, 1.0]]]
    assert r.kl.tolist() == [[300.0]]
    assert torch.autograd.grad(r.kl.sum(), q)[0].tolist() == [[1.0]]


def gradcheck_inputs(batch: int, channels_last: bool):
    shape = (batch, 2, 4) if channels_last else (batch, 4, 2)
    case = make_case(shape, 2, 2, torch.float64, prev_depth=1, channels_last=channels_last)
    inputs = [case.q, *case.keys, *case.values, case.prev_weights]

    def function(q, k0, k1, v0, v1, prev):
        return ek.layer_attention(
            q, (k0, k1), (v0, v1), 2, prev_weights=prev, channels_last=channels_last
        )

    return function, [x.detach().requires_grad_() for x in inputs]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("channels_last", [False, True])
def test_numerical_first_derivatives(channels_last):
    function, inputs = gradcheck_inputs(2, channels_last)
    assert torch.autograd.gradcheck(lambda *x: tuple(function(*x)), inputs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("output", range(3), ids=["out", "weights", "kl"])
def test_numerical_second_derivatives(output):
    function, inputs = gradcheck_inputs(1, False)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x)[output], inputs)


@pytest.mark.usefixtures("backend")
def test_second_derivatives_of_a_parameter():
    # A learned query that no layer computes: nn.Parameter is a subclass of Tensor.
    q = torch.nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
    keys, values = (
        torch.randn(2, 2, 4, dtype=torch.float64),
        torch.randn(2, 2, 4, 3, dtype=torch.float64),
    )

    def function(q):
        return ek.layer_attention(q, keys, values, 2).out

    assert torch.autograd.gradgradcheck(function, [q])


@pytest.mark.usefixtures("backend")
def test_second_backward_over_a_retained_graph():
    case = make_case()
    expected = oracle(case)["d q"]
    q = case.q.requires_grad_()
    r = ek.layer_attention(q, case.keys, case.values, 3, prev_weights=case.prev_weights)
    for _ in range(2):
        r.out.backward(case.dout, retain_graph=True)
        r.weights.backward(case.dweights, retain_graph=True)
        r.kl.backward(case.dkl, retain_graph=True)
    torch.testing.assert_close(q.grad.double(), 2 * expected, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("backend")
def test_an_input_changed_in_place_is_noticed():
    q, k, v = (torch.randn(2, 6, requires_grad=True) for _ in "qkv")
    value = v * 1.0
    out = ek.layer_attention(q, [k], [value], 2).out
    value.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
