"""What holds for every layer attention, whatever computes it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.backends import Backend, over, words
from support.cases import Case, make_case
from support.layouts import channels_last, contiguous
from support.pairs import pairs

import ela_kernels as ek

EPS = {torch.float64: torch.finfo(torch.float64).eps}


def eps_of(dtype: torch.dtype) -> float:
    """Of the type in which weights and divergence are computed."""
    return EPS.get(dtype, torch.finfo(torch.float32).eps)


def call(backend: Backend, case: Case, **changes) -> ek.LayerAttentionOutput:
    """On the backend; results on the CPU."""
    there = backend.case(dataclasses.replace(case, **changes))
    r = ek.layer_attention(
        there.q, there.keys, there.values, there.heads, there.scale, there.prev_weights
    )
    return type(r)(*(None if x is None else x.cpu() for x in r))


@over(
    "pair",
    lambda backend: pairs(
        {"depth": [1, 2, 7, 33 if backend.is_slow else 100], "dtype": backend.dtypes}
    ),
    ids=words,
)
def test_weights_sum_to_one(backend, pair):
    depth, dtype = pair["depth"], pair["dtype"]
    case = make_case((4, 12, 3), depth, 3, dtype)
    weights = call(backend, case).weights
    assert weights.shape == (4, 3, depth)
    assert (weights >= 0).all()
    # Each weight carries the rounding of its exponent (|log w| < 16 here) and of the exponential, all with the same
    # sum of T terms below them.
    total = weights.sum(-1)
    torch.testing.assert_close(
        total, torch.ones_like(total), rtol=0, atol=(16 + depth) * eps_of(dtype)
    )


@over("dtype", lambda backend: [d for d in backend.dtypes if d.itemsize >= 4])
def test_adding_one_vector_to_every_key_changes_nothing(backend, dtype):
    # It adds <q, shift> to all scores of a head, and softmax does not see that.
    case = make_case(dtype=dtype, depth=5)
    shift = torch.randn_like(case.q)
    before, after = call(backend, case), call(backend, case, keys=[k + shift for k in case.keys])
    # Scores here are below 16, keys below 8: each is off by a few eps of that.
    atol = 64 * eps_of(dtype)
    torch.testing.assert_close(after.weights, before.weights, rtol=0, atol=atol)
    torch.testing.assert_close(after.kl, before.kl, rtol=0, atol=4 * atol)
    torch.testing.assert_close(after.out, before.out, rtol=0, atol=8 * atol)


def test_adding_a_vector_to_the_query_changes_something(backend):
    case = make_case(depth=5)
    assert (
        call(backend, case).weights - call(backend, case, q=case.q + 1).weights
    ).abs().max() > 1e-2


@over("dtype", lambda backend: backend.dtypes)
def test_divergence_is_never_negative(backend, dtype):
    case = make_case((16, 64, 1), 6, 32, dtype, scale=0.01)
    kl = call(
        backend,
        case,
        prev_weights=torch.rand(16, 32, 5).add(0.01).to(call(backend, case).kl.dtype).softmax(-1),
    ).kl
    # T terms p (log p - log a), each at most 4 eps off: sums of p, logarithms below 8.
    assert kl.min() >= -32 * eps_of(dtype)
    assert kl.max() > 0


@over("dtype", lambda backend: backend.dtypes)
def test_divergence_of_equal_weights_is_zero(backend, dtype):
    case = make_case((8, 12, 3), 6, 3, dtype)
    weights = call(backend, case).weights
    kl = call(backend, case, prev_weights=weights).kl
    # log of a weight that was rounded once, against its own logarithm, below 16 here; weights sum to 1.
    assert kl.abs().max() <= 32 * eps_of(dtype)


@pytest.mark.parametrize("new_layers", [1, 3])
def test_divergence_splits_into_shared_and_new(backend, new_layers):
    # KL(prev || this) = KL(prev || this on the shared layers, made to sum to 1) - log(1 - mass on the new layers)
    depth = 6
    case = make_case(depth=depth, dtype=backend.exact, prev_depth=depth - new_layers)
    r, p = call(backend, case), case.prev_weights
    mass = r.weights[..., depth - new_layers :].sum(-1)
    shared = r.weights[..., : depth - new_layers] / (1 - mass).unsqueeze(-1)
    expected = (p * (p / shared).log()).sum(-1) - (1 - mass).log()
    eps = eps_of(backend.exact)
    torch.testing.assert_close(r.kl, expected, rtol=450 * eps, atol=45 * eps)
    assert r.kl.min() > 0


def test_a_layer_that_adds_mass_alone_diverges_by_its_logarithm(backend):
    # Same keys, same query, and a third layer that takes half of it: the divergence is log 2.
    case = make_case((1, 4, 2), 4, 2)
    k = torch.zeros(1, 4)
    r = call(backend, case, q=k, keys=[k] * 4, prev_weights=torch.full((1, 2, 2), 0.5))
    torch.testing.assert_close(r.kl, torch.full((1, 2), 2.0).log())


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=words)
@over("dtype", lambda backend: backend.dtypes)
def test_the_aggregation_lies_in_the_hull_of_the_values(backend, dtype, layout):
    case = make_case((3, 12, 7, 5), 5, 3, dtype, layout)
    out = call(backend, case).out
    values = torch.stack(case.values)
    # The weights sum to 1 within 8 eps of their type, and the sum of T products adds T more; then one rounding.
    slack = (
        16 * eps_of(dtype) * values.double().abs().amax(0)
        + torch.finfo(dtype).eps * out.double().abs()
    )
    assert (out.double() <= values.double().amax(0) + slack).all()
    assert (out.double() >= values.double().amin(0) - slack).all()


def test_equal_values_come_back(backend):
    value = torch.randn(2, 12, 5)
    case = make_case((2, 12, 5), 7)
    torch.testing.assert_close(
        call(backend, case, values=[value] * 7).out, value, rtol=16 * 2**-23, atol=0
    )


def test_a_permuted_history_permutes_the_weights(backend):
    case = make_case(depth=6)
    order = torch.randperm(6).tolist()
    assert order != sorted(order)
    before = call(backend, case)
    after = call(
        backend, case, keys=[case.keys[j] for j in order], values=[case.values[j] for j in order]
    )
    # The sum of exponentials is taken in another order: T roundings.
    torch.testing.assert_close(after.weights, before.weights[..., order], rtol=12 * 2**-23, atol=0)
    torch.testing.assert_close(after.out, before.out, rtol=0, atol=6 * 12 * 2**-23)


def test_heads_do_not_see_each_other(backend):
    case = make_case((2, 12, 5), 4, heads=3)
    changed_keys = [k.clone() for k in case.keys]
    changed_values = [v.clone() for v in case.values]
    for k, v in zip(changed_keys, changed_values, strict=True):
        k[:, 4:8] += 1.5 * torch.randn_like(k[:, 4:8])
        v[:, 4:8] += 1.0
    before, after = (
        call(backend, case),
        call(backend, case, keys=changed_keys, values=changed_values),
    )
    for same in (0, 2):
        channels = slice(4 * same, 4 * same + 4)
        assert torch.equal(after.weights[:, same], before.weights[:, same])
        assert torch.equal(after.kl[:, same], before.kl[:, same])
        assert torch.equal(after.out[:, channels], before.out[:, channels])
    assert not torch.equal(after.weights[:, 1], before.weights[:, 1])


def test_samples_do_not_see_each_other(backend):
    case = make_case((3, 12, 5), 4)
    whole = call(backend, case)
    for b in range(3):
        one = call(
            backend,
            case,
            q=case.q[b : b + 1],
            keys=[k[b : b + 1] for k in case.keys],
            values=[v[b : b + 1] for v in case.values],
            prev_weights=case.prev_weights[b : b + 1],
        )
        torch.testing.assert_close(one.out[0], whole.out[b])
        torch.testing.assert_close(one.kl[0], whole.kl[b])
