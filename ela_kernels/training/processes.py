"""The processes of a run that `torchrun` started, or the one there is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """This process' number, how many there are, and the group that their hosts talk in (None with one)."""

    rank: int = 0
    count: int = 1
    hosts: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def any(self, flag: int) -> int:
        """The largest of the processes' flags, without waiting for a device."""
        if self.count == 1:
            return flag
        shared = torch.tensor(flag, device="cpu")
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX, group=self.hosts)
        return int(shared)

    def gather(self, value: Tensor) -> list[Tensor]:
        """A tensor on the host from every process, on every process."""
        if self.count == 1:
            return [value]
        values = [torch.empty_like(value) for _ in range(self.count)]
        distributed.all_gather(values, value, group=self.hosts)
        return values

    def random_states(self, device: torch.device) -> dict[str, list[Tensor]]:
        """Where the generators of all processes stand, on the CPU and on a GPU."""
        states = {"cpu": self.gather(torch.get_rng_state())}
        if device.type == "cuda":
            states["cuda"] = self.gather(torch.cuda.get_rng_state(device))
        return states

    def set_random_states(
        self, states: Mapping[str, Sequence[Tensor]], device: torch.device
    ) -> None:
        """Have this process' generators go on from :meth:`random_states`."""
        torch.set_rng_state(states["cpu"][self.rank])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][self.rank], device)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, such as running statistics, which are each one's own."""
        if self.count > 1:
            for tensor in tensors:
                # Counters may be on the host, where the group of the GPUs cannot reach them.
                group = self.hosts if tensor.device.type == "cpu" else None
                distributed.broadcast(tensor, 0, group=group)

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier(group=self.hosts)

    def leave(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()


def join_processes(device: torch.device) -> Processes:
    """Join the other processes if `torchrun` started this one, with NCCL on GPUs and gloo otherwise."""
    if _number("WORLD_SIZE", "1") == 1:
        return Processes()
    if not distributed.is_available():
        raise ValueError(
            f"WORLD_SIZE: got {os.environ['WORLD_SIZE']}, and this PyTorch has no torch.distributed; allowed is 1"
        )
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(
        distributed.get_rank(),
        distributed.get_world_size(),
        distributed.new_group(backend="gloo"),
    )


def choose_device(name: str) -> torch.device:
    """`"auto"` takes a GPU where there is one, this process' own under `torchrun`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device: got 'cuda', and this PyTorch finds no such device; allowed is 'cpu'"
            )
        number = _number("LOCAL_RANK", "0")
        if not 0 <= number < torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK: got {number}, and there are {torch.cuda.device_count()} GPUs; allowed is one process a "
                "GPU, or --device cpu"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def _number(variable: str, default: str) -> int:
    """A number that `torchrun` leaves in the environment."""
    text = os.environ.get(variable, default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{variable}: got {text!r}; allowed is an int, as torchrun sets it"
        ) from None
