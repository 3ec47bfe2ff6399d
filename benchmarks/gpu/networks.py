"""A training step of whole networks: plain, with the base form at every block, and ELA with a third skipped.

The base form as published too, which concatenates in PyTorch's own pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.contenders import WrongResultError
from benchmarks.gpu.floor import Save
from benchmarks.gpu.ops import refusing
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages import GRAPH
from benchmarks.gpu.timing import Budget, graphed, synchronize, take_turns
from benchmarks.measure import Contender, ratio, summarize
from ela_kernels.models import build_model

PLAIN, FUSED, SKIPPING, PUBLISHED = "plain", "mrla", "ela", "published"

# The loss of a first step in bfloat16 against the same network on PyTorch's own pieces, in the same dtypes.
_LOSS_TOLERANCE = 0.02


class NetworkCase(NamedTuple):
    """A network and its images, in bfloat16 autocast and channels_last."""

    model: str
    batch: int
    size: int
    options: dict[str, Any]
    with_graph: bool = False
    is_instead: bool = False
    """Only where the network was not measured with more images: a device may have too little memory."""

    @property
    def name(self) -> str:
        """As it stands in the results."""
        return f"{self.model} [{self.batch}, 3, {self.size}, {self.size}]"


CASES = [
    NetworkCase("resnet50", 128, 224, {}),
    NetworkCase("resnet56", 128, 32, {"block": "bottleneck"}, True),
    NetworkCase("resnet50", 32, 224, {}, is_instead=True),
]
SMOKE_CASES = [NetworkCase("resnet20", 4, 16, {}, True)]


class TrainingStep:
    """Forward, backward and SGD of one network; called again and again."""

    def __init__(self, case: NetworkCase, attention: str, device: torch.device) -> None:
        torch.manual_seed(0)
        options = case.options
        if attention == PUBLISHED:
            attention, options = FUSED, {**options, "fused": False}
        network = build_model(case.model, attention=attention, **options)
        self.network = network.to(device, memory_format=torch.channels_last).train()
        if attention == SKIPPING:
            for stage in self.network.attentions:
                for i, layer in enumerate(stage):
                    layer.skipped = i % 3 == 2
        self._optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator(device=device).manual_seed(0)
        size = (case.batch, 3, case.size, case.size)
        images = torch.randn(size, generator=generator, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(0, 10, (case.batch,), generator=generator, device=device)
        self._device = device

    def loss(self) -> Tensor:
        """Of the network as it is."""
        # A cast that a capture made would be gone with its graph: no cache.
        with torch.autocast(self._device.type, torch.bfloat16, cache_enabled=False):
            scores = self.network(self._images)
            return nn.functional.cross_entropy(scores.float(), self._labels)

    def __call__(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self._optimizer.step()

    def on(self, backend: str) -> None:
        """A step with a backend forced."""
        with ek.use_backend(backend):
            self()

    def check(self, backend: str) -> float:
        """Refuse a backend whose loss is not that of PyTorch's own pieces; return how far it is off."""
        with torch.no_grad():
            with ek.use_backend("eager"):
                want = float(self.loss())
            with ek.use_backend(backend):
                got = float(self.loss())
        error = abs(got - want) / abs(want)
        if not error <= _LOSS_TOLERANCE:
            raise WrongResultError(
                f"the loss is {got:.4f}, and {want:.4f} without the kernels. A wrong result is not timed"
            )
        return error


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """The convolutions' algorithms chosen by trying, as one trains such a network; the same for all."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """All cases; the small ones inside CUDA graphs as well."""
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": []}
    with fastest_convolutions():
        for case in SMOKE_CASES if setting.smoke else CASES:
            if case.is_instead and _is_measured(case.model, report["cases"]):
                continue
            if budget.left < 8 and report["cases"]:
                report["left_out"].append(case.name)
                continue
            report["cases"][case.name] = _measure_case(case, setting, budget, report["refused"])
            save(report)
            setting.free_bytes()  # gives back what the networks held
    save(report)


def _is_measured(model: str, cases: dict[str, Any]) -> bool:
    return any(
        name.startswith(model + " ") and found["over_plain"] for name, found in cases.items()
    )


def _measure_case(
    case: NetworkCase, setting: Setting, budget: Budget, refused: list[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": case.batch, "contenders": {}}
    timed: dict[str, Contender] = {}

    def add(name: str, step: Contender, make: Callable[[], float] | None) -> None:
        with refusing(f"{case.name}: {name}", refused):
            error = None if make is None else make()
            step()
            synchronize(setting.device)
            timed[name] = step
            found["contenders"][name] = {"loss_off": error}
            if case.with_graph:
                found["contenders"][name + GRAPH] = {"loss_off": error}
                timed[name + GRAPH] = graphed(step, setting.device)

    plain = TrainingStep(case, "none", setting.device)
    add(PLAIN, plain, None)
    add(PUBLISHED, TrainingStep(case, PUBLISHED, setting.device), None)
    for kind in (SKIPPING, FUSED):
        for backend in setting.backends:
            step = TrainingStep(case, kind, setting.device)
            add(f"{kind} {backend}", partial(step.on, backend), partial(step.check, backend))
    taken = take_turns(timed, setting.device, setting.rounds, min(8.0, max(budget.left / 3, 1.0)))
    for name, times in taken.items():
        found["contenders"][name]["ms"] = summarize(times)._asdict()
    # A capture that failed has no time.
    found["contenders"] = {n: c for n, c in found["contenders"].items() if "ms" in c}
    found["over_plain"] = {}
    for name, times in taken.items():
        of_plain = taken.get(PLAIN + GRAPH if name.endswith(GRAPH) else PLAIN)
        if of_plain is not None and not name.startswith(PLAIN):
            found["over_plain"][name] = ratio(times, of_plain)
    return found
