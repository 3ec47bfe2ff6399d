"""What a conversion did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConversionReport:
    """Which modules of a model run on our layers now, and why others do not. `print` shows it as a table.

    Attributes:
        converted: name of each converted module, as `named_modules()` has it, and what it is now.
        left: name of each module that has the parameters of layer attention and was left as it is, and why.
    """

    converted: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.converted and not self.left:
            return "nothing to convert: no module has Wq, Wk and Wv"
        rows = [
            (name or "(the model itself)", "converted", what)
            for name, what in self.converted.items()
        ]
        rows += [(name or "(the model itself)", "left", why) for name, why in self.left.items()]
        width = max(len(row[0]) for row in rows)
        head = f"{len(self.converted)} converted, {len(self.left)} left"
        return "\n".join(
            (head, *(f"{name.ljust(width)}  {did:<9}  {what}" for name, did, what in rows))
        )
