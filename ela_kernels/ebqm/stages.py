"""The ELA layers of a model, and which of them form a stage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ela_kernels.modules.ela import ELA


def find_layers(model: object) -> dict[str, ELA]:
    """The ELA layers of a model by name, without the prefixes that wrappers put before it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module")
    found: dict[str, ELA] = {}
    for name, module in model.named_modules():
        if isinstance(module, ELA):
            # DistributedDataParallel and torch.compile; a run may be resumed with other wrappers.
            plain = name.replace("_orig_mod.", "").removeprefix("module.")
            found[name if plain in found else plain] = module
    if not found:
        raise ValueError(
            f"model: got {type(model).__name__} without an ela_kernels.ELA layer; allowed is a model with at least one"
        )
    return found


def stage_numbers(places: Sequence[int | None]) -> list[int]:
    """The stage of each layer, counted from 0, from the layers' places: one that does not grow starts a new stage.

    A layer that has not run (None) is counted to the stage of the layer before it.
    """
    stages = []
    stage, last = 0, -1
    for place in places:
        if place is not None:
            if place <= last:
                stage += 1
            last = place
        stages.append(stage)
    return stages
