"""A stage of residual blocks whose history holds values in float32, bfloat16 or float16: errors, peak memory, time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ela_kernels as ek
from benchmarks.blocks import GRADIENT_TOLERANCE, BaseBlocks, kinds_of_inputs
from benchmarks.contenders import check_close
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.memory import profiled_peak
from benchmarks.shapes import StageShape

HELD: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
OUTPUT, WEIGHTS, DIVERGENCE = "output", "weights", "divergence"
# Relative L2 distance from the same stage in eager PyTorch, which rounds the same values. Where float32 sums in another
# order, some of them fall on the other side of a tie, and move by a digit of the narrow dtype.
SAME = 1e-3


class HeldBlocks(BaseBlocks):
    """Blocks of the base form, on a history of any dtype."""

    def run(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
        """The output, and each layer's weights and divergence."""
        history, attended = ek.LayerHistory(dtype=dtype), []
        for block in self.blocks:
            x = block(x, history)
            attended += [t for t in (history.weights, history.kl) if t is not None]
        return x, attended


def measure_history_dtype(shape: StageShape, rounds: int) -> dict[str, Any]:
    """Of each dtype the distance from float64, the peak of a training step in maps, and times beside float32's."""
    stage = HeldBlocks(shape)
    attended: list[Tensor] = []
    exact = _named(stage, stage.expected(attended), attended)
    errors = {name: _errors(stage, dtype, exact) for name, dtype in HELD.items()}
    forms = {name: partial(stage.ours, dtype=dtype) for name, dtype in HELD.items()}
    map_bytes = shape.map_elements * stage.x.element_size()
    maps = {
        name: profiled_peak(partial(stage.step, form)) / map_bytes for name, form in forms.items()
    }
    training = _times(stage.step, forms, rounds)
    stage.train(False)
    return {
        "error": errors,
        "peak_maps": maps,
        "training": training,
        "inference": _times(stage.infer, forms, rounds),
    }


def _times(
    run: Callable[[Callable[[Tensor], Tensor]], object],
    forms: Mapping[str, Callable[[Tensor], Tensor]],
    rounds: int,
) -> dict[str, Any]:
    seconds = interleave({name: partial(run, form) for name, form in forms.items()}, rounds)
    return {
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "over_float32": {name: ratio(times, seconds["float32"]) for name, times in seconds.items()},
    }


def _named(stage: HeldBlocks, found: list[Tensor], attended: list[Tensor]) -> dict[str, Tensor]:
    """Output and gradients, those of one kind of parameter together, and what the layers attended with."""
    by_dim = {
        WEIGHTS: [t for t in attended if t.dim() == 3],
        DIVERGENCE: [t for t in attended if t.dim() == 2],
    }
    named = {OUTPUT: found[0].detach()}
    named |= {
        name: torch.cat([t.detach().flatten() for t in some]) for name, some in by_dim.items()
    }
    for kind, which in kinds_of_inputs(stage).items():
        named[f"gradient of {kind}"] = torch.cat([found[1 + i].flatten() for i in which])
    return named


def _errors(
    stage: HeldBlocks, dtype: torch.dtype | None, exact: dict[str, Tensor]
) -> dict[str, float]:
    """Relative L2 distances from float64, after a look whether the numbers are those of eager PyTorch."""

    def results() -> dict[str, Tensor]:
        out, attended = stage.run(stage.x, dtype)
        gradients = torch.autograd.grad(out, stage.inputs, stage.dout)
        return _named(stage, [out, *gradients], attended)

    found = results()
    with ek.use_backend("eager"):
        plain = results()
    for name, got in found.items():
        tolerance = GRADIENT_TOLERANCE if name.startswith("gradient") else SAME
        check_close(f"values in {dtype}: {name}", got, plain[name].double(), tolerance)
    return {
        name: float((got.double() - exact[name]).norm() / exact[name].norm())
        for name, got in found.items()
    }
