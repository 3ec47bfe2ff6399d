"""Tables of finished runs, as Markdown: accuracy with paired differences, and decisions over time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.study.records import Record
from benchmarks.study.settings import key_of
from benchmarks.study.variants import CHOICES, VARIANTS
from benchmarks.tables import table

# Of training, at which decisions are shown.
MOMENTS = (0.25, 0.5, 0.75, 1.0)


class Mean(NamedTuple):
    """A mean over seeds, its standard error (NaN of a single one), and of how many."""

    mean: float
    error: float
    number: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean, with the standard deviation of the values (n - 1) over the root of their number."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Mean(statistics.fmean(values), error, count)


def paired(mine: Mapping[int, float], other: Mapping[int, float]) -> Mean | None:
    """Mean and standard error of the differences, seed by seed; None where no seed has both."""
    seeds = sorted(mine.keys() & other.keys())
    return mean_of([mine[s] - other[s] for s in seeds]) if seeds else None


class Group(NamedTuple):
    """Runs that differ in nothing but variant and seed."""

    settings: dict[str, Any]
    runs: dict[str, dict[int, Record]]

    @property
    def title(self) -> str:
        s = self.settings
        images = "all" if s["train_images"] is None else s["train_images"]
        side = "" if s["side"] is None else f" at {s['side']}x{s['side']}"
        return (
            f"{s['data']}{side}, resnet{s['depth']}: {s['epochs']} epochs of {images} images, batch {s['batch']}, "
            f"highest learning rate {s['lr']:g}"
        )

    def values(self, variant: str, value: Callable[[Record], float]) -> dict[int, float]:
        """A number of each run of a variant, by seed."""
        return {seed: value(record) for seed, record in self.runs.get(variant, {}).items()}

    @property
    def variants(self) -> list[str]:
        """Those that were run, in the order of the study."""
        known = [name for name in VARIANTS if name in self.runs]
        return known + sorted(self.runs.keys() - set(known))


def groups(records: Sequence[Record]) -> list[Group]:
    """The runs by what they have in common, in the order in which they first come."""
    found: dict[str, Group] = {}
    for record in records:
        settings = dict(record["settings"])
        variant, seed = settings.pop("variant"), settings.pop("seed")
        group = found.setdefault(key_of(settings), Group(settings, {}))
        group.runs.setdefault(variant, {})[seed] = record
    return list(found.values())


def accuracy(record: Record) -> float:
    """In percent, of the test images after the last epoch."""
    return 100 * float(record["test_accuracy"][-1][1])


def seconds(record: Record) -> float:
    """Of all training steps."""
    return float(record["training_seconds"][-1])


def skipped_share(record: Record) -> float:
    """In percent of the layers, over all steps."""
    skipping = record["skipping"]
    return 0.0 if skipping is None else 100 * float(skipping["share"])


def accuracy_tables(records: Sequence[Record]) -> str:
    """For each depth and data: every variant with its differences to `mrla` and `plain`, and EBQM against chance."""
    lines = []
    for group in groups(records):
        rows = []
        for name in group.variants:
            found = group.values(name, accuracy)
            differences = [
                "" if name == base else show(paired(found, group.values(base, accuracy)), True)
                for base in ("mrla", "plain")
            ]
            share = mean_of(list(group.values(name, skipped_share).values())).mean
            rows.append(
                [
                    name,
                    str(len(found)),
                    show(mean_of(list(found.values()))),
                    *differences,
                    f"{share:.0f}" if share else "",
                    f"{mean_of(list(group.values(name, seconds).values())).mean:.0f}",
                ]
            )
        head = ["variant", "seeds", "accuracy, %", "to mrla, points", "to plain, points"]
        head += ["layers skipped, %", "steps, s"]
        lines += [group.title, "", *table(head, rows), ""]
        lines += [*_against_chance(group), *_notes(group)]
    return _text(lines)


def _against_chance(group: Group) -> list[str]:
    """EBQM's choice of layers against as many others."""
    rows = []
    others = [prefix for prefix, chosen_by in CHOICES.items() if chosen_by != "ebqm"]
    for name in group.variants:
        variant = VARIANTS.get(name)
        if variant is None or variant.chosen_by != "ebqm":
            continue
        mine = group.values(name, accuracy)
        found = [
            paired(mine, group.values(f"{prefix}-{variant.skip}", accuracy)) for prefix in others
        ]
        if any(found):
            rows.append([name, *(show(difference, True) for difference in found)])
    if not rows:
        return []
    head = ["chosen by EBQM", *(f"to {prefix}, points" for prefix in others)]
    return [*table(head, rows), ""]


