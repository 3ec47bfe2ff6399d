"""What a forward or a backward pass leaves when it fails, or never runs: nothing, once the caller lets go of it.

By counting references alone, as plain PyTorch frees a graph: the garbage collector is off, and could not see a cycle
through the nodes of a graph in any case.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from support import stage_forms
from support.stage_forms import maps
from torch.utils.checkpoint import checkpoint

FORMS = list(stage_forms.STAGES)

pytestmark = pytest.mark.usefixtures("backend", "no_collector")


class Failed(BaseException):
    """Not an Exception, as an interrupt is none."""


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def fail(*_):
    raise Failed


def watch(tensors):
    """Tells whether any of the memory of `tensors` is there."""
    kept = [weakref.ref(t.untyped_storage()) for t in tensors]
    assert kept
    return lambda: any(r() is not None for r in kept)


def fails(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Failed:
        return
    pytest.fail("did not fail")


def in_a_thread(function, *args, **kwargs):
    thread = threading.Thread(target=fails, args=(function, *args), kwargs=kwargs)
    thread.start()
    thread.join()


def failed_in_a_hook(outs, inputs):
    outs[1].register_hook(fail)
    fails(outs[-1].sum().backward)


def failed_with_the_graph_retained(outs, inputs):
    outs[1].register_hook(fail)
    fails(outs[-1].sum().backward, retain_graph=True)


def failed_behind_a_layer(outs, inputs):
    outs[1].grad_fn.register_hook(fail)
    fails(outs[-1].sum().backward)


def failed_in_a_part(outs, inputs):
    outs[2].register_hook(fail)
    fails(torch.autograd.grad, outs[-1].sum(), inputs, allow_unused=True)


def failed_in_a_thread(outs, inputs):
    outs[1].register_hook(fail)
    in_a_thread(outs[-1].sum().backward)


def failed_within_another_pass(outs, inputs):
    outs[1].register_hook(fail)
    loss = outs[-1].sum()
    outer = torch.ones((), requires_grad=True) * 2
    outer.register_hook(lambda _: fails(loss.backward))
    outer.backward()


def a_part_of_it(outs, inputs):
    torch.autograd.grad(outs[-1].sum(), outs[1], retain_graph=True)


def retained(outs, inputs):
    outs[-1].sum().backward(retain_graph=True)


def never_run(outs, inputs):
    pass


PASSES = [
    failed_in_a_hook,
    failed_with_the_graph_retained,
    failed_behind_a_layer,
    failed_in_a_part,
    failed_in_a_thread,
    failed_within_another_pass,
    a_part_of_it,
    retained,
    never_run,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backward", PASSES, ids=lambda f: f.__name__)
def test_all_of_a_stage_goes_with_its_graph(form, backward):
    modules, x = stage_forms.make(form)
    outs, shared = stage_forms.run(form, modules, x)
    is_there = watch(maps(outs, shared))
    backward(outs, [x, *modules.parameters()])
    assert is_there()
    del outs, shared
    assert not is_there()


@pytest.mark.parametrize("form", FORMS)
def test_a_failed_forward_leaves_nothing(form):
    modules, x = stage_forms.make(form)
    watched = []

    def through(module, *args):
        out = module(*args)
        watched.append(watch([out]))
        if len(watched) == 3:
            raise Failed
        return out

    fails(stage_forms.run, form, modules, x, through)
    assert len(watched) == 3
    assert not any(is_there() for is_there in watched)


@pytest.mark.parametrize("form", ["op", "layer", "block", "light"])
def test_a_checkpointed_stage_goes_after_its_backward(form):
    modules, x = stage_forms.make(form)
    outs, shared = stage_forms.run(
        form, modules, x, lambda f, *a: checkpoint(f, *a, use_reentrant=False)
    )
    is_there = watch(maps(outs, shared))
    outs[-1].sum().backward()
    del outs, shared
    assert not is_there()


@pytest.mark.parametrize("form", FORMS)
def test_a_failed_pass_leaves_nothing_in_a_graph_that_stays(form):
    """Neither the gradients that arrived, nor what each layer left for those before it."""
    modules, x = stage_forms.make(form)
    outs, shared = stage_forms.run(form, modules, x)
    arrived = []
    for out in outs[2:]:
        out.register_hook(lambda g: arrived.append(watch([g])))
    outs[1].register_hook(fail)
    fails(outs[-1].square().sum().backward, retain_graph=True)
    assert len(arrived) == 2
    assert not any(is_there() for is_there in arrived)
    assert maps(outs, shared)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_second_try_gives_what_a_first_one_gives(form, failing):
    modules, x = stage_forms.make(form)
    inputs = [x, *modules.parameters()]

    def gradients(loss):
        return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)

    outs, _ = stage_forms.run(form, modules, x)
    loss = outs[-1].square().sum() + outs[1].sin().sum()
    expected = gradients(loss)
    hook = outs[failing].register_hook(fail)
    for _ in range(2):
        fails(gradients, loss)
    hook.remove()
    for a, b in zip(gradients(loss), expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_within_a_pass_over_one_stage(form):
    """The inner one fails or not; the outer one, whose layers have left something already, goes on."""
    modules, x = stage_forms.make(form)
    inputs = [x, *modules.parameters()]
    outs, _ = stage_forms.run(form, modules, x)
    loss, other = outs[-1].square().sum(), outs[2].sin().sum()

    def gradients(loss):
        return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)

    expected, inner_expected, inner = gradients(loss), gradients(other), []

    def within(_):
        if not inner:
            inner.append(None)
            failing = outs[0].register_hook(fail)
            fails(gradients, other)
            failing.remove()
            inner[:] = gradients(other)

    hook = outs[1].register_hook(within)
    found = gradients(loss)
    hook.remove()
    assert len(inner) == len(inputs)
    for a, b in zip((*found, *inner), (*expected, *inner_expected), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_memory_stays_level_over_many_failed_passes(form, backend):
    def resident():
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * 4 / 1024

    modules, _ = stage_forms.make(form)
    x = torch.randn(8, 6, 64, 64, dtype=torch.float64)

    def step():
        outs, _ = stage_forms.run(form, modules, x)
        outs[1].register_hook(fail)
        fails(outs[-1].sum().backward)

    for _ in range(20):
        step()
    before = resident()
    for _ in range(100):
        step()
    # A map is 1.5 MiB, and one kept at each pass would be 150.
    assert resident() - before < 50
