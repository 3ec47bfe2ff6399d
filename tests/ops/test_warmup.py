"""Warming up runs every kind of call, and refuses what could not be a stage."""

from __future__ import annotations

import pytest
import torch
from support import backends

import ela_kernels as ek
from ela_kernels.backends import dispatch


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("training", [True, False])
def test_every_kernel_runs(ran, training):
    with ek.use_backend("cpp"):
        seconds = ek.warmup([(2, 8, 3, 5)], depth=2, head_dim=4, device="cpu", training=training)
    assert seconds > 0
    assert ran.count("cpp forward") == 2 * 3  # the history, and the function with and without kl
    assert ran.count("cpp weights") == 2 * 2
    assert ran.count("cpp backward") == (2 * 3 if training else 0)
    assert ran.count("cpp gather") == (2 if training else 0)
    # Two stages of layers, each after one that only provides, and two of blocks.
    assert ran.count("cpp layer") == 2 * (1 + 2)
    assert ran.count("cpp block") == 2 * 2
    assert ran.count("cpp layer backward") == (2 * (1 + 2 + 2) if training else 0)
    assert not [what for what in ran if what.startswith("eager")]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("training", [True, False])
def test_mixes_and_attention_at_every_position_run(monkeypatch, training):
    calls = backends.Cpp().spied(monkeypatch)
    with ek.use_backend("cpp"):
        ek.warmup([(2, 8, 3, 5)], depth=2, head_dim=4, device="cpu", training=training)
    assert calls.count("mix") == 2 * 3  # a weight for each map, head and channel
    assert calls.count("mix_backward") == (2 * 3 if training else 0)
    # The history, and the function with and without previous weights.
    assert calls.count("position_attend") == 2 * 3
    assert calls.count("position_attend_backward") == (2 * 3 if training else 0)
    assert calls.count("position_gather") == (2 if training else 0)


def test_a_forced_backend_without_them_is_no_obstacle(monkeypatch):
    cpp = dispatch.KERNELS["cpp"]
    monkeypatch.setattr(type(cpp), "ops", cpp.ops - {"depth_mix", "position_attention"})
    monkeypatch.setattr(dispatch, "_plan", dispatch._plan.__wrapped__)  # choices are remembered
    calls = backends.Cpp().spied(monkeypatch)
    with ek.use_backend("cpp"):
        ek.warmup([(2, 8, 3, 5)], depth=1, head_dim=4, device="cpu")
    assert "layer" in calls
    assert not [call for call in calls if call.startswith(("mix", "position"))]


@pytest.mark.usefixtures("backend")
def test_layouts_and_dtypes():
    for dtype in (torch.float32, torch.bfloat16):
        ek.warmup([(2, 8, 3, 5)], 2, 4, dtype, memory_format=torch.channels_last, device="cpu")
        ek.warmup([(2, 7, 8)], 2, 8, dtype, channels_last=True, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth: got 0"),
        ({"head_dim": 5}, "head_dim: got 5; allowed is a divisor of the 8 channels"),
        ({"shapes": [(8,)]}, r"shapes: got \(8,\)"),
        ({"tolerance": 1.5}, "tolerance: got 1.5"),
    ],
)
def test_refusals(change, message):
    arguments = {"shapes": [(2, 8, 3, 5)], "depth": 2, "head_dim": 4, "device": "cpu"} | change
    with pytest.raises(ValueError, match=message):
        ek.warmup(**arguments)


def test_gradients_and_mode_are_left_as_they_were():
    with torch.no_grad():
        ek.warmup([(2, 8, 3, 5)], 1, 4, device="cpu")
        assert not torch.is_grad_enabled()
