"""Kernels read memory: what has none is refused by name before they run."""

from __future__ import annotations

import pytest
import torch
from support.backends import WITH_KERNELS, on
from support.freed import (
    ALL_PARAMETERS,
    HEADS,
    a_map,
    a_row,
    chosen,
    empty,
    free,
    make,
    op_arguments,
    replace_by_view,
    shorten,
)

import ela_kernels as ek

REFUSED = r"^[\w. ]+(, [\w. ]+)*: got shapes? .*allowed is "
OP = ["q", "keys", "values", "prev_weights"]
on_cpu = on([b for b in WITH_KERNELS if b.device.type == "cpu"])


def module_of(backend, kind):
    if kind == "light" and not backend.has_light_layers:
        pytest.skip("PyTorch serves it")
    return make(kind)


@on_cpu
@pytest.mark.parametrize("name", OP)
def test_a_freed_argument(backend, name):
    arguments = op_arguments()
    free(chosen(arguments, name))
    with pytest.raises(ValueError, match=REFUSED):
        ek.layer_attention(**arguments)
    del arguments["values"]
    if name != "values":
        with pytest.raises(ValueError, match=REFUSED), torch.no_grad():
            ek.layer_attention_weights(**arguments)


@on_cpu
@pytest.mark.parametrize("name", OP)
def test_saved_arguments_that_are_freed(backend, name):
    arguments = op_arguments()
    r = ek.layer_attention(**arguments)
    free(chosen(arguments, name))
    with pytest.raises(ValueError, match=REFUSED):
        (r.out.sum() + r.kl.sum()).backward()


@on_cpu
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_freed_layer_of_a_history(backend, name):
    history, layers = ek.LayerHistory(), [(a_row(), a_row(), a_map()) for _ in range(2)]
    out = sum(history.attend(*layer, heads=HEADS) for layer in layers)
    free(layers[-1]["qkv".index(name)])
    with pytest.raises(ValueError, match=REFUSED):
        out.sum().backward()


@on_cpu
def test_a_freed_value_of_a_history_that_rounds(backend):
    """Where it is given, and where what is held is read by others than kernels."""
    history, layer = ek.LayerHistory(dtype=torch.bfloat16), (a_row(), a_row(), a_map())
    free(layer[-1])
    with pytest.raises(ValueError, match=REFUSED):
        history.attend(*layer, heads=HEADS)
    with pytest.raises(ValueError, match=REFUSED):
        history.provide(*layer[1:], heads=HEADS)
    history.attend(a_row(), a_row(), a_map(), heads=HEADS)
    for value in history._now.pairs.values:
        free(value)
    with ek.use_backend("eager"), pytest.raises(ValueError, match=REFUSED):
        history.attend(a_row(), a_row(), a_map(), heads=HEADS)


@on_cpu
@pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
def test_a_freed_parameter(backend, kind, name):
    module, call = module_of(backend, kind)
    free(module.get_parameter(name))
    with pytest.raises(ValueError, match=REFUSED):
        call(a_map())


@on_cpu
@pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
def test_a_part_of_freed_parameters(backend, kind, name):
    module, call = module_of(backend, kind)
    free(replace_by_view(module, name))
    with pytest.raises(ValueError, match=REFUSED):
        call(a_map())


@on_cpu
@pytest.mark.parametrize("lose", [free, empty, shorten])
@pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
def test_a_parameter_that_is_lost_before_the_backward(backend, kind, name, lose):
    module, call = module_of(backend, kind)
    out = call(a_map())
    lose(module.get_parameter(name))
    # Of a norm whose weight is empty autograd speaks first.
    words = rf"{REFUSED}|invalid gradient" if lose is empty else REFUSED
    with pytest.raises((ValueError, RuntimeError), match=words):
        out.sum().backward()


@on_cpu
@pytest.mark.parametrize("lose", [free, empty, shorten])
@pytest.mark.parametrize("kind", ["layer", "block", "light"])
def test_an_input_that_is_lost_before_the_backward(backend, kind, lose):
    x = a_map()
    out = module_of(backend, kind)[1](x)
    lose(x)
    with pytest.raises(ValueError, match=REFUSED):
        out.sum().backward()


@on_cpu
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_layer_of_a_history_that_is_freed_before_it_attends(backend, name):
    history, layers = ek.LayerHistory(), [(a_row(), a_row(), a_map()) for _ in range(2)]
    history.attend(*layers[0], heads=HEADS)
    free(layers[-1]["qkv".index(name)])
    with pytest.raises(ValueError, match=REFUSED):
        history.attend(*layers[1], heads=HEADS)
