"""Launches on the stream and device in force, no waiting on the host, and replay from a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from support.cases import evaluate, make_case
from support.layouts import channels_last, contiguous
from support.on_gpu import DEVICE, case_on, same_bits
from support.oracle import assert_matches

import ela_kernels as ek

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_only", "backend")]

# Half a second at 2 GHz: whoever does not wait for it reads what was there before.
_LONG = 1_000_000_000


def tensors_of(case):
    return [
        x
        for x in (
            case.q,
            *case.keys,
            *case.values,
            case.prev_weights,
            case.dout,
            case.dweights,
            case.dkl,
        )
        if x is not None
    ]


def stage_step(leaves, douts, heads):
    """Forward and backward of a whole stage with a LayerHistory; outputs, divergence, gradients."""
    depth = len(douts)
    history, outs = ek.LayerHistory(), []
    for q, k, v in zip(leaves[:depth], leaves[depth : 2 * depth], leaves[2 * depth :], strict=True):
        outs.append(history.attend(q, k, v, heads=heads))
    grads = torch.autograd.grad(outs, leaves, douts, allow_unused=True)
    return [*(o.detach() for o in outs), history.kl.detach(), *(g for g in grads if g is not None)]


def make_leaves(depth=5, dtype=torch.float32, memory_format=torch.contiguous_format):
    shape = (4, 32, 14, 14)

    def rows():
        return torch.randn(shape[:2], device=DEVICE).to(dtype)

    def maps():
        return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=memory_format)

    leaves = [rows() for _ in range(2 * depth)] + [maps() for _ in range(depth)]
    return [x.requires_grad_() for x in leaves], [maps() for _ in range(depth)]


def refill(tensors):
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stage_replays_from_a_graph_with_changed_inputs(dtype, memory_format):
    leaves, douts = make_leaves(dtype=dtype, memory_format=memory_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            stage_step(leaves, douts, 2)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stage_step(leaves, douts, 2)
    for _ in range(3):
        refill([*leaves, *douts])
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        expected = stage_step(leaves, douts, 2)
        for a, b in zip(captured, expected, strict=True):
            assert not b.isnan().any()
            assert same_bits(a, b)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_the_functional_form_and_the_weights_replay_from_a_graph(layout):
    case = case_on(make_case((3, 12, 5, 7), 4, 3, torch.float32, layout))

    def run():
        found = evaluate(case)
        only = ek.layer_attention_weights(case.q, case.keys, 3, prev_weights=case.prev_weights)
        return [*found.values(), only.weights, only.kl]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    refill([case.q, *case.keys, *case.values, case.dout, case.dweights, case.dkl])
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert same_bits(a, b)


def test_kernels_run_on_the_current_stream():
    """The inputs are made late on a side stream: a kernel on any other stream would read what was there before."""
    case = make_case((3, 12, 5, 7), 4, 3)
    expected = case_on(case)
    there = case_on(make_case((3, 12, 5, 7), 4, 3))
    evaluate(there)  # compiles and loads, which may wait for the device
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(_LONG)
        for x, fresh in zip(tensors_of(there), tensors_of(expected), strict=True):
            x.copy_(fresh)
        found = evaluate(there)
        event = side.record_event()
    assert not event.query(), "the host waited for the device"
    event.synchronize()
    assert_matches({name: x.cpu() for name, x in found.items()}, case)


def test_the_backward_of_a_stage_runs_on_the_stream_of_its_forward():
    leaves, douts = make_leaves()
    stage_step(leaves, douts, 2)
    fresh = [torch.randn_like(x) for x in leaves]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(_LONG)
        with torch.no_grad():
            for x, new in zip(leaves, fresh, strict=True):
                x.copy_(new)
        found = stage_step(leaves, douts, 2)
    side.synchronize()
    torch.cuda.synchronize()
    for a, b in zip(found, stage_step(leaves, douts, 2), strict=True):
        assert same_bits(a, b)


def test_memory_freed_on_a_side_stream_is_not_given_away_early():
    """Workspaces and copies die with the call: the allocator must know them as the stream's own."""
    leaves, douts = make_leaves()
    expected = stage_step(leaves, douts, 2)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(_LONG)
        found = stage_step(leaves, douts, 2)
    noise = [torch.full((4, 32, 14, 14), float("nan"), device=DEVICE) for _ in range(50)]
    side.synchronize()
    assert noise[0].isnan().all()
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_step_never_waits_for_the_device(memory_format):
    leaves, douts = make_leaves(memory_format=memory_format)
    case = case_on(make_case((3, 12, 5, 7), 4, 3))
    stage_step(leaves, douts, 2)
    evaluate(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage_step(leaves, douts, 2)
        evaluate(case)
        ek.layer_attention_weights(case.q, case.keys, 3, prev_weights=case.prev_weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forms_that_are_copied_do_not_wait_either():
    maps = [torch.randn(2, 12, 6, 8, device=DEVICE) for _ in range(3)]
    maps[1] = maps[1].contiguous(memory_format=torch.channels_last)
    maps[2] = torch.randn(2, 12, 6, 16, device=DEVICE)[..., ::2]
    rows = torch.randn(2, 24, device=DEVICE)[:, ::2]

    def run():
        return ek.layer_attention(rows, [rows] * 3, maps, 3).out

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_of_the_tensors_and_not_the_current_one_is_used():
    case = make_case((3, 12, 5, 7), 4, 3)
    assert torch.cuda.current_device() == 0
    on_second, on_first = case_on(case, torch.device("cuda:1")), case_on(case)
    for there in (on_second, on_first, on_second):
        found = evaluate(there)
        assert all(x.device == there.q.device for x in found.values())
        assert_matches({name: x.cpu() for name, x in found.items()}, case)
        assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices_at_once():
    stages = [make_leaves() for _ in range(2)]
    moved = [
        [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in xs] for xs in stages[1]
    ]
    here, there = stage_step(*stages[0], 2), stage_step(*moved, 2)
    expected = stage_step(*stages[1], 2)
    assert len(here) == len(there)
    for a, b in zip(there, expected, strict=True):
        assert same_bits(a.cpu(), b.cpu())
