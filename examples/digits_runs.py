"""The runs of digits_demo.py: what is trained, how it is timed and measured."""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ela_kernels as ek
from ela_kernels.models import CifarResNet
from ela_kernels.training.data import Task, load_task


@dataclass(frozen=True)
class Plan:
    """What is the same for all runs."""

    blocks: tuple[int, ...] = (9, 9, 9)
    widths: tuple[int, ...] = (16, 32, 64)
    side: int = 16
    batch: int = 64
    epochs: int = 10
    learning_rate: float = 0.03
    train_images: int | None = None
    test_images: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Variant:
    """One of the networks that are compared."""

    key: str
    title: str
    options: dict[str, Any]


VARIANTS = (
    Variant("none", "plain residual", {"attention": "none"}),
    Variant("mrla", "MRLA, concatenating", {"attention": "mrla", "fused": False}),
    Variant("ela", "ELA, fused, EBQM", {"attention": "ela"}),
)


class Digits:
    """scikit-learn's handwritten digits, enlarged to `side` pixels; the same split always."""

    def __init__(self, plan: Plan) -> None:
        task: Task = load_task("digits", side=plan.side)
        train = torch.arange(len(task.train))[: plan.train_images]
        test = torch.arange(len(task.test))[: plan.test_images]
        self.images, self.labels = task.train.read(train), task.train.labels[train]
        self.test_images, self.test_labels = task.test.read(test), task.test.labels[test]
        self.steps = len(train) // plan.batch
        self._plan = plan

    def batches(self, epoch: int) -> list[Tensor]:
        """Indices of the epoch's batches, the same for every run."""
        generator = torch.Generator().manual_seed(1000 * self._plan.seed + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        return list(order[: self.steps * self._plan.batch].split(self._plan.batch))


@dataclass
class Record:
    """What a run leaves behind for the table and the pictures."""

    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # on the test images, one an epoch
    training_seconds: list[float] = field(default_factory=list)  # so far, at each of these


class Run:
    """One network in training."""

    def __init__(self, variant: Variant, plan: Plan, digits: Digits) -> None:
        torch.manual_seed(plan.seed)
        self.variant, self.digits, self.record = variant, digits, Record()
        self.model = CifarResNet(plan.blocks, plan.widths, in_chans=1, **variant.options)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=plan.learning_rate,
            momentum=0.9,
            weight_decay=5e-4,
            nesterov=True,
        )
        total = plan.epochs * digits.steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=plan.learning_rate, total_steps=total, pct_start=0.3
        )
        self.ebqm = watch(self.model, total, digits.steps) if variant.key == "ela" else None

    def timed_step(self, batch: Tensor) -> None:
        """Train on the images with these indices, and keep how long it took."""
        self.model.train()
        images, labels = self.digits.images[batch], self.digits.labels[batch]
        start = time.perf_counter()
        loss = self._step(images, labels)
        self.record.step_seconds.append(time.perf_counter() - start)
        self.record.losses.append(loss)

    def end_epoch(self) -> None:
        """Test, outside of the time that is reported."""
        self.record.accuracies.append(self.test())
        self.record.training_seconds.append(math.fsum(self.record.step_seconds))

    def _step(self, images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.ebqm is not None:
            self.ebqm.step()
        return float(loss.detach())

    @torch.no_grad()
    def test(self) -> float:
        """Share of the test images that are recognised."""
        self.model.eval()
        parts = self.digits.test_images.split(180)
        found = torch.cat([self.model(images).argmax(1) for images in parts])
        return float((found == self.digits.test_labels).float().mean())

    @property
    def skipped(self) -> int:
        """Number of layers that are skipped now."""
        return sum(m.skipped for m in self.model.modules() if isinstance(m, ek.ELA))

    def median_step(self, last: int | None = None) -> float:
        """Median of the steps' seconds, of all of them or of the last so many."""
        return statistics.median(self.record.step_seconds[-last if last else 0 :])

    def peak_memory(self, plan: Plan) -> int:
        """Bytes of tensors at the peak of one step beyond what stays, by a copy of the model as it is now."""
        model = copy.deepcopy(self.model).train()
        images, labels = (t[: plan.batch] for t in (self.digits.images, self.digits.labels))

        def step() -> None:
            F.cross_entropy(model(images), labels).backward()

        step()  # makes the gradients, which stay
        return profiled_peak(step)


def watch(model: nn.Module, steps: int, epoch: int) -> ek.EBQM:
    """EBQM with settings for a training run of some hundred steps; the package's are for thousands.

    It looks on for the first fifth, decides twice an epoch from then on, and averages over about ten steps.
    """
    interval = max(epoch // 2, 1)
    return ek.EBQM(
        model,
        warmup=max(steps // (5 * interval), 1) * interval,
        interval=interval,
        probe_interval=max(interval // 2, 1),
        smoothing=0.9,
    )


def profiled_peak(step: Callable[[], object]) -> int:
    """Most bytes that PyTorch's CPU allocator held at once during `step`, beyond what it held before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@torch.no_grad()
def attention_weights(model: nn.Module, images: Tensor) -> list[list[list[float] | None]]:
    """For each stage and layer its weights over the layers so far, averaged over images and heads.

    None stands for a layer that retrieved nothing.
    """
    stages: list[list[list[float] | None]] = []
    handles = []
    for i, stage in enumerate(model.attentions):
        stages.append([None] * len(stage))
        for j, layer in enumerate(stage):

            def keep(
                _: nn.Module, args: tuple[Any, ...], __: Tensor, i: int = i, j: int = j
            ) -> None:
                stages[i][j] = args[1].weights.float().mean((0, 1)).tolist()

            handles.append(layer.attn.register_forward_hook(keep))
    model.eval()
    # Hooks keep the kernels from whole blocks, which would be told as if somebody had to mend it.
    with ek.use_backend("eager"):
        model(images)
    for handle in handles:
        handle.remove()
    return stages


def faster_threads(plan: Plan, digits: Digits) -> int:
    """One thread or PyTorch's own number: whichever trains faster here and now.

    Threads that wait for one another lose much where other programs run on the same cores.
    """
    seconds = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        run = Run(VARIANTS[-1], plan, digits)
        for batch in (digits.batches(0) * 4)[:4]:
            run.timed_step(batch)
        seconds[threads] = min(run.record.step_seconds[1:])
    return min(seconds, key=lambda threads: seconds[threads])
