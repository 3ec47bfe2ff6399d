"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators: the products of the published form.

PyTorch counts the multiplications and additions of matrix products and convolutions, two for each product, and nothing
else. So do the formulas here: the dot products of query and keys, the weighted sum of the values, the depthwise
convolution of a whole layer, and of each the gradients. Softmax, divergence, norm, pooling and the filters over the
channels count nothing, as in the form that concatenates and multiplies matrices. What the kernels work out again in a
backward is not counted twice, and what a tolerance leaves out is counted all the same, as is a retrieval that a
compiled graph leaves out when it runs: of `torch.cond` PyTorch too counts the branch that costs more.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ela_kernels.ops.autograd.operators import library as library
from ela_kernels.ops.layer_attention.in_graph import operator as operator  # and these
from ela_kernels.ops.layer_attention.in_graph.call import Call, Left

_COUNTER = "torch.utils.flop_counter"


def attention_flops(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *_: Any, **__: Any
) -> int:
    """Scores and the weighted sum of `ela_kernels::layer_attention`."""
    return 2 * (q.numel() * len(keys) + values[-1].numel() * len(values))


def attention_backward_flops(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    weights: Tensor,
    dout: Tensor | None,
    *_: Any,
    **__: Any,
) -> int:
    """Gradients of query and keys; of weights and values where a gradient of the sum arrives."""
    depth = len(keys)
    of_values = 0 if dout is None else values[-1].numel()
    return 4 * depth * (q.numel() + of_values)


def layer_flops(*args: Any, **_: Any) -> int:
    """Convolution, scores and weighted sum of `ela_kernels::layer`."""
    from torch.utils.flop_counter import conv_flop_count

    call = Call(*args[:-1])
    x, depth = call.x, len(call.keys) + 1
    shape = list(x.shape)
    convolution: int = conv_flop_count(shape, list(call.wv.shape), shape)
    return convolution + 2 * depth * (x.shape[0] * x.shape[1] + x.numel())


def layer_backward_flops(*args: Any, **_: Any) -> int:
    """Of `ela_kernels::layer_backward`: its own retrieval, and the gradients of all pairs that it gathers."""
    from torch.utils.flop_counter import conv_backward_flop

    call, left = Call(*args[: len(Call._fields)]), Left(*args[len(Call._fields) :])
    x, depth = call.x, len(call.keys)  # with its own
    need_x, need_wv = left.needs[0], left.needs[3]
    shape, of_wv = list(x.shape), list(call.wv.shape)
    backward: Any = conv_backward_flop  # PyTorch wraps it, and gives it other arguments
    count: int = backward(
        *(shape, shape, of_wv, None, [1, 1], [1, 1], [1, 1], False, [0, 0], x.shape[1]),
        output_mask=[need_x, need_wv, False],
        out_val=[shape, of_wv, None],
    )
    row, of_map = 2 * x.shape[0] * x.shape[1], 2 * x.numel()
    # How many retrievals each gathered pair has a gradient of: one key and one value of each are added up.
    scored = len(left.queries) + left.is_reached()
    summed = sum(dout.numel() > 0 for dout in left.douts_after)
    arrives = left.dout is not None or left.dretrieved is not None
    count += row * depth * left.is_reached() + of_map * depth * arrives  # of query and weights
    count += row * scored * (1 + sum(left.need_keys))
    count += of_map * (summed + arrives) * (1 + sum(left.need_values))
    return count


_formulas: dict[str, Callable[..., int]] = {
    "layer_attention": attention_flops,
    "layer_attention_backward": attention_backward_flops,
    "layer": layer_flops,
    "layer_backward": layer_backward_flops,
}


def count_flops(name: str, formula: Callable[..., int]) -> None:
    """Make the formula of another of the package's operators known to PyTorch's counter."""
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])


def _register(counter: ModuleType) -> None:
    for name, formula in _formulas.items():
        of = getattr(torch.ops.ela_kernels, name)
        if of not in counter.flop_registry:
            counter.register_flop_formula(of, get_raw=True)(_without_result(formula))


def _without_result(formula: Any) -> Any:
    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        found: int = formula(*args, **kwargs)
        return found

    return counted


class _WhenImported(MetaPathFinder):
    """Registers the formulas as soon as somebody imports the counter: it takes a quarter of a second."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Make the formulas known to PyTorch's counter, now where it is loaded, else as soon as it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


register_when_imported()
