"""The training loop: exact to the bit on the CPU, whether or not it was interrupted in between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ela_kernels.command_line import counted
from ela_kernels.ebqm import EBQM, spare_skipped
from ela_kernels.modules import ELA
from ela_kernels.training.average import Average
from ela_kernels.training.dead import check_single_image, dead_norms, run_once
from ela_kernels.training.finite import Watch, first_not_finite
from ela_kernels.training.logs import STEP_COLUMNS, columns_of
from ela_kernels.training.optimizers import make_optimizer, make_schedule
from ela_kernels.training.options import Options
from ela_kernels.training.processes import Processes
from ela_kernels.training.reading import Part, Shares, batches
from ela_kernels.training.recipe import mixed
from ela_kernels.training.scoring import (
    TOP,
    Scores,
    evaluation_of,
    results_of,
    right_among_five,
    totals,
)
from ela_kernels.training.state import check_state, check_weights

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; its state is one that it can go on from."""


class Trainer:
    """A model in training, and everything that its next step depends on.

    Args:
        model: gives class scores `[B, classes]` of images. EBQM joins in if it has ELA layers, unless the options leave
            EBQM out.
        task: the images; a :class:`ela_kernels.training.data.ClassTask`.
        options: the settings.
        device: where to train.
        processes: the processes of the run; the model is then wrapped in `DistributedDataParallel`.
        stopping: asked between steps; the run stops with :class:`Interrupted` once it gives something other than 0.
        workers: processes that read the next batches ahead; with 0 a batch is read when it is needed. The images are
            the same.
        compiled: train the model as `torch.compile` has it. It is evaluated, and saved, as it is.
    """

    # What a row of the log of steps has.
    step_columns: tuple[str, ...] = STEP_COLUMNS
    # Whether the model is given the labels too when it trains.
    takes_labels = False

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        options: Options,
        device: torch.device | None = None,
        processes: Processes | None = None,
        stopping: Callable[[], int] = lambda: 0,
        workers: int = 0,
        compiled: bool = False,
    ) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.processes = Processes() if processes is None else processes
        self._format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = model.to(self.device)
        if options.channels_last:
            # PyTorch's annotations of Module.to know no memory format by itself.
            self.model = self.model.to(memory_format=self._format)  # type: ignore[call-overload]
        self.task, self.options, self.stopping, self.workers = task, options, stopping, workers
        self.steps_per_epoch = len(task.train) // (options.batch_size * self.processes.count)
        if self.steps_per_epoch == 0:
            among = counted(self.processes.count, "process", "processes")
            raise ValueError(
                f"batch-size: got {options.batch_size} in {among} for {len(task.train)} training images; allowed "
                "is one that at least one batch can be filled with, here up to "
                f"{len(task.train) // self.processes.count}"
            )
        if options.batch_size == 1:
            self._check_single_image()
        steps = options.epochs * self.steps_per_epoch
        self.optimizer = make_optimizer(self.model, options)
        self.schedule = make_schedule(self.optimizer, options, steps, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        # Before EBQM watches the layers: it watches those that train.
        averaged, count = options.recipe.model_ema, self.processes.count
        self.average = Average(self.model, options, count) if averaged else None
        has_ela = any(isinstance(m, ELA) for m in model.modules())
        if has_ela:
            spare_skipped(self.optimizer, self.model)
        watched = has_ela and options.ebqm is not None
        self.ebqm = EBQM(model, **options.ebqm_arguments(steps)) if watched else None
        self.parallel: nn.Module = self.model
        if self.processes.count > 1:
            self.parallel = nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
            )
        if compiled:
            if has_ela:
                # Graphs take no note of who reads whose pair, and a run that goes on would know less of it.
                run_once(self.model, self._first_images())
            self.parallel = torch.compile(self.parallel)  # type: ignore[assignment]
        self._read = mixed(task.read, options.recipe, len(task.classes))
        place = self.processes.rank, self.processes.count
        self._shares = Shares(options.seed, options.batch_size, *place, options.augment)
        self.epoch = 0
        self.batch = 0  # steps done in this epoch
        self.seconds = 0.0  # of training, reading the images included and evaluation not
        self._lap = 0.0
        self.history: list[dict[str, float]] = []
        self._totals = self._no_totals()
        self._reported = self._no_totals()  # the part of them that latest() has given
        self._watch = Watch(options, self.processes, self.device)
        if self.processes.rank:
            torch.manual_seed(options.seed + self.processes.rank)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row of the history has."""
        return columns_of(self._has_top, self.average is not None)

    @property
    def steps(self) -> int:
        """Training steps done so far."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def done(self) -> bool:
        return self.epoch >= self.options.epochs

    @property
    def layers_skipped(self) -> int:
        """How many layers EBQM has skip now."""
        return sum(m.skipped for m in self.model.modules() if isinstance(m, ELA))

    def run_epoch(self, on_step: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Train to the end of the epoch under way, and evaluate; the new row of :attr:`history`.

        Args:
            on_step: called after every step.

        Raises:
            Interrupted: `stopping` said so. The state is whole, and :meth:`run_epoch` goes on from it.
            NotFiniteError: a loss is NaN or infinite, in all processes alike. The state is of no use then.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        self.parallel.train()
        self._lap = time.perf_counter()
        for images, labels in self._rest_of_epoch():
            self._step(images, labels)
            self.batch += 1
            self._count_time()
            if self._watch.is_due(self.steps):
                self._watch.look(self.steps)
            on_step()
            lr = self.optimizer.param_groups[0]["lr"]
            self._stop_if_asked()
        self._watch.look(self.steps)
        train_loss, train_accuracy = self._means(self._totals)
        # Reading the totals waited for the device.
        self._count_time()
        found = {
            "epoch": self.epoch + 1,
            "step": self.steps,
            "lr": lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            **self._tested(),
            "seconds": self.seconds,
            "layers_skipped": self.layers_skipped,
        }
        row = {name: found[name] for name in self.columns}
        self.history.append(row)
        self.epoch, self.batch = self.epoch + 1, 0
        self._totals, self._reported = self._no_totals(), self._no_totals()
        return row

    def latest(self) -> dict[str, float]:
        """Means over the steps since the last call, or since the epoch began. All processes must call it alike."""
        loss, accuracy = self._means(self._totals - self._reported)
        self._reported = self._totals.clone()
        found = {
            "step": self.steps,
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": loss,
            "accuracy": accuracy,
            "seconds": self.seconds,
            "layers_skipped": self.layers_skipped,
        }
        return {name: found[name] for name in self.step_columns}

    def results(self) -> list[tuple[str, str]]:
        """What was reached, to be read: names and values."""
        return results_of(self.history)

    def epoch_text(self, row: Mapping[str, float]) -> str:
        """How an epoch went, for the progress bar."""
        return f"test accuracy {row['test_accuracy']:.2%}"

    def evaluate(self) -> Any:
        """Mean loss and accuracies on the test images."""
        return self._scores(self.model)

    def evaluation(self) -> list[Sequence[str]]:
        """What the model, and its average where there is one, reach on the test images: a table's head and rows."""
        found = {"model": self.evaluate()}
        if self.average is not None:
            found["average"] = self._scores(self.average.model)
        return evaluation_of(found, self._has_top)

    @torch.no_grad()
    def _scores(self, model: nn.Module) -> Scores:
        training = model.training
        model.eval()
        self.processes.copy_first(model.buffers())
        # Losses, right answers, images; right answers among the five likeliest.
        found = torch.zeros(4, dtype=torch.float64, device=self.device)
        parts = self._shares.of_tests(len(self.task.test))
        for images, labels in batches(self.task.read, parts, self.workers):
            images, labels = self.place(images, labels)
            with self.autocast():
                scores = model(images)
            found[:3] += totals(scores, labels)
            found[3] += right_among_five(scores, labels)
            if self.processes.count == 1:
                # Shares may differ by one batch, and a flag can only be agreed on by all.
                self._stop_if_asked()
        model.train(training)
        loss, right, seen, among_five = self.processes.total(found).tolist()
        top = among_five / seen if self._has_top else float("nan")
        return Scores(loss / seen, right / seen, top)

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on. With several processes all of them must call this."""
        if self.ebqm is not None:
            self.ebqm.synchronize()
        averaged = {} if self.average is None else {"average": self.average.model.state_dict()}
        return {
            "options": self.options.as_dict(),
            "processes": self.processes.count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ebqm": None if self.ebqm is None else self.ebqm.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "history": self.history,
            "totals": self.processes.total(self._totals).cpu(),
            "reported": self.processes.total(self._reported).cpu(),
            "random": self.processes.random_states(self.device),
            **averaged,
        }

    def dead_norms(self) -> dict[str, str]:
        """Norms behind which nothing can be learnt, by name: see :func:`ela_kernels.training.dead.dead_norms`."""
        return dead_norms(self.model, self._first_images())

    def check_finite(self) -> None:
        """To be called before the state is saved: by a loss, a step that ruins the weights shows one step later only.

        Raises:
            NotFiniteError: a loss, or anything in the model or the optimizer, is NaN or infinite, in any process.
        """
        self._watch.look(self.steps)
        found = first_not_finite(self.model.state_dict(), self.optimizer.state_dict())
        self._watch.check_weights(found, self.steps)

    def load_state_dict(self, state: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: what it gave.
            source: where it comes from, for what is said when it does not fit.

        Raises:
            ValueError: it is of a run with other settings or another number of processes, or no state of this run at
                all; nothing is changed then.
        """
        check_state(state, self, source)
        self._load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        # Nothing else of it, as PyTorch would set any attribute.
        known = self.schedule.state_dict()
        self.schedule.load_state_dict({k: v for k, v in state["schedule"].items() if k in known})
        self.scaler.load_state_dict(state["scaler"])
        if self.ebqm is not None:
            self.ebqm.load_state_dict(state["ebqm"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.seconds, self.history = state["seconds"], list(state["history"])
        # A sum over all processes: one of them goes on with it.
        self._totals, self._reported = self._no_totals(), self._no_totals()
        if self.processes.first:
            self._totals += state["totals"].to(self.device)
            self._reported += state["reported"].to(self.device)
        self.processes.set_random_states(state["random"], self.device)

    def load_weights(self, state: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Take the model, and its average where it has one, of :meth:`state_dict` of a run of the same network.

        Raises:
            ValueError: it is of another network, or no state at all; nothing is changed then.
        """
        check_weights(state, self, source)
        self._load_weights(state)

    def _load_weights(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])

    @property
    def _has_top(self) -> bool:
        """Whether there are enough classes that some are not among the five likeliest."""
        return len(self.task.classes) > TOP

    def _tested(self) -> dict[str, float]:
        """What is measured on the test images after an epoch; names of :attr:`columns`."""
        found: Scores = self.evaluate()
        self._watch.check_test_loss(found.loss, self.steps)
        rows = found.by_name("test")
        if self.average is not None:
            averaged = self._scores(self.average.model)
            self._watch.check_test_loss(averaged.loss, self.steps)
            rows |= averaged.by_name("ema")
        return rows

    def _first_images(self) -> Any:
        """A batch of one image, as the model takes it."""
        return self.place(*self.task.read(Part(torch.tensor([0], device="cpu"))))[0]

    def _check_single_image(self) -> None:
        """Refuse batches of one image where the model cannot train on them."""
        check_single_image(self.model, self._first_images())

    def _loss(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and its part of the epoch's totals: loss, right answers and images."""
        scores = self.parallel(images)
        smoothing = self.options.recipe.label_smoothing
        loss = F.cross_entropy(scores, labels, label_smoothing=smoothing)
        return loss, totals(scores.detach(), labels, smoothing)

    def _rest_of_epoch(self) -> Iterator[tuple[Any, Any]]:
        images, steps = len(self.task.train), self.steps_per_epoch
        parts = self._shares.of_epoch(images, self.epoch, self.batch, steps)
        for found in batches(self._read, parts, self.workers):
            yield self.place(*found)

    def _step(self, images: Any, labels: Any) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss, found = self._loss(images, labels)
        self._watch.add(loss)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.schedule.step()
        if self.ebqm is not None:
            # The scale falls where the scaler left the step out; without one it is 1.
            self.ebqm.step(applied=self.scaler.get_scale() >= scale)
        if self.average is not None:
            self.average.step(self.steps, self.epoch)
        self._totals += found

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.options.amp])

    def place(self, images: Any, labels: Any) -> tuple[Any, Any]:
        """A batch that was read, as the model takes it."""
        return images.to(self.device, memory_format=self._format), labels.to(self.device)

    def _no_totals(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.device)

    def _means(self, totals: Tensor) -> tuple[float, float]:
        loss, correct, seen = self.processes.total(totals).tolist()
        return loss / seen, correct / seen

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds, self._lap = self.seconds + now - self._lap, now

    def _stop_if_asked(self) -> None:
        if self.processes.any(self.stopping()):
            raise Interrupted
