"""Parts of a layer that a function of the caller's makes."""

from __future__ import annotations

from typing import Any

from torch import nn


def made_part(name: str, make: Any, *given: Any) -> nn.Module:
    """The module that `make` makes of what it is given, or an error that names the argument `name`."""
    of = "the number of channels" if given else "no argument"
    what = f"a class or function that is called with {of} and makes a torch.nn.Module"
    if isinstance(make, nn.Module):
        raise TypeError(
            f"{name}: got a {type(make).__name__} that is made already; allowed is {what}, since each layer has its "
            f"own. Give its class, or lambda{' dim' if given else ''}: {type(make).__name__}(...)"
        )
    if not callable(make):
        example = "torch.nn.BatchNorm2d" if given else "torch.nn.ReLU"
        raise TypeError(
            f"{name}: got {type(make).__name__}; allowed is {what}. Give {example}, say"
        )
    part = make(*given)
    if not isinstance(part, nn.Module):
        raise TypeError(
            f"{name}: got one that gives {type(part).__name__}; allowed is {what}. Return the module from it"
        )
    return part
