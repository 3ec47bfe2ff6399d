"""What kernels without memory to read are asked: the same for each backend that runs here."""

from __future__ import annotations

import pytest
import torch
from support.freed import (
    ALL_PARAMETERS,
    HEADS,
    a_map,
    a_row,
    chosen,
    free,
    make,
    op_arguments,
    replace_by_view,
    shorten,
)

import ela_kernels as ek

REFUSED = r"^[\w. ]+(, [\w. ]+)*: got shapes? .*allowed is "
OP = ["q", "keys", "values", "prev_weights"]


class MemoryTests:
    """Of a forced backend; `kinds` are the modules that it has kernels of."""

    kinds: tuple[str, ...] = ("layer", "block", "light")

    def module(self, kind):
        if kind not in self.kinds:
            pytest.skip("PyTorch serves it")
        return make(kind)

    @pytest.mark.parametrize("name", OP)
    def test_a_freed_argument(self, name):
        arguments = op_arguments()
        free(chosen(arguments, name))
        with pytest.raises(ValueError, match=REFUSED):
            ek.layer_attention(**arguments)
        del arguments["values"]
        if name != "values":
            with pytest.raises(ValueError, match=REFUSED), torch.no_grad():
                ek.layer_attention_weights(**arguments)

    @pytest.mark.parametrize("name", OP)
    def test_saved_arguments_that_are_freed(self, name):
        arguments = op_arguments()
        r = ek.layer_attention(**arguments)
        free(chosen(arguments, name))
        with pytest.raises(ValueError, match=REFUSED):
            (r.out.sum() + r.kl.sum()).backward()

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_a_freed_layer_of_a_history(self, name):
        history, layers = ek.LayerHistory(), [(a_row(), a_row(), a_map()) for _ in range(2)]
        out = sum(history.attend(*layer, heads=HEADS) for layer in layers)
        free(layers[-1]["qkv".index(name)])
        with pytest.raises(ValueError, match=REFUSED):
            out.sum().backward()

    @pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
    def test_a_freed_parameter(self, kind, name):
        module, call = self.module(kind)
        free(module.get_parameter(name))
        with pytest.raises(ValueError, match=REFUSED):
            call(a_map())

    @pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
    def test_a_part_of_freed_parameters(self, kind, name):
        module, call = self.module(kind)
        free(replace_by_view(module, name))
        with pytest.raises(ValueError, match=REFUSED):
            call(a_map())

    @pytest.mark.parametrize("lose", [free, shorten])
    @pytest.mark.parametrize(("kind", "name"), ALL_PARAMETERS)
    def test_a_parameter_that_is_lost_before_the_backward(self, kind, name, lose):
        module, call = self.module(kind)
        out = call(a_map())
        lose(module.get_parameter(name))
        with pytest.raises(ValueError, match=REFUSED):
            out.sum().backward()

    @pytest.mark.parametrize("lose", [free, shorten])
    @pytest.mark.parametrize("kind", ["layer", "block", "light"])
    def test_an_input_that_is_lost_before_the_backward(self, kind, lose):
        x = a_map()
        out = self.module(kind)[1](x)
        lose(x)
        with pytest.raises(ValueError, match=REFUSED):
            out.sum().backward()
