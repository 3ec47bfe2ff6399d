"""What a run of the study is: everything that its result depends on, and the order in which runs are made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ela_kernels as ek
from benchmarks.study.variants import GROUPS, VARIANTS, Variant
from ela_kernels.training.options import MOST, Options

DATA = ("fashion-mnist", "digits", "cifar10", "cifar100")
ORDERS = ("seed", "depth")
# Three stages of two convolutions a block, a stem and a classifier.
LEAST_DEPTH, MOST_DEPTH = 8, 1202


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        variant: a name of :data:`benchmarks.study.variants.VARIANTS`.
        depth: of the network, 6 n + 2: n basic blocks in each of three stages.
        data: a name of :data:`DATA`.
        seed: of the weights, the choice and order of the images, their variation, and what is skipped at random.
        side: height and width that the images are averaged down to; None: as they are.
        epochs, batch, lr, weight_decay, momentum: of SGD with Nesterov's momentum and a one-cycle schedule.
        train_images: so many of the training images, chosen by the seed; None: all.
        test_images: so many of the test images, the first ones, whatever the seed; None: all.
        test_every: epochs between tests; the last epoch is always tested.
        low, high, max_share, max_row: of :class:`ela_kernels.EBQM`.
    """

    variant: str
    depth: int
    data: str
    seed: int
    side: int | None = None
    epochs: int = 10
    batch: int = 128
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    train_images: int | None = None
    test_images: int | None = None
    test_every: int = 1
    low: float = 0.2
    high: float = 0.3
    max_share: float = 0.5
    max_row: int = 3

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("variants", self.variant, tuple(VARIANTS)),
            ("data", self.data, DATA),
        ):
            if value not in allowed:
                raise ValueError(f"{option}: got {value!r}; allowed are {', '.join(allowed)}")
        if (self.depth - 2) % 6 or not LEAST_DEPTH <= self.depth <= MOST_DEPTH:
            raise ValueError(
                f"depths: got {self.depth}; allowed are 6 n + 2 from {LEAST_DEPTH} to {MOST_DEPTH}, for instance 20, "
                "56, 110"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seeds: got {self.seed}; allowed are ints from 0 to 2**31 - 1")
        self.options()
        if not 2 <= self.batch <= MOST:
            raise ValueError(
                f"batch: got {self.batch}; allowed is an int of at least 2, as a batch norm needs two images"
            )
        for name in ("train_images", "test_images", "test_every"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise ValueError(
                    f"{name.replace('_', '-')}: got {value}; allowed is an int from 1 to {MOST}"
                )
        # EBQM's own checks name its arguments, which are options of the same names.
        ek.EBQM(ek.ELA(16), **self.guards)

    @property
    def kind(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def blocks(self) -> int:
        """Residual blocks of each stage, and layers of attention in it."""
        return (self.depth - 2) // 6

    @property
    def guards(self) -> dict[str, Any]:
        """Arguments of EBQM that the study sets."""
        return {n: getattr(self, n) for n in ("low", "high", "max_share", "max_row")}

    def options(self) -> Options:
        """The same for the package's optimizer and schedule, which refuse what does not fit."""
        return Options(
            epochs=self.epochs,
            batch_size=self.batch,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
        )

    def ebqm_arguments(self, steps: int) -> dict[str, Any]:
        """Arguments of EBQM for a run of so many steps: a fifth of them to warm up, then some thirty decisions."""
        interval = max(1, steps // 40)
        return {
            **self.guards,
            "warmup": max(1, steps // 5),
            "interval": interval,
            "probe_interval": max(1, min(20, interval // 4)),
            # The average looks back over about one interval.
            "smoothing": max(0.5, 1 - 2 / (interval + 1)),
        }

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def key(self) -> str:
        """The run's name in a file: equal where the settings are."""
        return key_of(self.as_dict())

    def paired(self) -> Settings | None:
        """The run whose number of skipped layers this one takes over; None where it needs none."""
        partner = self.kind.partner
        return None if partner is None else dataclasses.replace(self, variant=partner)


def key_of(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def expanded(names: Sequence[str]) -> list[str]:
    """The variants of names among which there may be groups, such as `ela` for all its skip modes.

    Raises:
        ValueError: an unknown name.
    """
    found: list[str] = []
    for name in names:
        if name not in GROUPS and name not in VARIANTS:
            raise ValueError(
                f"variants: got {name!r}; allowed are {', '.join((*VARIANTS, *GROUPS))}"
            )
        found += [n for n in GROUPS.get(name, (name,)) if n not in found]
    return found


def plan_runs(
    seeds: Sequence[int],
    depths: Sequence[int],
    variants: Sequence[str],
    order: str = "seed",
    **shared: Any,
) -> list[Settings]:
    """All runs in their order: by `order`, the variants innermost, so that what is cut off leaves whole pairs.

    Whoever needs another run's decisions comes after it.
    """
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}; allowed are {', '.join(ORDERS)}")
    for name, values in (("seeds", seeds), ("depths", depths), ("variants", variants)):
        if not values or len(set(values)) != len(values):
            raise ValueError(
                f"{name}: got {list(values)}; allowed is at least one, each of them once"
            )
    names = sorted(
        expanded(variants), key=lambda name: name in VARIANTS and VARIANTS[name].partner is not None
    )
    outer = [(s, d) for s in seeds for d in depths]
    if order == "depth":
        outer = [(s, d) for d in depths for s in seeds]
    return [Settings(name, d, seed=s, **shared) for s, d in outer for name in names]
