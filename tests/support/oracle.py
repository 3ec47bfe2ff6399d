"""Layer attention written once more, from its formulas and in float64: what both backends are held to.

It shares no code with the package, so that a mistake in the package's own reference shows.
"""

from __future__ import annotations

from math import prod

import torch
from support.cases import Case
from support.gradients import assert_within, largest
from torch import Tensor


def oracle(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of `case` in float64, named as :func:`support.cases.evaluate` names them."""
    inputs = {name: x.detach().double().requires_grad_() for name, x in case.inputs().items()}
    q, prev = inputs["q"], inputs.get("prev_weights")
    keys = [inputs[f"keys[{j}]"] for j in range(len(case.keys))]
    values = [inputs[f"values[{j}]"] for j in range(len(case.values))]
    B, C = q.shape
    G, T = case.heads, len(keys)
    scale = (C // G) ** -0.5 if case.scale is None else case.scale
    k = torch.stack(keys, 1).reshape(B, T, G, C // G)
    scores = scale * (q.reshape(B, 1, G, C // G) * k).sum(-1).transpose(1, 2)  # [B, G, T]
    weights = scores.softmax(-1)
    kl = None
    if prev is not None:
        shared = scores.log_softmax(-1)[..., : prev.shape[-1]]
        zero = prev == 0
        positive = torch.where(zero, 1.0, prev)
        kl = torch.where(zero, 0.0, positive * (positive.log() - shared)).sum(-1)
    v = torch.stack(values, 1)  # [B, T, C, *spatial] or [B, T, *spatial, C]
    if case.channels_last:
        v = v.movedim(-1, 2)
    # What is left out is a constant zero.
    added = torch.where(weights.detach() < case.tolerance, 0.0, weights)
    out = torch.einsum("bgt,btgdn->bgdn", added, v.reshape(B, T, G, C // G, prod(v.shape[3:])))
    out = out.reshape(B, C, *v.shape[3:])
    if case.channels_last:
        out = out.movedim(1, -1)
    found = {"out": out, "weights": weights} | ({} if kl is None else {"kl": kl})
    return case.with_gradients(found, inputs)


def tolerances(case: Case) -> dict[str, float]:
    """Largest absolute difference from the oracle that rounding in the accumulation type explains, for every name.

    With unit roundoff u, a sum of n terms of either sign and root mean square r has partial sums of about r sqrt(n)
    and so an error of about u r n when summed one after the other; less in lanes and blocks. What is allowed is:

    - a score, a sum of D terms: u times the sum of their absolute values, which also covers its rounding in the
      exponential. It moves a weight by a factor, and so does the sum over T: `factor`, twice these, bounds the
      relative error of a weight, and of all that is proportional to one;
    - `<dout, v_j>` of a head, n = D times the number of positions: `dots_error`. A score's gradient is
      w_j (d_j - sum_i w_i d_i), so it takes that error twice, and that of the weights times the largest d;
      the weights of a head sum to 1, so the query's gradient takes it no more often than one key's;
    - the divergence and the gradient of the previous weights are sums of logarithms, each as exact as the scores.
    """
    u = torch.finfo(torch.float64 if case.q.dtype == torch.float64 else torch.float32).eps / 2
    B, C = case.q.shape
    G, T = case.heads, len(case.keys)
    D = C // G
    scale = abs(D**-0.5 if case.scale is None else case.scale)
    q, k_max, v_max = case.q.double(), largest(case.keys), largest(case.values)
    products = [(q * k.double()).abs().reshape(B, G, D).sum(-1) for k in case.keys]
    scores = scale * largest(products)
    factor = 2 * u * (T**0.5 + 1 + scores)
    dots = dots_error = 0.0
    if case.dout is not None:
        channel = -1 if case.channels_last else 1
        for v in case.values:
            product = (
                (case.dout.double() * v.double())
                .movedim(channel, 1)
                .reshape(B, G, -1 if v.numel() else 0)
            )
            dots = max(dots, largest([product.sum(-1)]))
            n = product.shape[-1]
            rms = product.square().mean().sqrt().item() if product.numel() else 0.0
            dots_error = max(dots_error, u * rms * n)
    dots += largest([case.dweights])
    logs, dkl = 1 + scores, 0.0
    if case.prev_weights is not None:
        prev = case.prev_weights[case.prev_weights != 0].double()
        logs += largest([prev.log()])
        dkl = largest([case.dkl])
    dscore = 2 * dots_error + 4 * factor * (dots + dkl)
    allowed = {
        "out": factor * v_max,
        "weights": factor,
        "kl": factor * logs,
        "d q": dscore * scale * k_max,
        "d prev_weights": dkl * factor * logs,
    }
    for j in range(T):
        allowed[f"d keys[{j}]"] = dscore * scale * largest([q])
        allowed[f"d values[{j}]"] = factor * largest([case.dout])
    return allowed


def assert_matches(
    found: dict[str, Tensor], case: Case, expected: dict[str, Tensor] | None = None
) -> None:
    """Every output and gradient in `found` equals the oracle's within :func:`tolerances`."""
    expected = oracle(case) if expected is None else expected
    assert_within(found, expected, tolerances(case), case)
