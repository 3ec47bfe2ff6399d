"""Makes position_attention.npz: the formulas in NumPy and float64, and their gradients by a chain rule of its own.

python tests/golden/make_position_attention.py. It imports nothing of the package and no PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

DEPTH, BATCH, POSITIONS, CHANNELS, PREV = 4, 2, 5, 7, 3
EPS, SCALE = 1e-5, 0.8


def one_position(v, k, q, p, normed, dout, dweights, dkl):
    """Of one position: T values, T keys, a query that holds the norm weight; outputs and gradients."""
    root = [np.sqrt(np.mean(x * x) + EPS) if normed else 1.0 for x in k]
    s = np.array([SCALE * np.sum(q * x) / r for x, r in zip(k, root, strict=True)])
    e = np.exp(s - s.max())
    w = e / e.sum()
    out = sum(a * x for a, x in zip(w, v, strict=True))
    log_w = s - s.max() - np.log(e.sum())
    kl = sum(a * (np.log(a) - b) for a, b in zip(p, log_w[: len(p)], strict=True))
    # d loss / d w, then the Jacobian of the softmax written out.
    dw = np.array([np.sum(dout * x) for x in v]) + dweights
    jacobian = np.diag(w) - np.outer(w, w)
    padded = np.concatenate([p, np.zeros(len(s) - len(p))])
    ds = jacobian @ dw - dkl * (padded - padded.sum() * w)
    dv = [a * dout for a in w]
    dq, dk = np.zeros_like(q), []
    for t, (x, r) in enumerate(zip(k, root, strict=True)):
        dq += ds[t] * SCALE * x / r
        # Jacobian of x / sqrt(mean(x^2) + eps), written out.
        of_key = np.eye(len(x)) / r - (np.outer(x, x) / (len(x) * r**3) if normed else 0)
        dk.append(ds[t] * SCALE * (of_key @ q))
    return out, w, kl, dq, dv, dk


def main():
    random = np.random.default_rng(20260329)
    shape = (BATCH, POSITIONS, CHANNELS)
    data = {
        "depth": np.array(DEPTH),
        "eps": np.array(EPS),
        "scale": np.array(SCALE),
        "query": random.standard_normal(CHANNELS),
        "norm_weight": 1 + random.standard_normal(CHANNELS) / 4,
        "dout": random.standard_normal(shape),
        "dweights": random.standard_normal((BATCH, DEPTH, POSITIONS)),
        "dkl": random.standard_normal((BATCH, POSITIONS)),
    }
    for t in range(DEPTH):
        data[f"v{t}"] = random.standard_normal(shape)
        data[f"k{t}"] = random.standard_normal(shape)
    prev = np.exp(random.standard_normal((BATCH, PREV, POSITIONS)))
    data["prev"] = prev / prev.sum(1, keepdims=True)
    for kind, normed in (("own", True), ("given", False)):
        out = np.zeros(shape)
        weights, kl = np.zeros((BATCH, DEPTH, POSITIONS)), np.zeros((BATCH, POSITIONS))
        dquery = np.zeros(CHANNELS)
        dv, dk = np.zeros((DEPTH, *shape)), np.zeros((DEPTH, *shape))
        factor = data["norm_weight"] if kind == "own" else np.ones(CHANNELS)
        for b in range(BATCH):
            for n in range(POSITIONS):
                v = [data[f"v{t}"][b, n] for t in range(DEPTH)]
                k = v if kind == "own" else [data[f"k{t}"][b, n] for t in range(DEPTH)]
                found = one_position(
                    v,
                    k,
                    data["query"] * factor,
                    data["prev"][b, :, n],
                    normed,
                    data["dout"][b, n],
                    data["dweights"][b, :, n],
                    data["dkl"][b, n],
                )
                out[b, n], weights[b, :, n], kl[b, n] = found[:3]
                dquery += found[3] * factor
                for t in range(DEPTH):
                    dv[t, b, n] += found[4][t]
                    if kind == "own":
                        dv[t, b, n] += found[5][t]
                    else:
                        dk[t, b, n] = found[5][t]
        data |= {f"{kind}_out": out, f"{kind}_weights": weights, f"{kind}_kl": kl}
        data[f"{kind}_d_query"] = dquery
        for t in range(DEPTH):
            data[f"{kind}_d_v{t}"] = dv[t]
            if kind == "given":
                data[f"{kind}_d_k{t}"] = dk[t]
    np.savez_compressed(Path(__file__).with_name("position_attention.npz"), **data)


if __name__ == "__main__":
    main()