def _notes(group: Group) -> list[str]:
    diverged = [
        f"{name} with seed {seed}"
        for name in group.variants
        for seed, record in sorted(group.runs[name].items())
        if None in record["train_loss"]
    ]
    if not diverged:
        return []
    return [
        f"A loss that was not finite, counted with the accuracy it led to: {', '.join(diverged)}.",
        "",
    ]


def decision_tables(records: Sequence[Record]) -> str:
    """For each depth and data: how many layers EBQM skipped when, how often it changed its mind, and which layers."""
    lines = []
    for group in groups(records):
        rows, places = [], []
        for name in group.variants:
            variant = VARIANTS.get(name)
            if variant is None or variant.chosen_by != "ebqm":
                continue
            runs = [record for _, record in sorted(group.runs[name].items())]
            counts = [
                show(mean_of([skipped_at(run, moment) for run in runs]), digits=1)
                for moment in MOMENTS
            ]
            changes = [changes_of(run) for run in runs]
            dropped, back = (mean_of([float(c[i]) for c in changes]).mean for i in (0, 1))
            layers = sum(runs[0]["skipping"]["stages"])
            rows.append(
                [name, str(len(runs)), str(layers), *counts, f"{dropped:.1f}", f"{back:.1f}"]
            )
            places.append([name, *(" ".join(map(str, stage)) for stage in at_the_end(runs))])
        if not rows:
            continue
        head = ["variant", "seeds", "layers"]
        head += [f"skipped at {m:.0%}" for m in MOMENTS] + ["times dropped", "came back"]
        lines += [group.title, "", *table(head, rows), ""]
        stages = [f"stage {i + 1}" for i in range(len(places[0]) - 1)]
        lines += [
            "In how many of the runs each layer is skipped at the end, first to last of a stage:",
            "",
        ]
        lines += [*table(["variant", *stages], places), ""]
    return _text(lines)


def skipped_at(record: Record, moment: float) -> float:
    """How many layers are skipped in the step at that share of the training."""
    step = moment * record["steps"]
    count = 0
    for decision in record["skipping"]["decisions"]:
        # What is decided after a step holds from the next one on; at the end, the last decision counts.
        if decision["step"] < step or moment == 1.0:
            count = sum(stage.count("1") for stage in decision["skipped"])
    return float(count)


def changes_of(record: Record) -> tuple[int, int]:
    """How often a layer was dropped, and how often one came back."""
    dropped = back = 0
    before = "0" * sum(record["skipping"]["stages"])
    for decision in record["skipping"]["decisions"]:
        now = "".join(decision["skipped"])
        dropped += sum(a == "0" and b == "1" for a, b in zip(before, now, strict=True))
        back += sum(a == "1" and b == "0" for a, b in zip(before, now, strict=True))
        before = now
    return dropped, back


def at_the_end(runs: Sequence[Record]) -> list[list[int]]:
    """In how many runs each layer is skipped at the end, stage by stage."""
    counts = [[0] * count for count in runs[0]["skipping"]["stages"]]
    for run in runs:
        decisions = run["skipping"]["decisions"]
        for stage, digits in zip(
            counts, decisions[-1]["skipped"] if decisions else (), strict=False
        ):
            for i, digit in enumerate(digits):
                stage[i] += digit == "1"
    return counts


def show(found: Mean | None, signed: bool = False, digits: int = 2) -> str:
    """`mean ± standard error`; with the number of pairs where it is a difference."""
    if found is None:
        return "-"
    number = f"{found.mean:{'+' if signed else ''}.{digits}f}"
    error = "" if math.isnan(found.error) else f" ± {found.error:.{digits}f}"
    return f"{number}{error}" + (f" ({found.number})" if signed else "")


def _text(lines: list[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n" if lines else "No runs.\n"
