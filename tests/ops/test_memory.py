"""Kernels read memory: what has none is refused by name, and what they allocate lies where they read it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.freed import (
    ALL_PARAMETERS,
    CHANNELS,
    HEADS,
    a_map,
    a_row,
    chosen,
    free,
    make,
    op_arguments,
)
from torch._subclasses import FakeTensorMode

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.memory import address, addresses, check_readable, with_memory

REFUSED = r"got shapes? .*allowed is "


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def everything(modules):
    """Each form once, forward and backward: all that is computed."""
    generator = torch.Generator("cpu").manual_seed(3)

    def random(*shape):
        x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return x.requires_grad_()

    q, k, x = random(2, CHANNELS), random(2, CHANNELS), random(2, CHANNELS, 3, 5)
    prev = torch.full((2, HEADS, 1), 0.5, device="cpu", dtype=torch.float32)
    results = [*ek.layer_attention(q, [k, q], [x, x], heads=HEADS, prev_weights=prev)]
    with torch.no_grad():
        results += ek.layer_attention_weights(q, [k, q], heads=HEADS, prev_weights=prev)
    history = ek.LayerHistory()
    history.provide(k, x, heads=HEADS)
    results += [history.attend(q, k, x, heads=HEADS) for _ in range(2)]
    decay = torch.ones(CHANNELS, device="cpu", dtype=torch.float32)
    with ek.use_backend("auto"):  # no backend has kernels of this operation alone
        results.append(ek.light_layer_attention(q, k, x, x, decay, heads=HEADS))
    history = ek.LayerHistory()
    for module in copy.deepcopy(modules):
        arguments = (x,) if isinstance(module, ek.LightLayerAttention) else (history,)
        results += [module(x, *arguments), module(x, *arguments)]
        results += [module.eval()(x, *arguments)]
    loss = sum((t * t.detach().cos()).sum() for t in results if t.requires_grad)
    return [*results, *torch.autograd.grad(loss, [q, k, x])]


CHANGED = {
    "meta by default": lambda: default_device("meta"),
    "meta in a context": lambda: torch.device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
def test_the_default_device_and_dtype_do_not_matter(backend, changed):
    modules = [make(kind)[0] for kind in ("layer", "block", "light")]
    expected = everything(modules)
    with changed():
        found = everything(modules)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["layer", "block", "light"])
def test_a_module_made_without_memory_and_given_it_later(kind):
    with torch.device("meta"):
        module, call = make(kind)
        assert call(a_map()).shape == (2, CHANNELS, 3, 5)  # shapes are worked out without memory
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x, history = a_map(), ek.LayerHistory()
    out = module(x, x if kind == "light" else history)
    out.sum().backward()
    assert x.grad.isfinite().all()


OP = ["q", "keys", "values", "prev_weights"]


@pytest.mark.parametrize("name", OP)
def test_a_freed_argument(backend, name):
    arguments = op_arguments()
    free(chosen(arguments, name))
    with pytest.raises(ValueError, match=rf"^{name}: {REFUSED}.*freed"):
        ek.layer_attention(**arguments)
    if name != "values":
        del arguments["values"]
        with pytest.raises(ValueError, match=rf"^{name}: {REFUSED}.*freed"), torch.no_grad():
            ek.layer_attention_weights(**arguments)


@pytest.mark.parametrize("name", OP)
def test_a_freed_argument_under_autocast(backend, name):
    arguments = op_arguments()
    free(chosen(arguments, name))
    with pytest.raises(ValueError, match=REFUSED), torch.autocast("cpu", torch.bfloat16):
        ek.layer_attention(**arguments)


@pytest.mark.parametrize("name", OP)
def test_a_part_of_a_freed_tensor(backend, name):
    """Its address is not 0, but where it began in what is gone."""
    arguments = op_arguments()
    part = torch.randn(3, *chosen(arguments, name).shape)[2]
    free(part)
    assert part.data_ptr() != 0
    whole = arguments[name]
    arguments[name] = [whole[0], part] if isinstance(whole, list) else part
    with pytest.raises(ValueError, match=REFUSED):
        ek.layer_attention(**arguments)


@pytest.mark.parametrize("name", ["q", "k", "v", "prev_out", "decay"])
def test_a_freed_argument_of_the_light_form(name):
    arguments = {"q": a_row(), "k": a_row(), "v": a_map(), "prev_out": a_map()}
    arguments["decay"] = torch.randn(CHANNELS)
    free(arguments[name])
    with pytest.raises(ValueError, match=rf"^{name}: {REFUSED}"):
        ek.light_layer_attention(**arguments, heads=HEADS)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
def test_a_freed_parameter(kernels, kind, name, autocast):
    module, call = make(kind)
    free(module.get_parameter(name))
    with (
        pytest.raises(ValueError, match=REFUSED),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        call(a_map().to(torch.bfloat16 if autocast else torch.float32))


@pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
def test_a_freed_parameter_that_is_expanded(kernels, kind, name):
    module, call = make(kind)
    old = module.get_parameter(name)
    new = torch.nn.Parameter(torch.randn(1).expand(old.shape))
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, new)
    assert call(a_map()).isfinite().all()
    free(new)
    with pytest.raises(ValueError, match=REFUSED):
        call(a_map())


@pytest.mark.parametrize("name", ["Wk.weight", "Wv.weight"])
def test_a_freed_parameter_of_a_layer_that_is_skipped(kernels, name):
    module = ek.ELA(CHANNELS, CHANNELS // HEADS)
    module.skipped = True
    free(module.attn.get_parameter(name))
    with pytest.raises(ValueError, match=REFUSED):
        module(a_map(), ek.LayerHistory())


@pytest.mark.parametrize("kind", ["layer", "block", "light"])
def test_a_freed_parameter_in_eager_pytorch(kind):
    module, call = make(kind)
    name = "attn.Wv.weight" if kind == "block" else "Wv.weight"
    free(module.get_parameter(name))
    with ek.use_backend("eager"), pytest.raises(ValueError, match=rf"^Wv.weight: {REFUSED}.*freed"):
        call(a_map())


@pytest.mark.parametrize("kind", ["layer", "block", "light"])
def test_parameters_given_for_one_call(kernels, kind):
    module, _ = make(kind)
    x = a_map()
    given = {n: p.detach().clone() for n, p in module.named_parameters()}
    other = x if kind == "light" else ek.LayerHistory()
    assert torch.func.functional_call(module, given, (x, other)).isfinite().all()
    free(given["attn.Wk.weight" if kind == "block" else "Wk.weight"])
    other = x if kind == "light" else ek.LayerHistory()
    with pytest.raises(ValueError, match=REFUSED):
        torch.func.functional_call(module, given, (x, other))


def _without_memory():
    wrapped = []
    torch.func.vmap(lambda x: (wrapped.append(x), x)[1])(torch.randn(2, 3))
    torch.func.grad(lambda x: (wrapped.append(x), x.sum())[1])(torch.randn(2, 3))
    cut, freed, part = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)[2:]
    cut.untyped_storage().resize_(20)
    free(freed)
    free(part)
    return {
        "meta": torch.empty(3, device="meta"),
        "a part of meta": torch.empty(3, device="meta")[1:],
        "fake": FakeTensorMode().from_tensor(torch.randn(3)),
        "a symbolic zero": torch._efficientzerotensor((2, 3)),
        "wrapped by vmap": wrapped[0],
        "wrapped by grad": wrapped[1],
        "sparse": torch.eye(3).to_sparse(),
        "freed": freed,
        "a part of freed": part,
        "cut": cut,
    }


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("what", _without_memory())
def test_what_has_no_memory_has_no_address(what):
    bad, good = _without_memory()[what], torch.randn(2, 3)
    calls = {
        "looked at": lambda: with_memory(bad, "x"),
        "address": lambda: address(bad, "x"),
        "addresses": lambda: addresses([good, bad, good], "x"),
        "check": lambda: check_readable(-1, ("a", "b", "x"), (good, None, bad)),
    }
    if what == "cut":  # not asked for at every call: only what is copied is looked at so closely
        calls = {"looked at": calls["looked at"]}
    for call in calls.values():
        with pytest.raises(ValueError, match=r"^x: got shape .*allowed is "):
            call()


def test_what_has_memory_has_an_address():
    x = torch.randn(4, 3)
    empty_one = torch.empty(0, 3)
    assert address(x) == x.data_ptr()
    assert address(None) == 0
    assert address(empty_one) == 0
    assert addresses([x, x[1:], empty_one]) == [x.data_ptr(), x.data_ptr() + 12, 0]
    for fine in (x, x[2:], x.t(), x[:1].expand(4, 3), x[:, 1], empty_one, torch.tensor(1.0)):
        assert with_memory(fine) is fine
        check_readable(-1, ("x",), (fine,))


def test_another_device_is_refused():
    x = torch.randn(2)
    with pytest.raises(
        ValueError, match=r"^b: got shape \[2\].*allowed is the device of.* number 3"
    ):
        check_readable(3, ("a", "b"), (None, x))


@pytest.mark.parametrize("kind", ["layer", "block", "light"])
@pytest.mark.parametrize("to", ["meta", "sparse"])
def test_a_gradient_without_memory(kernels, kind, to):
    """A hook may return anything; PyTorch refuses some, and the kernels the rest."""
    x = a_map()
    out = make(kind)[1](x)
    out.register_hook(lambda g: g.to("meta") if to == "meta" else g.to_sparse())
    with pytest.raises((ValueError, RuntimeError), match=r"allowed is|hook|device|layout|type"):
        out.sum().backward()


def test_messages_say_what_to_do():
    freed, meta = torch.randn(2, 3), torch.empty(2, 3, device="meta")
    free(freed)
    with pytest.raises(ValueError, match=r"x: got shape \[2, 3\], torch.float32 on cpu.*FSDP"):
        address(freed, "x")
    with pytest.raises(
        ValueError, match=r"x: got shape \[2, 3\], torch.float32 on meta.*use_backend"
    ):
        address(meta, "x")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("channels_last", [True, False])
def test_an_empty_gradient_in_no_form(channels_last):
    """Strides of nothing say nothing; such a gradient arrives all the same, and is nothing."""
    shape = (0, 8, 5) if channels_last else (0, 5, 8)
    dout = torch.empty(shape).movedim(1, -1)
    row, weights = torch.empty(0, 8), torch.empty(0, 2, 3)
    left = [KERNELS["cpp"].contribution(row, weights, weights, dout, channels_last)] * 2
    found = KERNELS["cpp"].gather(left, 0, 2, channels_last, True, True)
    assert [g.shape for g in found] == [row.shape, dout.shape]
