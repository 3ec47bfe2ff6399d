"""What a stage holds without gradients: what its later layers need, and nothing once its history is gone."""

from __future__ import annotations

import weakref

import pytest
import torch
from support.layer_stages import make_blocks, make_light_blocks, make_stage, run_blocks, run_stage
from torch.profiler import ProfilerActivity, profile

from ela_kernels.backends.extension import extension
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

DEPTH = 6


def light(blocks, x):
    previous = PreviousOutput()
    for block in blocks:
        x = block(x, previous)
    return [x], previous


def allocated(run):
    """What `run` gives, and bytes: the most that were allocated at once, and those that are left with it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    left = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            left += event.nbytes()
            most = max(most, left)
    return result, most, left


@pytest.mark.parametrize(
    ("make", "run", "held"),
    [
        # Values, the last output, and one that is being written; weights and queries are small.
        (make_stage, lambda m, x: run_stage(m, x), DEPTH),
        (make_blocks, lambda m, x: run_blocks(m, x), DEPTH),
        # The last light output, and value, output and block of the next.
        (make_light_blocks, light, 1),
    ],
    ids=["layers", "blocks", "light blocks"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_held(make, run, held, mode):
    modules, x = make((2, 32, 24, 24), DEPTH, 8, dtype=torch.float32)
    modules.eval()
    x = x.detach()
    size = x.numel() * x.element_size()

    def stage(keeps):
        with mode():
            outs, shared = run(modules, x)
            return (outs[-1], shared) if keeps else (outs[-1], None)

    stage(False)  # what is made once
    for keeps, maps in ((True, held + 1), (False, 1)):
        result, most, left = allocated(lambda keeps=keeps: stage(keeps))
        # The outputs of run_stage() and run_blocks() are held by them: another map for each layer.
        lists = 0 if make is make_light_blocks else DEPTH
        assert most <= (held + 4.5 + lists) * size, most / size
        assert maps * size <= left <= (maps + 0.5) * size, left / size
        del result


@pytest.mark.parametrize("make", [make_stage, make_blocks])
def test_values_go_with_the_history(make):
    modules, x = make((2, 6, 4, 5), 3, 3)
    run = run_stage if make is make_stage else run_blocks
    with torch.inference_mode():
        outs, history = run(modules.eval(), x)
        held = [weakref.ref(t) for t in (*history.values, *history.keys, history.weights)]
    del history
    assert all(r() is None for r in held)
    assert not outs[-1].isnan().any()
