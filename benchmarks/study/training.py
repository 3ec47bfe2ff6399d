"""One run: a network trained on its batches, and what is kept of it."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import ela_kernels as ek
from benchmarks.environment import cpu_name, malloc_of_process
from benchmarks.study import choice
from benchmarks.study.data import Batches
from benchmarks.study.records import Record
from benchmarks.study.settings import Settings
from benchmarks.study.variants import make_network
from ela_kernels.backends.extension import extension
from ela_kernels.models import ResNet
from ela_kernels.training.data import Task
from ela_kernels.training.optimizers import make_optimizer, make_schedule


class Run:
    """A run under way.

    Args:
        settings: what it is.
        task: the images.
        device: where the network is trained.
        paired: the finished run whose numbers of skipped layers this one takes over, where it does.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        device: torch.device | None = None,
        paired: Record | None = None,
    ) -> None:
        self.settings = settings
        self.device = torch.device("cpu") if device is None else device
        self.batches = Batches(task, settings)
        self.steps = settings.epochs * self.batches.steps
        self.network = network_of(settings, len(task.classes), task.channels).to(self.device)
        options = settings.options()
        self.optimizer = make_optimizer(self.network, options)
        per_epoch = self.batches.steps
        self.schedule = make_schedule(self.optimizer, options, self.steps, per_epoch)
        self.ebqm: ek.EBQM | None = None
        if settings.kind.chosen_by == "ebqm":
            self.ebqm = ek.EBQM(self.network, **settings.ebqm_arguments(self.steps))
        self.planned = _planned(settings, paired)
        self.done = 0
        self.seconds = 0.0

    def train(self, after_step: Callable[[], None] = lambda: None) -> Record:
        """Train to the end, and give what the file keeps."""
        losses: list[float | None] = []
        seconds: list[float] = []
        accuracies: list[list[float]] = []
        for epoch in range(1, self.settings.epochs + 1):
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            self.network.train()
            for images, labels in self.batches.epoch(epoch):
                total += self._timed_step(images.to(self.device), labels.to(self.device))
                after_step()
            loss = float(total) / self.batches.steps
            losses.append(round(loss, 6) if math.isfinite(loss) else None)
            seconds.append(round(self.seconds, 4))
            if epoch % self.settings.test_every == 0 or epoch == self.settings.epochs:
                accuracies.append([epoch, self.test()])
        return {
            "settings": self.settings.as_dict(),
            "machine": machine(self.device),
            "steps": self.steps,
            "train_loss": losses,
            "test_accuracy": accuracies,
            "training_seconds": seconds,
            "skipping": self._skipping(),
            **({"left_out": self.left_out()} if self.settings.kind.tolerance else {}),
        }

    @torch.no_grad()
    def left_out(self) -> list[float]:
        """Of each layer the share of retrievals that its tolerance leaves out, on a batch of test images."""
        self.network.eval()
        images, _ = next(iter(self.batches.test()))
        found = ek.explain(self.network, images.to(self.device))
        return [round(layer.left_out, 4) for layer in found if layer.left_out is not None]

    @torch.no_grad()
    def test(self) -> float:
        """Share of the test images that are recognised."""
        self.network.eval()
        right = seen = 0
        for images, labels in self.batches.test():
            scores = self.network(images.to(self.device))
            right += int((scores.argmax(1).cpu() == labels).sum())
            seen += len(labels)
        return right / seen

    @property
    def layers(self) -> list[list[ek.ELA]]:
        """The layers that can be skipped, by stage."""
        stages = self.network.attentions
        return [[m for m in stage.children() if isinstance(m, ek.ELA)] for stage in stages]

    def _timed_step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        start = self._now()
        loss = F.cross_entropy(self.network(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.ebqm is not None:
            self.ebqm.step()
        self.seconds += self._now() - start
        self.done += 1
        skipped = self.planned.get(self.done)
        if skipped is not None:
            for stage, decided in zip(self.layers, skipped, strict=True):
                for layer, value in zip(stage, decided, strict=True):
                    layer.skipped = value
        return loss.detach()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _skipping(self) -> dict[str, Any] | None:
        """What was skipped when; None of a network whose layers cannot be skipped.

        `share` is the mean over all steps of the share of layers that were skipped in it. `decisions` has an entry for
        each time that something was decided: the step after which it held, and of each stage a digit a layer, 1 where
        it is skipped; from EBQM the divergences and scores too, layer by layer.
        """
        stages = [len(stage) for stage in self.layers]
        if not sum(stages):
            return None
        decisions: list[dict[str, Any]] = []
        if self.ebqm is not None:
            for d in self.ebqm.report().decisions:
                digits = _digits(_by_stage(d.skipped, stages))
                seen = {"divergence": _rounded(d.divergence), "score": _rounded(d.score)}
                decisions.append({"step": d.step, "skipped": digits, **seen})
        else:
            decisions = [{"step": s, "skipped": _digits(x)} for s, x in self.planned.items()]
        return {
            "stages": stages,
            "share": round(mean_share(decisions, stages, self.steps), 6),
            "decisions": decisions,
        }


def network_of(settings: Settings, classes: int, channels: int) -> ResNet:
    """The network of a run as it begins."""
    kind = settings.kind
    options: dict[str, Any] = {} if kind.skip is None else {"skip": kind.skip}
    if kind.tolerance:
        options["tolerance"] = kind.tolerance
    return make_network(
        kind.attention, settings.blocks, classes, channels, settings.seed, **options
    )


def mean_share(decisions: list[dict[str, Any]], stages: list[int], steps: int) -> float:
    """The mean over all steps of the share of layers skipped in it."""
    total = 0
    ends = [*(d["step"] for d in decisions), steps][1:]
    for decision, end in zip(decisions, ends, strict=True):
        total += (end - decision["step"]) * sum(s.count("1") for s in decision["skipped"])
    return total / (steps * sum(stages))


def _planned(settings: Settings, paired: Record | None) -> dict[int, choice.Skipped]:
    """What is skipped after which step, where it is known before."""
    partner = settings.paired()
    if partner is None:
        return {}
    if paired is None or paired["settings"] != partner.as_dict() or paired["skipping"] is None:
        raise ValueError(
            f"variants: got {settings.variant!r} without the finished run {partner.key} that it is paired with; "
            f"allowed is {partner.variant!r} before it"
        )
    skipping = paired["skipping"]
    order = choice.ranking(
        skipping["stages"],
        settings.max_row,
        f"{settings.seed} {settings.depth} {settings.kind.skip}",
    )
    planned = {}
    for decision in skipping["decisions"]:
        theirs = [[digit == "1" for digit in stage] for stage in decision["skipped"]]
        if settings.kind.chosen_by == "random":
            planned[decision["step"]] = choice.at_random(theirs, order)
        else:
            planned[decision["step"]] = choice.the_last(theirs)
    return planned


def _by_stage(skipped: list[bool], stages: list[int]) -> choice.Skipped:
    rest = iter(skipped)
    return [[next(rest) for _ in range(count)] for count in stages]


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(x, 4) if math.isfinite(x) else None for x in values]


def _digits(skipped: choice.Skipped) -> list[str]:
    return ["".join("1" if s else "0" for s in stage) for stage in skipped]


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made, as far as that is public."""
    module = extension()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "threads": torch.get_num_threads(),
        "simd_level": None if module is None else module.simd_level(),
        "malloc": malloc_of_process(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ela_kernels": ek.__version__,
    }
