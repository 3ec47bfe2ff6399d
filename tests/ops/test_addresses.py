"""The compiled functions refuse an address of 0 of what they read or write: called directly, past all checks in Python.

Each is called as a step of training calls it, with one address after the other exchanged for 0.
"""

from __future__ import annotations

import pytest
import torch
from support import native_calls
from support.freed import CHANNELS, HEADS, a_map, a_row, make

import ela_kernels as ek
from ela_kernels.backends.cpp import attention as cpp

ATTENTION = [f"attention.{name}" for name in ("query", "keys", "values", "prev", "weights")]
OWN = [f"own.{path}" for path in (*ATTENTION, "dscores")]
NORM = [f"norm.{name}" for name in ("o", "x", "out", "mean", "variance")]
LIGHT = [
    f"layer.{name}"
    for name in ("x", "wq", "wk", "wv", "decay", "prev", "mean", "query", "key", "v", "factors")
]
STATISTICS = ["mean_out", "variance_out"]
INPUTS = ["x", "wq", "wk", "wv", "mean"]
# The addresses that have to be there.
REQUIRED = {
    "weights": [path for path in ATTENTION if path != "attention.values"],
    "forward": [*ATTENTION, "out"],
    "backward": [*ATTENTION, "dscores", "workspace"],
    "gather": ["sources"],
    "layer": [*INPUTS, *ATTENTION, "out", *STATISTICS, *NORM],
    "layer_backward": [*OWN, "arrived.sources", *INPUTS, *NORM],
    "light_layer": [*LIGHT, "out", *STATISTICS, *NORM, "workspace"],
    "light_layer_backward": [*LIGHT, "dout", *NORM, "workspace"],
}


@pytest.fixture
def recorded(kernels, monkeypatch):
    """The fullest call of each function, of steps of all forms; and what each source was made of."""
    extension, calls = native_calls.record(kernels, REQUIRED, monkeypatch)
    sources = {}

    def source(**fields):
        made = kernels.source(**fields)
        sources[made] = fields
        return made

    extension.source = source
    monkeypatch.setattr(cpp, "extension", lambda: extension)
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
    return calls, sources


def _light_block(layer):
    from ela_kernels.modules.drop_path import DropPath
    from ela_kernels.modules.residual import light_residual_block

    norm = torch.nn.BatchNorm2d(CHANNELS)
    return lambda x: light_residual_block(layer, norm, torch.nn.ReLU(), DropPath(0.0), x, x)[0]


@pytest.mark.parametrize("function", REQUIRED)
def test_an_address_of_nothing(recorded, kernels, function):
    calls, sources = recorded
    call = calls[function]
    call.made_by(getattr(kernels, function))  # as it was, it runs
    for path in REQUIRED[function]:
        value = native_calls.value_at(kernels, call.named, path)
        assert value, path
        if isinstance(value, bytes):
            size = len(kernels.source(**next(iter(sources.values()))))
            last = sources[value[-size:]]
            cleared = [
                value[:-size] + kernels.source(**last | {name: 0})
                for name in ("query", "scores", "weights")
            ]
        else:
            cleared = native_calls.without_address(value)
        for new in cleared:
            named = native_calls.changed(kernels, call.named, path, new)
            with pytest.raises(ValueError, match=r"no address|needs|or neither"):
                getattr(kernels, function)(*call.places, **named)


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
