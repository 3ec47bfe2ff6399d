"""What a conversion did."""

from __future__ import annotations

import textwrap
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
        lines = [f"{len(self.converted)} converted, {len(self.left)} left"]
        for did, names in (("converted", self.converted), ("left", self.left)):
            for what in dict.fromkeys(names.values()):
                alike = [
                    name or "(the model itself)" for name, other in names.items() if other == what
                ]
                lines.append(f"{did}, {len(alike)}: {what}")
                lines += textwrap.wrap(
                    ", ".join(alike), 116, initial_indent="    ", subsequent_indent="    "
                )
        return "\n".join(lines)
