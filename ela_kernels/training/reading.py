"""Batches of images: which ones, what they are varied by, and worker processes that read them ahead."""

from __future__ import annotations

import atexit
import contextlib
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# One seed for each purpose.
_ORDER, _VARIATION = 0, 1


class Part(NamedTuple):
    """One process' share of a batch.

    Attributes:
        numbers: of the images in their data set, on the CPU.
        seed: of their variation; None: they are read as they are.
        testing: whether they are test images.
    """

    numbers: Tensor
    seed: int | None = None
    testing: bool = False


# What reads a part: images and labels.
Read = Callable[[Part], tuple[Any, Any]]


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, each of at least 0; no two tuples that come up in a run meet in practice."""
    seed = 0
    for number in numbers:
        # Knuth's multiplier mixes them.
        seed = ((seed ^ (number + 1)) * 6364136223846793005 + 1442695040888963407) % 2**63
    return seed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's generator of the CPU begins with `seed` inside, and goes on afterwards as if nothing had been drawn.

    For what takes no generator, such as torchvision's transforms. Generators of devices are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Shares:
    """Which images are in a batch, and what they are varied by: the same wherever a run was resumed.

    Attributes:
        seed: of the run.
        size: images of a batch, in each process.
        rank, count: the number of this process, and how many there are.
        varied: whether images are varied.
    """

    seed: int
    size: int
    rank: int
    count: int
    varied: bool

    def of_epoch(self, images: int, epoch: int, first: int, batches: int) -> list[Part]:
        """This process' shares of the batches of an epoch, from number `first` on."""
        # The order is common to the processes, the variation each one's own.
        generator = torch.Generator().manual_seed(seed_of(self.seed, _ORDER, epoch, 0, 0))
        order = torch.randperm(images, generator=generator, device="cpu")
        parts = []
        for batch in range(first, batches):
            start = (batch * self.count + self.rank) * self.size
            seed = seed_of(self.seed, _VARIATION, epoch, batch, self.rank) if self.varied else None
            parts.append(Part(order[start : start + self.size], seed))
        return parts

    def of_tests(self, images: int) -> list[Part]:
        """This process' shares of the test images."""
        numbers = torch.arange(self.rank, images, self.count, device="cpu")
        return [Part(part, testing=True) for part in numbers.split(self.size) if len(part)]


def batches(read: Read, parts: Sequence[Part], workers: int) -> Iterator[tuple[Any, Any]]:
    """What `read` gives for each of the parts, in their order.

    Args:
        read: as it depends on nothing but the part, the result is the same for any number of workers.
        parts: what to read.
        workers: processes that read ahead; with 0 a part is read when it is asked for.
    """
    if workers == 0:
        return map(read, parts)
    ahead = _read_ahead(read, parts, workers)
    _unfinished.add(ahead)
    return ahead


_unfinished: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Whoever holds an iterator when Python ends would wait forever: workers ignore the signal that is to end them."""
    for ahead in list(_unfinished):
        with contextlib.suppress(ValueError):  # a thread is in it
            ahead.close()


def _read_ahead(read: Read, parts: Sequence[Part], workers: int) -> Generator[Any, None, None]:
    loader: DataLoader[Any] = DataLoader(
        _Parts(read, parts),
        batch_size=None,  # a part is a whole batch
        num_workers=min(workers, len(parts)),
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals,
        # Without one, each epoch would draw a number from the generator that the model draws from.
        generator=torch.Generator(),
    )
    for found in loader:
        if isinstance(found, OSError):
            raise found
        yield found


class _Parts(Dataset[Any]):
    """What is read for each part, as a data set by the parts' numbers."""

    def __init__(self, read: Read, parts: Sequence[Part]) -> None:
        self._read, self._parts = read, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._read(self._parts[number])
        except OSError as error:
            # It says which file it is. Raised here, it would come with the worker's traceback in its message.
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _leave_signals(worker: int) -> None:
    """A terminal, or whoever ends a group of processes, signals them all; the one that trains ends the others."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
