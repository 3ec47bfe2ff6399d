"""What is told once a process, by whichever thread comes first."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Once:
    """Remembers what was told, up to a bound.

    Who tells does so after :meth:`new`, and not under a lock: whoever handles the message may run a layer.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def new(self, texts: Iterable[str]) -> list[str]:
        """Those of `texts` that were not told yet, and count as told from now on."""
        if self._told.issuperset(texts := tuple(texts)):
            return []
        with self._lock:  # two threads at once would each find that it was not said yet
            found = [text for text in dict.fromkeys(texts) if text not in self._told]
            found = found[: self._most - len(self._told)]
            self._told.update(found)
        return found

    def clear(self) -> None:
        """Nothing was told."""
        self._told.clear()
