"""As tests/ops/test_addresses.py, of the bindings of the CUDA kernels, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from support import native_calls
from support.freed import HEADS, a_map, a_row, make

import ela_kernels as ek
from ela_kernels.backends.cuda import attention as cuda

pytestmark = pytest.mark.usefixtures("kernels")


ROWS = [f"rows.{name}" for name in ("sums", "wq", "wk", "mean", "query", "key")]
ATTENTION = [f"attention.{name}" for name in ("query", "keys", "values", "prev", "weights")]
# The addresses that have to be there.
REQUIRED = {
    "cuda_weights": [path for path in ATTENTION if path != "attention.values"],
    "cuda_forward": [*ATTENTION, "out"],
    "cuda_backward": [*ATTENTION, "dscores", "workspace"],
    "cuda_gather": ["queries", "score_columns", "douts", "weight_columns"],
    "cuda_attend": [*ROWS, *ATTENTION, "out"],
    "cuda_norm_statistics": ["moments", "statistics"],
    "cuda_norm_forward": ["norm.statistics", "o", "x", "out"],
    "cuda_norm_backward": ["norm.statistics", "o", "dout", "gradient", "partial"],
    "cuda_producer_forward": ["x", "wv", "v", "sums"],
    "cuda_producer_backward": ["x", "wq", "wk", "wv", "mean", "workspace"],
}


@pytest.fixture
def recorded(kernels, monkeypatch):
    """The fullest call of each function, of steps of all forms."""
    extension, calls = native_calls.record(kernels, REQUIRED, monkeypatch)
    monkeypatch.setattr(cuda, "_kernels", lambda: extension)
    q, k, x = a_row(), a_row(), a_map()
    history = ek.LayerHistory()
    for _ in range(2):
        out = history.attend(q, k, x, heads=HEADS)
    (out.sum() + history.kl.sum()).backward()
    with torch.no_grad():
        ek.layer_attention_weights(q, [k, k], heads=HEADS, prev_weights=history.weights)
    _, call = make("block")
    call(x)
    call(x).sum().backward()
    assert calls.keys() == REQUIRED.keys()
    return calls


@pytest.mark.parametrize("function", REQUIRED)
def test_an_address_of_nothing(recorded, kernels, function):
    call = recorded[function]
    call.made_by(getattr(kernels, function))  # as it was, it runs
    for path in REQUIRED[function]:
        value = native_calls.value_at(kernels, call.named, path)
        assert value, path
        for new in native_calls.without_address(value):
            named = native_calls.changed(kernels, call.named, path, new)
            with pytest.raises(ValueError, match=r"no address|missing|needs?\b|needed|not that of"):
                getattr(kernels, function)(*call.places, **named)
