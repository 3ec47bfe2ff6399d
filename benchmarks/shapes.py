"""The stages that are measured."""

from __future__ import annotations

from typing import NamedTuple


class StageShape(NamedTuple):
    """A stage of `depth` layers on feature maps `[batch, channels, size, size]`."""

    depth: int
    batch: int
    channels: int
    size: int
    head_dim: int

    @property
    def heads(self) -> int:
        """Number of heads G."""
        return self.channels // self.head_dim

    @property
    def map_elements(self) -> int:
        """Elements of one feature map."""
        return self.batch * self.channels * self.size * self.size

    @property
    def name(self) -> str:
        """As :func:`parse_shape` takes it."""
        return "x".join(str(n) for n in self)

    def __str__(self) -> str:
        return f"T={self.depth} [{self.batch}, {self.channels}, {self.size}, {self.size}] D={self.head_dim}"


# Stages of residual networks: ResNet-50 at 224 (first and third), a CIFAR network, ResNet-101's third stage.
STAGES = (
    StageShape(3, 8, 256, 56, 16),
    StageShape(6, 8, 1024, 14, 16),
    StageShape(12, 32, 64, 32, 32),
    StageShape(23, 4, 1024, 14, 16),
)

QUICK_STAGES = (StageShape(12, 4, 256, 14, 16),)

SMOKE_STAGES = (StageShape(3, 2, 16, 6, 8),)

# So small that nothing but Python, autograd and the calls themselves is left.
OVERHEAD_STAGE = StageShape(12, 1, 16, 4, 16)


def parse_shape(text: str) -> StageShape:
    """`TxBxCxHxD`, for instance `6x8x1024x14x16`: depth, batch, channels, height = width, head_dim."""
    try:
        numbers = [int(part) for part in text.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or min(numbers) < 1 or numbers[2] % numbers[4]:
        raise ValueError(
            f"shape: got {text!r}; allowed is TxBxCxHxD, five positive integers with D a divisor of C, "
            "for instance 6x8x1024x14x16"
        )
    return StageShape(*numbers)
