"""As test_addresses.py, of the bindings of the CUDA kernels, run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from support.freed import HEADS, a_map, a_row, make

import ela_kernels as ek
from ela_kernels.backends.cuda import attention as cuda


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    with cuda_on_cpu.kernels_on_cpu() as module:
        yield module


# The place of each address that has to be there. Lists, maps and parameters begin with theirs.
REQUIRED = {
    "cuda_weights": {"query": 5, "keys": 7, "prev": 9, "weights": 11},
    "cuda_forward": {"query": 5, "keys": 7, "values": 9, "prev": 11, "weights": 13, "out": 15},
    "cuda_backward": {"query": 5, "keys": 7, "values": 9, "prev": 11, "weights": 13}
    | {"dscores": 17, "workspace": 23},
    "cuda_gather": {"queries": 4, "scores": 6, "douts": 9, "weights": 11},
    "cuda_attend": {"rows": 5, "keys": 6, "values": 8, "prev": 11, "weights": 13, "out": 15},
    "cuda_norm_statistics": {"moments": 4, "statistics": 5},
    "cuda_norm_forward": {"norm": 4, "o": 5, "x": 6, "out": 7},
    "cuda_norm_backward": {"norm": 4, "o": 5, "dout": 6, "gradient": 8, "partial": 11},
    "cuda_producer_forward": {"x": 4, "wv": 5, "v": 6, "sums": 7},
    "cuda_producer_backward": {"x": 6, "wq": 8, "wk": 9, "wv": 10, "mean": 13, "workspace": 18},
}


@pytest.fixture
def recorded(kernels, monkeypatch):
    """The fullest call of each function, of steps of all forms; the tensors behind the addresses live on."""
    calls, alive = {}, []

    def recorder(name):
        def call(*arguments):
            if sum(map(bool, arguments)) >= sum(map(bool, calls.get(name, ()))):
                calls[name] = arguments
            return getattr(kernels, name)(*arguments)

        return call

    everything = {n: getattr(kernels, n) for n in dir(kernels) if not n.startswith("_")}
    recording = {name: recorder(name) for name in REQUIRED}
    monkeypatch.setattr(cuda, "_kernels", lambda: SimpleNamespace(**everything | recording))
    real = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: (alive.append(t), real(t))[1])
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


def _cleared(value):
    """A value with its address, or its addresses one after the other, exchanged for 0."""
    if isinstance(value, list):
        for i in range(len(value)):
            yield [*value[:i], 0, *value[i + 1 :]]
    elif isinstance(value, tuple) and isinstance(value[0], tuple):  # rows
        sums, query, key, size, made = value
        yield ((0, sums[1]), query, key, size, made)
        yield (sums, (0, query[1]), key, size, made)
        yield (sums, query, (0, key[1]), size, made)
        for i in range(3):
            yield (sums, query, key, size, (*made[:i], 0, *made[i + 1 :]))
    elif isinstance(value, tuple):
        yield (0, *value[1:])
    else:
        yield 0


@pytest.mark.parametrize("function", REQUIRED)
def test_an_address_of_nothing(recorded, kernels, function):
    arguments = recorded[function]
    getattr(kernels, function)(*arguments)  # as it was, it runs
    for name, place in REQUIRED[function].items():
        assert arguments[place], name
        for changed in _cleared(arguments[place]):
            with pytest.raises(ValueError, match=r"no address|missing|needs?\b|needed"):
                getattr(kernels, function)(*arguments[:place], changed, *arguments[place + 1 :])
