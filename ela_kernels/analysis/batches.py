"""Batches of a loader, and what of each a model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]
"""Calls a model with one batch; what it gives is not looked at."""

# Names that data sets give to the input, where the model's forward has another.
_INPUTS = ("inputs", "input", "images", "image", "pixel_values", "x")
_REMEDY = (
    "give `forward`, which calls the model: forward=lambda model, batch: model(batch['image'])"
)


def check_loader(loader: object) -> Iterable[Any]:
    """`loader`, or an error that says what one is."""
    if isinstance(loader, (Tensor, Mapping, str, bytes)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader: got {type(loader).__name__}; allowed is an iterable of batches, a DataLoader for instance. "
            "One batch alone is [batch]"
        )
    return loader


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's parameters are, or None without any; refused where they have no numbers."""
    first = next(model.parameters(), None)
    return None if first is None else first.device


def moved(batch: Any, device: torch.device | None) -> Any:
    """`batch` with all tensors in it on `device`."""
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def call(model: nn.Module, batch: Any) -> Any:
    """Call `model` with the inputs of `batch`: it itself, the first of a tuple, or the entries that forward names."""
    if isinstance(batch, Mapping):
        return _call_by_name(model, batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError(
                "loader: got a batch that is an empty tuple; allowed are inputs, and targets after them"
            )
        inputs = batch[0]
        return _call_by_name(model, inputs) if isinstance(inputs, Mapping) else model(inputs)
    if hasattr(batch, "shape") or hasattr(batch, "to"):
        return model(batch)
    raise TypeError(
        f"loader: got a batch that is a {type(batch).__name__}; allowed are a tensor, a tuple or list whose first "
        f"entry is the input, or a dict. For anything else {_REMEDY}"
    )


def _call_by_name(model: nn.Module, batch: Mapping[Any, Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: batch[p.name] for p in parameters if p.kind in kinds and p.name in batch}
    if named:
        return model(**named)
    for name in _INPUTS:
        if name in batch:
            return model(batch[name])
    raise ValueError(
        f"loader: got a batch with the keys {sorted(map(str, batch))}; allowed are names of the arguments of "
        f"{type(model).__name__}.forward, or one of {', '.join(_INPUTS)}. Otherwise {_REMEDY}"
    )
