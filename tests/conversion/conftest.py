"""What tests of converted networks share."""

from __future__ import annotations

import pytest
from torch import Tensor

from ela_kernels.conversion.handshake import MAP
from ela_kernels.conversion.stacked import Lazy


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the maps that were made of stand-ins."""
    found: list[tuple[int, ...]] = []
    real = Lazy.make

    def make(self: Lazy) -> Tensor:
        # Not those of the handshake's small maps.
        if self.made is None and self.dim() > 3 and self.shape[-2:] != MAP:
            found.append(tuple(self.shape))
        return real(self)

    monkeypatch.setattr(Lazy, "make", make)
    return found
