"""The extension's functions take their arguments by name: what is swapped, missing or misspelt is refused."""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
from support import native_calls
from support.freed import make

from ela_kernels.backends.cpp import attention as cpp

BINDING = Path(__file__).resolve().parents[2] / "csrc" / "binding"
# By place: what a call is about. Everything else has a name.
ABOUT = {"plan", "where", "device", "dtype", "value_type", "code"}


@pytest.fixture
def call(kernels, monkeypatch):
    """A layer's backward as a step of training calls it."""
    extension, calls = native_calls.record(kernels, ["layer", "layer_backward"], monkeypatch)
    monkeypatch.setattr(cpp, "extension", lambda: extension)
    _, step = make("block")
    step(torch.randn(2, 8, 5, 5, requires_grad=True)).sum().backward()
    return calls["layer_backward"]


def test_any_order_of_the_names_is_the_same_call(call, kernels):
    call.made_by(kernels.layer_backward)
    kernels.layer_backward(*call.places, **dict(reversed(call.named.items())))
    # Names that were put together as it runs are other strings than those in code.
    kernels.layer_backward(
        *call.places, **{"".join(list(name)): value for name, value in call.named.items()}
    )


def test_a_missing_name_is_refused(call, kernels):
    for name in call.named:
        named = {n: value for n, value in call.named.items() if n != name}
        with pytest.raises(
            TypeError, match=f"^layer_backward: got no '{name}'; give each of own, "
        ):
            kernels.layer_backward(*call.places, **named)


def test_a_misspelt_name_is_refused(call, kernels):
    for name in call.named:
        named = {n if n != name else f"{n}_": value for n, value in call.named.items()}
        with pytest.raises(
            TypeError, match=f"^layer_backward: got '{name}_'; allowed is own, .*, threads$"
        ):
            kernels.layer_backward(*call.places, **named)


def test_addresses_by_place_are_refused(call, kernels):
    with pytest.raises(
        TypeError, match=r"^layer_backward: got 14 arguments by place; allowed is 1"
    ):
        kernels.layer_backward(*call.places, *call.named.values())
    with pytest.raises(TypeError, match=r"^attention: got 11 arguments by place; allowed is 0"):
        kernels.attention(*range(11))


GROUPS = ("own", "arrived", "gradients", "norm", "own.attention")


@pytest.mark.parametrize("path", GROUPS)
def test_one_group_for_another_is_refused(call, kernels, path):
    name = path.partition(".")[0]
    for other in GROUPS:
        if other == path:
            continue
        value = native_calls.value_at(kernels, call.named, other)
        named = native_calls.changed(kernels, call.named, path, value)
        with pytest.raises(TypeError, match=rf"^layer_backward: {name}: got \(.*of another type$"):
            kernels.layer_backward(*call.places, **named)
    # Nor is a tuple of the same numbers a group.
    bare = native_calls.value_at(kernels, call.named, path)[1:]
    with pytest.raises(TypeError, match="of another type"):
        kernels.layer_backward(
            *call.places, **native_calls.changed(kernels, call.named, path, bare)
        )


def test_a_value_of_another_type_is_named(call, kernels):
    with pytest.raises(TypeError, match=r"^layer_backward: wk: got 'x', which is of another type$"):
        kernels.layer_backward(*call.places, **call.named | {"wk": "x"})
    with pytest.raises(TypeError, match=r"^layer_backward: plan: got None, which is of another"):
        kernels.layer_backward(None, **call.named)


def test_every_function_takes_names(kernels):
    """Of all that the extension offers, however it was built."""
    takes = 0
    for name in dir(kernels):
        function = getattr(kernels, name)
        if name.startswith("_") or not inspect.isbuiltin(function):
            continue
        if function.__text_signature__ is None:  # one of pybind11's own
            arguments = re.match(r"\w+\((.*?)\) ->", function.__doc__)[1]
            by_place = re.findall(r"(\w+): ", arguments.partition("*")[0])
        else:
            parameters = inspect.signature(function).parameters.values()
            by_place = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
            takes += len(parameters)
        assert set(by_place) <= ABOUT, name
    assert takes > 100


def bound():
    """`(file, name in Python, name in C++, signature, parameters)` of what the sources of the bindings define."""
    for path in sorted(BINDING.glob("*.cpp")):
        text = path.read_text()
        for m in re.finditer(r'def_named\(\w+, "(\w+)", &(\w+),\s*((?:"[^"]*"\s*)+)\)', text):
            signature = "".join(re.findall(r'"([^"]*)"', m[3])).split(", ")
            definition = re.search(rf"^[\w:]+ {m[2]}\(([^{{;]*)\) \{{", text, flags=re.MULTILINE)
            assert definition is not None, m[0]
            # Without the commas of templates.
            parameters = re.sub(r"<[^<>]*>", "", definition[1]).split(",")
            yield (
                path.name,
                m[1],
                signature,
                [re.search(r"(\w+)$", p.strip())[1] for p in parameters],
            )


def test_names_stand_in_the_order_of_the_parameters():
    """C++ knows an argument by its place alone: a signature in another order would swap what it names."""
    every = list(bound())
    assert len(every) > 20
    for file, name, signature, parameters in every:
        assert [word for word in signature if word != "*"] == parameters, f"{file}: {name}"
        star = signature.index("*")
        assert set(signature[:star]) <= ABOUT
        # With more, Python makes a dictionary of the names for each call.
        assert star + 2 * (len(signature) - 1 - star) <= 30, f"{file}: {name}"


def test_fields_are_named_as_they_are():
    """Of the groups: each field once, under its own name."""
    groups = 0
    for path in itertools.chain(BINDING.glob("*.cpp"), BINDING.glob("*.h")):
        text = path.read_text()
        for body in re.findall(
            r"struct \w+ \{\n((?:(?!^\};).*\n)*?)  template <class Visit>", text, re.M
        ):
            start = text.index(body) + len(body)
            visited = re.findall(
                r'visit\("(\w+)", (\w+)\)', text[start : text.index("\n};", start)]
            )
            assert all(name == field for name, field in visited), path
            declared = re.sub(r"<[^<>]*>|//.*", "", body)
            fields = [
                name.strip()
                for line in declared.split(";")
                if line.strip()
                for name in line.strip().partition(" ")[2].split(",")
            ]
            assert [name for name, _ in visited] == fields, path
            groups += 1
    assert groups == 13
