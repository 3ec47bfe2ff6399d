"""Options of a run in a file: read for the next run, and written by each."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ela_kernels.command_line import Parser, nearest
from ela_kernels.training.files import write_whole
from ela_kernels.training.parser import make_parser
from ela_kernels.training.plain import shown

NAME = "config.json"
# What is said of a run, and is none of its options.
_NOT_IN_FILES = ("config", "resume", "evaluate", "dry_run")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, and those of its `--config` that it does not give itself.

    Raises:
        ValueError: the file cannot be read, or has something else than options and their values.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.config is None:
        return arguments
    found = read_config(arguments.config, parser)
    given = _given(parser, argv)
    for name, other, goes_with in _GOES_WITH:
        if name not in given and other in given and not goes_with(given[other]):
            found.pop(name, None)
    parser.set_defaults(**found)
    return parser.parse_args(argv)


# An option of a file, another one, and the values of that with which it says something. It is left out where the
# command line sets the other to anything else: it could not be unset there, and would be refused.
_GOES_WITH: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("data_dir", "data", lambda data: data != "digits"),
    ("ra_magnitude", "auto_augment", lambda policy: policy == "ra"),
    ("model_ema_decay", "model_ema", bool),
    ("model_ema_steps", "model_ema", bool),
    ("lr_warmup_decay", "lr_warmup_epochs", bool),
    ("ebqm", "no_ebqm", lambda without: not without),
    ("ebqm", "attention", lambda attention: attention == "ela"),
    ("no_ebqm", "ebqm", lambda _: False),
)


def _given(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """What a command line sets itself."""
    absent = object()
    names = {action.dest for action in parser.options.values()}
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name: value for name, value in vars(found).items() if value is not absent}


def read_config(path: Path, parser: Parser) -> dict[str, Any]:
    """What a file of JSON, or of TOML, sets: values by the names that the parser has for them.

    Raises:
        ValueError: the file cannot be read; an option that is not known, or comes twice, or has a value of another
            type than on the command line.
    """
    found: dict[str, Any] = {}
    for key, value in _content(path).items():
        name = key.replace("_", "-")
        action = parser.options.get(name)
        if name.replace("-", "_") in _NOT_IN_FILES:
            raise ValueError(f"config: {path} has {key!r}, which is for the command line alone")
        if action is None:
            near = nearest(name, parser.options)
            meant = f"did you mean {near!r}?" if near else "--help lists them"
            raise ValueError(
                f"config: {path} has {key!r}; allowed are the options by name: {meant}"
            )
        if action.dest in found:
            raise ValueError(f"config: {path} has {key!r} more than once; allowed is once")
        found[action.dest] = _value(f"config: {path}, {key}", value, action)
    return found


def write_config(arguments: argparse.Namespace, folder: Path) -> None:
    """Write all options of a run to `folder/config.json`, but those that were left to the program.

    Raises:
        UnwritableFileError: it could not be written.
    """
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in _NOT_IN_FILES and value is not None
    }
    write_whole(folder / NAME, (json.dumps(values, indent=2) + "\n").encode())


def _content(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"config: {path} cannot be read: {reason}") from error
    kind = "TOML" if path.suffix.lower() == ".toml" else "JSON"
    read = _toml(path).loads if kind == "TOML" else partial(json.loads, object_pairs_hook=_once)
    try:
        content = read(text)
    except (ValueError, RecursionError) as error:  # both readers' own are of the first kind
        raise ValueError(f"config: {path} is no {kind}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds {shown(content)}; allowed is one object of options")
    return content


def _toml(path: Path) -> Any:
    try:
        return importlib.import_module("tomllib")
    except ImportError as error:
        raise ValueError(
            f"config: got {path}, and this Python has no reader of TOML, which came with 3.11; allowed is JSON"
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} more than once")
    return found


def _value(where: str, value: Any, action: argparse.Action) -> Any:
    """A value as the command line would give it."""
    if action.nargs == "*":
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{where}: got {shown(value)}; allowed is a list of texts")
        return value
    of_names = action.choices is not None
    kind, name = _KINDS[bool if action.nargs == 0 else str if of_names else action.type or str]
    if action.type is float and type(value) is int:
        value = _as_float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: got {shown(value)}; allowed is {name}")
    if action.choices is not None and value not in action.choices:
        allowed = ", ".join(map(repr, action.choices))
        raise ValueError(f"{where}: got {value!r}; allowed are {allowed}")
    return Path(str(value)) if action.type is Path else value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # as the command line reads so many digits


# What stands in a file for a type of the command line.
_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (int, "an int"),
    float: (float, "a number"),
    str: (str, "a text"),
    Path: (str, "a path"),
}
