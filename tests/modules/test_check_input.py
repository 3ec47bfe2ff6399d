"""A map that a layer's parameters do not go with is refused by name, before PyTorch speaks of its own functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import ela_kernels as ek
from ela_kernels.modules.published import ConcatHistory, ConcatLayerAttention

CHANNELS = 8


def layer():
    module = ek.LayerAttention(CHANNELS, 4)
    return module, lambda x: module(x, ek.LayerHistory())


def block():
    module = ek.ELA(CHANNELS, 4)
    return module, lambda x: module(x, ek.LayerHistory())


def skipped():
    module = ek.ELA(CHANNELS, 4)
    module.skipped = True
    return module, lambda x: module(x, ek.LayerHistory())


def light():
    module = ek.LightLayerAttention(CHANNELS, 4)
    return module, lambda x: module(x, x)


def published():
    module = ConcatLayerAttention(CHANNELS, 4)
    return module, lambda x: module(x, ConcatHistory())


KINDS = [layer, block, skipped, light, published]
every_kind = pytest.mark.parametrize("kind", KINDS)


def a_map(dtype=torch.float32):
    return torch.randn(2, CHANNELS, 3, 5).to(dtype)


NO_FLOATS = {
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of prototypes and what is deprecated
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", NO_FLOATS.values(), ids=NO_FLOATS.keys())
@every_kind
def test_what_is_no_dense_map_of_floats(kind, make, autocast):
    x = make(a_map())
    with (
        pytest.raises(TypeError, match=r"^x: got .*allowed is"),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        kind()[1](x)


@pytest.mark.parametrize(
    "dtypes", [("f32", "bf16"), ("f32", "f64"), ("bf16", "f32"), ("f64", "f32")]
)
@every_kind
def test_another_dtype_than_the_parameters(kind, dtypes):
    known = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
    parameters, given = (known[d] for d in dtypes)
    module, call = kind()
    module.to(parameters)
    with pytest.raises(TypeError, match=rf"^x: got dtype {given}; allowed is {parameters}"):
        call(a_map(given))


@every_kind
def test_autocast_takes_all_but_float64(kind):
    module, call = kind()
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert call(a_map(dtype)).isfinite().all()
        with pytest.raises(
            TypeError, match=r"^x: got dtype torch\.float64; allowed is torch\.float32"
        ):
            call(a_map(torch.float64))
        module.bfloat16()
        if kind is not block:  # whose norm is PyTorch's to refuse
            assert call(a_map()).isfinite().all()


@every_kind
def test_another_device_than_the_parameters(kind):
    module, call = kind()
    with pytest.raises(ValueError, match=r"^x: got a tensor on meta; allowed is cpu"):
        call(a_map().to("meta"))
    module.to("meta")
    with pytest.raises(ValueError, match=r"^x: got a tensor on cpu; allowed is meta"):
        call(a_map())
    assert call(a_map().to("meta")).device.type == "meta"


@pytest.mark.filterwarnings("ignore:Complex modules")
@every_kind
def test_complex_parameters(kind):
    module, call = kind()
    module.to(torch.complex64)
    with pytest.raises(TypeError, match=r"^x: got dtype torch\.complex64; allowed is"):
        call(a_map().to(torch.complex64))


class Widened(nn.Module):
    """Counts how often it is worked out."""

    count = 0

    def forward(self, weight):
        type(self).count += 1
        return weight.float()


def test_a_parametrized_weight_is_not_worked_out_to_be_checked():
    module, call = layer()
    module.Wv.half()
    parametrize.register_parametrization(module.Wv, "weight", Widened(), unsafe=True)
    Widened.count = 0
    assert call(a_map()).dtype == torch.float32
    assert Widened.count == 1
    with pytest.raises(TypeError, match=r"^x: got dtype torch\.int64"):
        call(a_map().long())
    assert Widened.count == 1


def test_a_hook_may_bring_the_dtypes_together():
    module, call = layer()
    expected = call(x := a_map())
    for child in (module.Wq, module.Wk, module.Wv):
        child.half()
        child.register_forward_pre_hook(lambda m, args: m.float() and None)
    assert_close(call(x), expected, rtol=0.02, atol=0.02)


def test_a_class_of_its_own_is_asked_nothing():
    class Quantized(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                args = [a.float() if isinstance(a, cls) else a for a in args]
                return function(*args, **(kwargs or {}))

    module, call = layer()
    expected = call(x := a_map())
    # Where a module keeps its parameters, which may not be of such a class when they are set.
    module.Wv._parameters["weight"] = module.Wv.weight.detach().double().as_subclass(Quantized)
    assert_close(call(x), expected)


def test_parameters_of_another_dtype_for_one_call():
    module, _ = layer()
    given = {name: p.detach().double() for name, p in module.named_parameters()}
    x = a_map()
    found = torch.func.functional_call(module, given, (x.double(), ek.LayerHistory()))
    assert found.dtype == torch.float64
    with pytest.raises(TypeError, match=r"^x: got dtype torch\.float32; allowed is torch\.float64"):
        torch.func.functional_call(module, given, (x, ek.LayerHistory()))


def test_transforms_of_parameters():
    module, _ = layer()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = a_map()

    def loss(given):
        return torch.func.functional_call(module, given, (x, ek.LayerHistory())).sum()

    found = torch.func.grad(loss)(parameters)
    with ek.use_backend("eager"):
        expected = torch.autograd.grad(
            module(x, ek.LayerHistory()).sum(), module.parameters(), allow_unused=True
        )
    assert_close(found["Wv.weight"], expected[2])
