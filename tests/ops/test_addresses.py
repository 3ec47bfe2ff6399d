"""The compiled functions refuse an address of 0 of what they read or write: called directly, past all checks in Python.

Each is called as a step of training calls it, with one address after the other exchanged for 0.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
import torch
from support.freed import CHANNELS, HEADS, a_map, a_row, make

import ela_kernels as ek
from ela_kernels.backends.cpp import attention as cpp

# The place of each address that has to be there, by the names of csrc/binding. Lists and maps begin with theirs.
REQUIRED = {
    "weights": {"query": 3, "keys": 5, "prev": 7, "weights": 9},
    "forward": {"query": 3, "keys": 5, "values": 7, "prev": 9, "weights": 11, "out": 13},
    "backward": {"query": 3, "keys": 5, "values": 7, "prev": 9, "weights": 11, "dscores": 15}
    | {"workspace": 21},
    "gather": {"sources": 2},
    "layer": {"x": 2, "wq": 3, "wk": 4, "wv": 5, "mean": 6, "query": 7, "keys": 8, "values": 10}
    | {"prev": 12, "weights": 14, "out": 16, "mean_out": 18, "variance_out": 19, "norm": 20},
    "layer_backward": {"query": 4, "keys": 5, "values": 7, "prev": 9, "weights": 11}
    | {"dscores": 15, "x": 17, "wq": 18, "wk": 19, "wv": 20, "mean": 21, "sources": 22, "norm": 32},
    "light_layer": {"x": 4, "wq": 5, "wk": 6, "wv": 8, "decay": 9, "prev": 10, "mean": 11}
    | {"query": 12, "key": 13, "v": 14, "factors": 15, "out": 16, "mean_out": 17}
    | {"variance_out": 18, "norm": 19, "workspace": 20},
    "light_layer_backward": {"x": 4, "wq": 5, "wk": 6, "wv": 8, "decay": 9, "prev": 10, "mean": 11}
    | {"query": 12, "key": 13, "v": 14, "factors": 15, "dout": 16, "norm": 24, "workspace": 26},
}
SOURCES = struct.Struct("8q")  # struct Source: query, scores and weights are its numbers 0, 2 and 7


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

    recording = {name: recorder(name) for name in REQUIRED}
    everything = {n: getattr(kernels, n) for n in dir(kernels) if not n.startswith("_")}
    extension = SimpleNamespace(**everything | recording)
    monkeypatch.setattr(cpp, "extension", lambda: extension)
    real = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: (alive.append(t), real(t))[1])
    q, k, x = a_row(), a_row(), a_map()
    history = ek.LayerHistory()
    for _ in range(2):
        out = history.attend(q, k, x, heads=HEADS)
    (out.sum() + history.kl.sum()).backward()
    with torch.no_grad():
        ek.layer_attention_weights(q, [k, k], heads=HEADS, prev_weights=history.weights)
    for kind in ("block", "light"):
        module, call = make(kind)
        call(x)
        if kind == "light":
            blocks = _light_block(module)
            blocks(x).sum().backward()
        else:
            call(x).sum().backward()
    assert calls.keys() == REQUIRED.keys()
    return calls


def _light_block(layer):
    from ela_kernels.modules.drop_path import DropPath
    from ela_kernels.modules.residual import light_residual_block

    norm = torch.nn.BatchNorm2d(CHANNELS)
    return lambda x: light_residual_block(layer, norm, torch.nn.ReLU(), DropPath(0.0), x, x)[0]


def _cleared(value):
    """A value with its address, or its addresses one after the other, exchanged for 0."""
    if isinstance(value, bytes):
        numbers = [list(source) for source in SOURCES.iter_unpack(value)]
        for where in (0, 2, 7):
            changed = [source.copy() for source in numbers]
            changed[-1][where] = 0
            yield b"".join(SOURCES.pack(*source) for source in changed)
    elif isinstance(value, list):
        for i in range(len(value)):
            yield [*value[:i], 0, *value[i + 1 :]]
    elif isinstance(value, tuple) and len(value) == 3:
        yield (0, *value[1:])
    elif isinstance(value, tuple):  # what follows in a block
        maps, pointers, *rest = value
        for i in range(3):
            yield ((*maps[:i], (0, 0, 0), *maps[i + 1 :]), pointers, *rest)
        for i in (0, 1, 7):
            yield (maps, (*pointers[:i], 0, *pointers[i + 1 :]), *rest)
    else:
        yield 0


@pytest.mark.parametrize("function", REQUIRED)
def test_an_address_of_nothing(recorded, kernels, function):
    arguments = recorded[function]
    getattr(kernels, function)(*arguments)  # as it was, it runs
    for name, place in REQUIRED[function].items():
        assert arguments[place], name
        for changed in _cleared(arguments[place]):
            with pytest.raises(ValueError, match=r"no address|needs|or neither"):
                getattr(kernels, function)(*arguments[:place], changed, *arguments[place + 1 :])


def test_what_is_empty_has_no_address(kernels):
    """Nor does it need one."""
    r = ek.layer_attention(
        torch.randn(0, CHANNELS), [torch.randn(0, CHANNELS)], [torch.randn(0, CHANNELS, 2)], HEADS
    )
    assert r.out.shape == (0, CHANNELS, 2)
    no_positions = torch.randn(2, CHANNELS, 0, requires_grad=True)
    r = ek.layer_attention(a_row(), [a_row()], [no_positions], HEADS)
    r.weights.sum().backward()
    assert r.out.shape == no_positions.shape
