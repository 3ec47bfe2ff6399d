"""position_attention: its formula, its numbers where they are extreme, and who serves a call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.position import (
    assert_position_matches,
    evaluate_position,
    make_position_case,
)

import ela_kernels as ek

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "position_attention.npz"


@pytest.mark.usefixtures("backend")
def test_golden_numbers():
    """Of a float64 form in NumPy that shares no code with the package, gradients by its own chain rule."""
    with np.load(GOLDEN) as data:
        of = {name: torch.from_numpy(data[name]) for name in data.files}
    depth = int(of["depth"])
    for kind in ("own", "given"):
        leaves = {
            n: of[n].clone().requires_grad_()
            for n in ("query", "norm_weight", *(f"v{t}" for t in range(depth)))
        }
        keys = None
        if kind == "given":
            keys = [of[f"k{t}"].clone().requires_grad_() for t in range(depth)]
        r = ek.position_attention(
            leaves["query"],
            [leaves[f"v{t}"] for t in range(depth)],
            keys,
            leaves["norm_weight"] if kind == "own" else None,
            eps=float(of["eps"]),
            scale=float(of["scale"]),
            prev_weights=of["prev"],
        )
        for name in ("out", "weights", "kl"):
            assert_near(getattr(r, name), of[f"{kind}_{name}"])
        wanted = [leaves["query"], *(leaves[f"v{t}"] for t in range(depth)), *(keys or ())]
        grads = torch.autograd.grad(
            [r.out, r.weights, r.kl], wanted, [of["dout"], of["dweights"], of["dkl"]]
        )
        names = ["query", *(f"v{t}" for t in range(depth))]
        names += [f"k{t}" for t in range(depth)] if keys else []
        for name, g in zip(names, grads, strict=True):
            assert_near(g, of[f"{kind}_d_{name}"])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    # Relative to the largest number of the tensor: an element near zero is a difference of such numbers.
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.usefixtures("backend")
def test_the_docstrings_form_is_equivalent():
    B, T, N, C = 2, 3, 5, 8
    values = [torch.randn(B, N, C, dtype=torch.float64) for _ in range(T)]
    norm_weight, eps, scale = torch.rand(C, dtype=torch.float64), 1e-6, 0.7
    prev_weights = torch.randn(B, T - 1, N, dtype=torch.float64).softmax(1)
    for query in (torch.randn(C, dtype=torch.float64), torch.randn(B, N, C, dtype=torch.float64)):
        v = torch.stack(values, 1)
        k = F.rms_norm(v, (C,), norm_weight, eps)
        s = scale * (query.unsqueeze(1) * k).sum(-1) if query.dim() > 1 else scale * (k @ query)
        weights = s.softmax(1)
        p = F.pad(prev_weights, (0, 0, 0, T - prev_weights.shape[1]))
        kl = torch.where(p > 0, p * (p.log() - s.log_softmax(1)), 0).sum(1)
        r = ek.position_attention(query, values, None, norm_weight, eps, scale, prev_weights)
        torch.testing.assert_close(r.weights, weights)
        torch.testing.assert_close(r.out, torch.einsum("btn,btnc->bnc", weights, v))
        torch.testing.assert_close(r.kl, kl)
        torch.testing.assert_close(r.kl_mean, kl.mean(1))


@pytest.mark.usefixtures("backend")
def test_three_dimensions_are_tokens_unless_said_otherwise():
    values = [torch.randn(2, 6, 6) for _ in range(2)]
    query = torch.randn(6)
    tokens = ek.position_attention(query, values)
    rows = ek.position_attention(query, values, channels_last=False)
    turned = ek.position_attention(query, [v.transpose(1, 2) for v in values], channels_last=False)
    torch.testing.assert_close(tokens.out, turned.out.transpose(1, 2))
    torch.testing.assert_close(tokens.weights, turned.weights)
    assert not torch.allclose(tokens.weights, rows.weights)


@pytest.mark.usefixtures("backend")
def test_given_keys_are_normalised_with_a_norm_weight_and_only_then():
    values = [torch.randn(2, 5, 6) for _ in range(3)]
    query, weight = torch.randn(6), torch.rand(6)
    own = ek.position_attention(query, values, norm_weight=weight)
    same = ek.position_attention(query, values, values, norm_weight=weight)
    torch.testing.assert_close(own.out, same.out)
    plain = ek.position_attention(query, values, values)
    expected = torch.stack([v @ query for v in values], 1).softmax(1)
    torch.testing.assert_close(plain.weights, expected)


@pytest.mark.usefixtures("backend")
def test_a_query_of_zeros_weighs_all_values_alike():
    values = [torch.randn(2, 5, 6) for _ in range(4)]
    r = ek.position_attention(torch.zeros(6), values, prev_weights=torch.full((2, 3, 5), 1 / 3))
    torch.testing.assert_close(r.weights, torch.full((2, 4, 5), 0.25))
    torch.testing.assert_close(r.out, torch.stack(values).mean(0))
    # KL(1/3 on three || 1/4 each) is log(4/3).
    torch.testing.assert_close(r.kl, torch.full((2, 5), 4 / 3).log())


@pytest.mark.usefixtures("backend")
def test_large_scores_and_values_of_zeros():
    values = [torch.randn(2, 5, 6), torch.zeros(2, 5, 6), 1e4 * torch.randn(2, 5, 6)]
    case = make_position_case((2, 5, 6), 3, channels_last=True, prev_depth=None)
    case.values, case.query = values, torch.full((6,), 300.0)
    found = evaluate_position(case)
    assert all(x.isfinite().all() for x in found.values())
    assert_position_matches(
        {n: found[n] for n in ("out", "weights")},
        case,
        {n: x for n, x in _oracle(case).items() if n in ("out", "weights")},
    )


def _oracle(case):
    from support.position import position_oracle

    return position_oracle(case)


@pytest.mark.usefixtures("backend")
def test_a_nan_stays_where_it_is():
    values = [torch.randn(2, 5, 6) for _ in range(3)]
    values[1][0, 2, 3] = float("nan")
    r = ek.position_attention(torch.randn(6), values)
    bad = r.weights.isnan().any(1)
    assert bad[0, 2]
    assert bad.sum() == 1
    assert r.out.isnan().all(-1).sum() == 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tokens", [False, True])
def test_threads_change_no_bit(tokens):
    shape = (3, 70, 96) if tokens else (3, 24, 33, 17)
    case = make_position_case(shape, 3, channels_last=tokens)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with ek.use_backend("cpp"):
            found.append(evaluate_position(case))
    torch.set_num_threads(1)
    for other in found[1:]:
        for name, x in other.items():
            assert torch.equal(x, found[0][name]), name


class Retrieves(torch.nn.Module):
    def forward(self, query, values):
        return ek.position_attention(query, values).out


@pytest.mark.usefixtures("kernels")
def test_explain_says_who_serves():
    values = [torch.randn(2, 5, 6) for _ in range(2)]
    (found,) = ek.explain(Retrieves(), torch.randn(6), values)
    assert (found.form, found.backend, found.reasons) == ("op", "cpp", {})
    with ek.use_backend("eager"):
        (found,) = ek.explain(Retrieves(), torch.randn(6), values)
    assert (found.form, found.backend) == ("eager", "eager")
    assert found.reasons == {"op": ("use_backend('eager') is in force",)}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_serve_says_why(backend):
    values = [torch.randn(2, 5, 6) for _ in range(2)]
    with ek.use_backend(backend), pytest.raises(ValueError, match=f"{backend}.*position_attention"):
        ek.position_attention(torch.randn(6), values)


@pytest.mark.usefixtures("kernels")
def test_an_unknown_device_runs_in_eager_pytorch():
    values = [torch.empty(2, 5, 6, device="meta") for _ in range(2)]
    r = ek.position_attention(torch.empty(6, device="meta"), values)
    assert r.out.is_meta
    assert r.weights.shape == (2, 2, 5)
