"""Calls of the extension's functions as tests look at them: recorded, and given again with something changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


class NativeCall(NamedTuple):
    places: tuple[Any, ...]
    """What is given by place: a plan, or a device and a dtype."""
    named: dict[str, Any]

    def made_by(self, function: Callable[..., Any]) -> Any:
        return function(*self.places, **self.named)


def is_group(value: Any) -> bool:
    """Whether this is what a function such as `attention` of the extension made: its name, then the fields."""
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], str)


def fields_of(kernels: Any, group: tuple[Any, ...]) -> dict[str, Any]:
    names = inspect.signature(getattr(kernels, group[0])).parameters
    return dict(zip(names, group[1:], strict=True))


def value_at(kernels: Any, named: Mapping[str, Any], path: str) -> Any:
    """The argument, or a field of one: `own.attention.query`."""
    name, _, rest = path.partition(".")
    value = named[name]
    return value_at(kernels, fields_of(kernels, value), rest) if rest else value


def changed(kernels: Any, named: Mapping[str, Any], path: str, new: Any) -> dict[str, Any]:
    """The arguments, with another value at a path."""
    name, _, rest = path.partition(".")
    if rest:
        group = named[name]
        new = getattr(kernels, group[0])(**changed(kernels, fields_of(kernels, group), rest, new))
    return {**named, name: new}


def _given(value: Any) -> int:
    """How many numbers and lists in it are not 0, None or empty."""
    return sum(map(_given, value[1:])) if is_group(value) else bool(value)


def record(kernels: Any, functions: Any, monkeypatch: Any) -> tuple[Any, dict[str, NativeCall]]:
    """What to put in the place of the extension, and the fullest call of each function from now on.

    The tensors behind the addresses live as long as the test.
    """
    calls: dict[str, NativeCall] = {}

    def recorder(name: str) -> Callable[..., Any]:
        def call(*places: Any, **named: Any) -> Any:
            fullest = calls.get(name)
            if fullest is None or _given(("", *named.values())) >= _given(
                ("", *fullest.named.values())
            ):
                calls[name] = NativeCall(places, named)
            return getattr(kernels, name)(*places, **named)

        return call

    everything = {n: getattr(kernels, n) for n in dir(kernels) if not n.startswith("_")}
    alive = []
    real = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: (alive.append(t), real(t))[1])
    return SimpleNamespace(**everything | {name: recorder(name) for name in functions}), calls


def without_address(value: Any) -> Iterator[Any]:
    """A value with its address, or its addresses one after the other, exchanged for 0."""
    if isinstance(value, list):
        for i in range(len(value)):
            yield [*value[:i], 0, *value[i + 1 :]]
    elif isinstance(value, tuple):  # a map, or a parameter
        yield (0, *value[1:])
    else:
        yield 0
