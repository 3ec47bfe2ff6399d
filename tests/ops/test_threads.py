"""Threads that use the package at once, and processes forked from one that used it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ela_kernels as ek
from ela_kernels.backends import dispatch, extension, setting
from ela_kernels.backends.types import Filters
from ela_kernels.ops.layer_attention.plan import LayerPlan

STRESS = Path(__file__).resolve().parents[1] / "support" / "thread_stress.py"


def run_program(*arguments: str) -> None:
    """A program that has to end well: memory that was written past its end shows as the exit code of a crash."""
    package = str(Path(ek.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    assert done.stdout.splitlines()[-1] == "equal"


def at_once(work: Callable[[], Any], count: int = 4) -> list[Any]:
    """What `work` gives in each of `count` threads that start it at the same time."""
    start, found = threading.Barrier(count), []

    def run() -> None:
        start.wait()
        found.append(work())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    return found


@pytest.mark.usefixtures("kernels")
def test_new_shapes_in_four_threads() -> None:
    run_program(str(STRESS), "40")


def test_new_shapes_in_four_threads_in_eager() -> None:
    run_program(str(STRESS), "10", "--backend", "eager", "--forms", "op", "history", "block")


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "arguments",
    [("1000",), ("300", "--openmp", "2", "--side", "20"), ("1000", "--forms", "inference")],
    ids=["small", "openmp", "inference"],
)
def test_many_new_shapes(arguments: tuple[str, ...]) -> None:
    run_program(str(STRESS), *arguments)


@pytest.mark.usefixtures("kernels")
def test_what_a_plan_makes_later_is_right_whoever_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may run wherever a tensor is made: here it does, and asks for other depths."""
    from ela_kernels.backends.cpp import layer as cpp_layer

    plan = cpp_layer.Plan(torch.empty(2, 8, 3, 5, device="meta"), 2, 3, torch.float32)
    empty, others = torch.empty, [3, 1, 6]

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        while others:
            assert plan.new_weights(others.pop()).shape[2] in (1, 3, 6)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", interrupted)
    for depth in (1, 2, 3, 4, 5, 6, 7):
        assert plan.new_weights(depth).shape == (2, 2, depth)


def test_blocks_of_threads_that_end_in_another_order() -> None:
    ek.use_backend("auto")
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with ek.use_backend("eager"):
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_in.wait(60)
    assert dispatch.current_setting() == "eager"  # it holds in every thread
    with ek.use_backend("cpp"):
        second_in.set()
        assert first_out.wait(60)
        assert dispatch.current_setting() == "cpp"
    thread.join()
    assert dispatch.current_setting() == "auto"


def test_a_setting_for_good_by_another_thread_outlives_the_block() -> None:
    ek.use_backend("auto")
    with ek.use_backend("cpp"):
        thread = threading.Thread(target=ek.use_backend, args=("eager",))
        thread.start()
        thread.join()
        assert dispatch.current_setting() == "eager"
    assert dispatch.current_setting() == "eager"


def test_settings_in_blocks_and_for_good() -> None:
    ek.use_backend("cpp")
    block = ek.use_backend("auto")
    for _ in range(2):  # one object serves for two blocks
        with block:
            assert dispatch.current_setting() == "auto"
            ek.use_backend("eager")
            assert dispatch.current_setting() == "eager"
        assert dispatch.current_setting() == "cpp"
    count = len(setting._calls)
    for _ in range(10):
        ek.use_backend("eager")
    assert len(setting._calls) <= count + 2
    assert dispatch.current_setting() == "eager"


@pytest.mark.usefixtures("kernels")
def test_a_setting_that_changes_within_a_layer() -> None:
    """Another thread may set a backend after a layer has asked who serves it."""
    x = torch.randn(2, 8, 4, 5)
    filters = Filters(torch.randn(1, 1, 3), torch.randn(1, 1, 3), torch.randn(8, 1, 3, 3))
    first, history = ek.LayerHistory(), ek.LayerHistory()
    expected = first.attend_layer(x, first.plan_layer(x, filters), heads=2)
    with ek.use_backend("auto"):
        plan = history.plan_layer(x, filters)
        assert isinstance(plan, LayerPlan)
        with ek.use_backend("eager"):
            assert torch.equal(history.attend_layer(x, plan, heads=2), expected)
            assert isinstance(history.plan_layer(x, filters), dispatch.Refusal)


def test_a_fallback_is_said_once_by_all_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extension, "extension", lambda: None)
    monkeypatch.setattr(extension, "extension_problem", lambda: "there is no compiler here")
    warning, said = dispatch.logger.warning, []

    def slow(*args: Any) -> None:
        said.append(args)
        threading.Event().wait(0.2)  # the others come meanwhile
        warning(*args)

    monkeypatch.setattr(dispatch.logger, "warning", slow)
    q, v = torch.randn(2, 6), torch.randn(2, 6, 4)
    dispatch._plan.cache_clear()
    dispatch._fallbacks.clear()
    try:
        with ek.use_backend("auto"), caplog.at_level(logging.WARNING, "ela_kernels"):
            at_once(lambda: ek.layer_attention(q, [q], [v], 2))
    finally:
        dispatch._plan.cache_clear()
        dispatch._fallbacks.clear()
    assert len(said) == 1


FORK = """
import os, signal, torch, ela_kernels as ek

torch.set_num_threads(2)
torch.manual_seed(0)
layers = torch.nn.ModuleList(ek.ELA(64, 16) for _ in range(12)).eval()
light = ek.LightLayerAttention(64, 16)
x = torch.randn(2, 64, 8, 8, requires_grad=True)  # small for PyTorch's own operations, which use one thread

def use():
    history, y = ek.LayerHistory(), x
    for layer in layers:
        y = layer(y, history)
    y = light(y, x)
    q = y.mean((2, 3))
    r = ek.layer_attention(q, [q] * 12, [y] * 12, 4)
    return [r.out, r.weights, *torch.autograd.grad(r.out.square().mean(), [x, *light.parameters()])]

expected = use()
pid = os.fork()
if pid == 0:
    os._exit(0 if all(map(torch.equal, use(), expected)) else 3)
def give_up(*_):
    os.kill(pid, signal.SIGKILL)
signal.signal(signal.SIGALRM, give_up)
signal.alarm(60)
code = os.waitpid(pid, 0)[1]
assert code == 0, f"the child ended with {code}"
assert all(map(torch.equal, use(), expected))
print("equal")
"""


@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forked_from_one_that_used_threads() -> None:
    """OpenMP's threads do not come along: the child must not wait for them."""
    run_program("-c", FORK)
