"""A model that is run and afterwards as it was, in whatever mode it ran."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.explaining import copies_of, restore, unchanged
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.watched import Watched
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
                if isinstance(module, Watched):
                    module.watched = False
                if isinstance(module, ELA):
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


class Kept(NamedTuple):
    """A module's attributes: the objects by name, and of those that can change what they held."""

    objects: dict[str, Any]
    containers: dict[str, Any]
    tensors: dict[str, Tensor]


def _attributes(module: nn.Module) -> Kept:
    own = vars(module)
    containers = {n: v.copy() for n, v in own.items() if isinstance(v, (dict, list, set))}
    return Kept(dict(own), containers, copies_of(own))


def _put_back(module: nn.Module, attributes: Kept) -> None:
    # Not by setattr, which modules overload.
    own = vars(module)
    own.clear()
    own.update(attributes.objects)
    for name, held in attributes.containers.items():
        own[name].clear()
        if isinstance(held, list):
            own[name].extend(held)
        else:
            own[name].update(held)
    for name, value in attributes.tensors.items():
        restore(own[name], value)


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
