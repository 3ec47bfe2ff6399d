"""A model that is run and afterwards as it was, in whatever mode it ran."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ela_kernels.explaining import unchanged
from ela_kernels.modules.ela import ELA
from ela_kernels.ops.layer_attention.readers import Readers
from ela_kernels.torch_internals import without_compiling


@contextmanager
def untouched(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Attributes of modules, buffers and random numbers are afterwards what they were, also when something raised.

    Meanwhile no gradients are kept, EBQM takes no note, and compiled parts run as they are written.

    Args:
        model: the model.
        training: the mode that it is switched to; None leaves it in its own.
    """
    kept = [(module, _attributes(module)) for module in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    with _random_numbers(), unchanged(model), without_compiling():
        try:
            for module, _ in kept:
                if isinstance(module, ELA):
                    module.watched = False
                    module.readers = Readers()
            if training is not None:
                model.train(training)
            with torch.no_grad():
                yield
        finally:
            for module, attributes in kept:
                _put_back(module, attributes)
            for parameter, wants in trained:
                if parameter.requires_grad != wants:
                    parameter.requires_grad_(wants)


Kept = dict[str, tuple[Any, Any]]
"""Attributes by name: each object, and what it held where it is a container."""


def _attributes(module: nn.Module) -> Kept:
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in vars(module).items()
    }


def _put_back(module: nn.Module, attributes: Kept) -> None:
    # Not by setattr, which modules overload.
    own = vars(module)
    own.clear()
    for name, (value, held) in attributes.items():
        own[name] = value
        if held is None:
            continue
        value.clear()
        if isinstance(value, list):
            value.extend(held)
        else:
            value.update(held)


@contextmanager
def _random_numbers() -> Iterator[None]:
    """Those of Python and NumPy, which data sets draw; PyTorch's are seen to with the buffers."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None and of_numpy is not None:
            numpy.random.set_state(of_numpy)
