"""The layers of a model that EBQM watches, and which of them form a stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ela_kernels.modules.watched import Watched
from ela_kernels.torch_internals import WRAPPED, all_modules

# These call the module that they hold "module". Models use that name too, so it counts under a wrapper, and at the very
# front.
_HOLDS_MODULE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def plain_name(name: str) -> str:
    """`name` without what wrappers add to it, as far as the name alone tells."""
    parts = [part for part in name.split(".") if part not in WRAPPED]
    return ".".join(parts[1:] if parts[:1] == ["module"] and len(parts) > 1 else parts)


def present_layers(model: nn.Module) -> list[Watched]:
    """The layers of a model that EBQM watches, in the order in which they are registered."""
    return [module for module in all_modules(model) if isinstance(module, Watched)]


def device_of(layers: Sequence[Watched]) -> torch.device:
    """Where the layers are; some may be empty, once they are pruned."""
    tensors = (t for layer in layers for t in (*layer.buffers(), *layer.parameters()))
    return next((t.device for t in tensors), torch.device("cpu"))


def find_layers(model: object) -> dict[str, Watched]:
    """As :func:`present_layers`, by name without what wrappers add, so that a run may be resumed with others."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module")
    found: dict[str, Watched] = {}
    for name, plain, module in _named(model):
        found[name if plain in found else plain] = module
    if not found:
        raise ValueError(
            f"model: got {type(model).__name__} without an ela_kernels.ELA layer or an AttentionResidual; allowed is a "
            "model with at least one"
        )
    return found


def _named(model: nn.Module) -> Iterator[tuple[str, str, Watched]]:
    """Each such layer with its name, and that name without wrappers."""
    wrappers = {name for name, m in model.named_modules() if isinstance(m, _HOLDS_MODULE)}
    for name, module in model.named_modules():
        if isinstance(module, Watched):
            kept, path = [], ""
            for part in name.split("."):
                if not (part == "module" and path in wrappers):
                    kept.append(part)
                path = f"{path}.{part}" if path else part
            yield name, plain_name(".".join(kept)), module


def stage_numbers(layers: Sequence[Watched]) -> list[int]:
    """The stage of each layer, counted from 0 in the order of registration.

    Layers that met in one history are of one stage, in whatever order they are registered. Where they have not run
    since they were loaded, a place that does not grow starts a new stage. One that has never run counts to the stage of
    the layer before it.
    """
    if any(layer.stage is None and layer.place is not None for layer in layers):
        return _by_places([layer.place for layer in layers])
    numbers: dict[int, int] = {}
    stages = []
    last = 0
    for layer in layers:
        if layer.stage is not None:
            last = numbers.setdefault(layer.stage, len(numbers))
        stages.append(last)
    return stages


def _by_places(places: Sequence[int | None]) -> list[int]:
    stages = []
    stage, last = 0, -1
    for place in places:
        if place is not None:
            if place <= last:
                stage += 1
            last = place
        stages.append(stage)
    return stages


def run_order(layers: Sequence[Watched], stages: Sequence[int]) -> list[int]:
    """The numbers of the layers stage by stage, each stage in the order in which its layers ran."""
    last = len(layers)
    return sorted(
        range(len(layers)),
        key=lambda i: (stages[i], last if (place := layers[i].place) is None else place, i),
    )
