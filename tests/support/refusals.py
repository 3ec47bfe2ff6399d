"""What a refusal has to say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest


def assert_refused(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    error: type[Exception],
    name: str,
    *words: str,
) -> None:
    """`function` raises `error`, and the message names the argument, holds all `words` and says what is allowed.

    A word is one of several where they are separated by `|`.
    """
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert caught.type is error  # not a subclass that PyTorch raised on its own
    assert re.match(rf"{re.escape(name)}: got ", message), message
    assert "allowed" in message
    for word in words:
        assert any(part in message for part in word.split("|")), f"{word!r} in {message!r}"
