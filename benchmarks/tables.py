"""What tables of results are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

Results = dict[str, Any]


class Target(NamedTuple):
    """A number to reach, and what was measured."""

    what: str
    shape: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """True when the measured number reaches the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def time_cell(ms: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{ms['median']:.1f} [{ms['q1']:.1f}, {ms['q3']:.1f}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table in Markdown, its columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def machine_sentence(results: Results) -> str:
    """The sentence without which times mean nothing."""
    machine = results["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{threads} of an {machine['cpu']} ({machine['simd_level']}), torch {machine['torch']}, "
        f"{machine['date'][:10]}."
    )
