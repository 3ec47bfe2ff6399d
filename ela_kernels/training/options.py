"""What a training run is: everything that its result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ela_kernels.ebqm.settings import REMOVED
from ela_kernels.training.plain import same, shown
from ela_kernels.training.recipe import Recipe

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("one-cycle", "cosine", "constant")
# Of epochs, and of images in a batch: numbers of steps stay exact in floats.
MOST = 10**9
# Of rates: ten times as much is still a number in float32, which an optimizer makes of it.
LARGEST = 1e36
AMP = ("off", "bf16", "fp16")
# What of `task` is of the training alone: the same weights can be tested with another.
_OF_TRAINING = ("images", "drop_path", "checkpointing", "reading")


@dataclass(frozen=True)
class Options:
    """Settings of a run. They are kept in the checkpoint, and a resumed run must have equal ones.

    Attributes:
        epochs: passes over the training images.
        batch_size: images of a step, in each process.
        lr: learning rate; the highest of a one-cycle schedule.
        optimizer: `"sgd"` (Nesterov momentum) or `"adamw"`.
        schedule: `"one-cycle"`, `"cosine"` or `"constant"`.
        weight_decay: of the weights of convolutions and linear layers; norms and biases have none.
        amp: `"off"`, `"bf16"` or `"fp16"`, with autocast and for fp16 with a scaled loss.
        seed: of the weights, the order of the images, and their variation.
        channels_last: the model and its images in that memory format.
        ebqm: arguments of :class:`ela_kernels.EBQM`; what is not given follows from the length of the run. None: no
            EBQM, every layer retrieves.
        task: what else the run must agree in to be resumed, data and model by name.
        recipe: what it does beside the plain form.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.03
    optimizer: str = "sgd"
    schedule: str = "one-cycle"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    amp: str = "off"
    seed: int = 0
    augment: bool = True
    channels_last: bool = False
    ebqm: dict[str, float] | None = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(
                    f"{_flag(name)}: got {getattr(self, name)}; allowed is an int from 1 to {MOST}"
                )
        if not 0 < self.lr <= LARGEST:
            raise ValueError(
                f"lr: got {self.lr}; allowed is a positive number of at most {LARGEST:g}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: got {self.momentum}; allowed is a number in [0, 1)")
        if not 0 <= self.weight_decay <= LARGEST / max(1.0, self.lr):
            raise ValueError(
                f"weight-decay: got {self.weight_decay} with lr={self.lr}; allowed is a number of at least 0, "
                f"and at most {LARGEST:g} when multiplied with an lr above 1"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}; allowed is an int from 0 to 2**63 - 1")
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("amp", AMP)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; allowed are {', '.join(map(repr, allowed))}"
                )
        self._check_recipe()

    def _check_recipe(self) -> None:
        """Refuse what of the recipe does not go with the rest."""
        recipe = self.recipe
        if recipe.lr_warmup_epochs and self.schedule == "one-cycle":
            raise ValueError(
                f"lr-warmup-epochs: got {recipe.lr_warmup_epochs} with schedule 'one-cycle', which begins with a "
                "warm-up of its own; allowed with 'cosine' and 'constant'"
            )
        if recipe.lr_warmup_epochs >= self.epochs:
            raise ValueError(
                f"lr-warmup-epochs: got {recipe.lr_warmup_epochs} with epochs {self.epochs}; allowed is an int from 0 "
                f"to {self.epochs - 1}"
            )
        for name in recipe.of_images:
            if not self.augment:
                raise ValueError(
                    f"{_flag(name)}: got {getattr(recipe, name)!r} with --no-augment; allowed is one of them"
                )
        if recipe.mixes and self.batch_size == 1:
            raise ValueError(
                f"batch-size: got 1 with {_flag(recipe.of_images[-1])}, which mixes images of a batch; allowed is at "
                "least 2"
            )

    def as_dict(self) -> dict[str, Any]:
        """By name; of the recipe what is not the default, so that runs of before there was one go on."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
        return {**plain, **self.recipe.as_dict()}

    def ebqm_arguments(self, steps: int) -> dict[str, Any]:
        """Arguments of EBQM for a run of so many steps: a fifth of them to warm up, then some thirty decisions."""
        interval = max(1, steps // 40)
        return {
            "warmup": max(1, steps // 5),
            "interval": interval,
            "probe_interval": max(1, min(20, interval // 4)),
            # The average looks back over about one interval.
            "smoothing": max(0.5, 1 - 2 / (interval + 1)),
            **(self.ebqm or {}),
        }

    def check_same_network(self, saved: Mapping[str, Any], source: str) -> None:
        """Refuse weights of another network, or for other images. How they were trained may differ."""
        theirs = _named_as(self.task, saved.get("task"))
        # A convolutional network can be tested with images of another size, but not by oversight.
        given = self.task.get("side") is not None
        left_out = (*_OF_TRAINING, "side") if given else _OF_TRAINING
        mine, theirs = (
            _flat({k: v for k, v in task.items() if k not in left_out})
            for task in (self.task, theirs if isinstance(theirs, Mapping) else {})
        )
        advice = "Give the same ones, or all of them by --config and the config.json of that run"
        _refuse_others("evaluate", mine, theirs, source, advice)

    def check_same(self, saved: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Refuse to go on with a run that had other settings."""
        known = {**_without_removed(saved), "task": _named_as(self.task, saved.get("task"))}
        mine, theirs = _flat(self.as_dict()), _flat(known)
        advice = "Give the same ones, or train into another folder"
        _refuse_others("resume", mine, theirs, source, advice)


def _named_as(mine: Mapping[str, Any], theirs: Any) -> Any:
    """Their task, with our names of the classes where it is of before they were kept."""
    name = "class_names"
    if isinstance(theirs, Mapping) and name in mine and name not in theirs:
        return {**theirs, name: mine[name]}
    return theirs


def _told(value: Any, other: Any) -> str:
    """A value that differs from another one; of lists as long the first entry that does."""
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        return next(
            f"{shown(a)} as number {i}"
            for i, (a, b) in enumerate(zip(value, other, strict=True))
            if not same(a, b)
        )
    return shown(value)


def _refuse_others(
    argument: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], source: str, advice: str
) -> None:
    absent = object()  # not even equal to None
    names = dict.fromkeys((*mine, *theirs))
    differing = [n for n in names if not same(theirs.get(n, absent), mine.get(n, absent))]
    if "classes" in differing:
        # Their names then differ for that.
        differing = [n for n in differing if n != "class-names"]
    if differing:
        raise ValueError(
            f"{argument}: {source} was made with other settings: "
            + ", ".join(
                f"{n}={_told(theirs[n], mine.get(n)) if n in theirs else 'missing'} "
                f"(now {_told(mine[n], theirs.get(n)) if n in mine else 'missing'})"
                for n in differing[:6]
            )
            + (f" and {len(differing) - 6} more" if len(differing) > 6 else "")
            + f". {advice}"
        )


def _without_removed(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments that EBQM does not have any more set nothing in a run that goes on; its state says so."""
    ebqm = options.get("ebqm")
    if not isinstance(ebqm, Mapping):
        return options
    return {**options, "ebqm": {k: v for k, v in ebqm.items() if k not in REMOVED}}


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names that a command gives them."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name in ("task", "ebqm") and isinstance(value, Mapping):
            flat[_flag(str(name))] = {}
            prefix = "ebqm " if name == "ebqm" else ""
            flat |= {f"{prefix}{_flag(str(k))}": v for k, v in value.items()}
        else:
            flat[_flag(str(name))] = value
    return flat


def _flag(name: str) -> str:
    return name.replace("_", "-")
