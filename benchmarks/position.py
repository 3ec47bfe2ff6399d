"""position_attention beside the same in eager and compiled PyTorch, and beside the least bytes that it must move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ela_kernels as ek
from benchmarks.contenders import COMPILED, EAGER, check_close
from benchmarks.measure import fastest_baseline, interleave, ratio, summarize
from benchmarks.probe import read_probes, transfer_probes
from benchmarks.tables import Results, Target, table, time_cell

OURS = "position"
FORWARD, BOTH = "forward", "forward and backward"
# Relative L2 distance from float64 of outputs and gradients: dot products of up to 512 terms in float32.
TOLERANCE = 1e-5

Op = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


class Position(NamedTuple):
    """A retrieval of `depth` values: tokens `[B, N, C]`, or a map `[B, C, H, W]` in one of its memory formats."""

    depth: int
    size: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        last = " channels_last" if self.memory_format == torch.channels_last else ""
        return f"T={self.depth} {list(self.size)}{last}"

    @property
    def channel(self) -> int:
        return -1 if len(self.size) == 3 else 1

    def new(self) -> Tensor:
        return torch.randn(self.size).contiguous(memory_format=self.memory_format)


TOKENS, MAPS, LAST = (4, 256, 512), (8, 64, 28, 28), torch.channels_last
FULL = (
    Position(12, TOKENS),
    Position(24, TOKENS),
    Position(12, MAPS),
    Position(24, MAPS),
    Position(12, MAPS, LAST),
    Position(24, MAPS, LAST),
)
SMALL = (Position(3, (2, 5, 8)), Position(3, (2, 8, 4, 3)), Position(3, (2, 8, 4, 3), LAST))


def eager(channel: int, query: Tensor, norm_weight: Tensor, values: list[Tensor]) -> Tensor:
    """As it is written in PyTorch, on tokens; a map is viewed as such."""
    v = torch.stack(values, 1)
    if channel == 1:
        v = v.movedim(2, -1)
    weights = (F.rms_norm(v, v.shape[-1:], norm_weight, 1e-6) @ query).softmax(1)
    out = (weights.unsqueeze(-1) * v).sum(1)
    return out.movedim(-1, 1) if channel == 1 else out


def ours(query: Tensor, norm_weight: Tensor, values: list[Tensor]) -> Tensor:
    return ek.position_attention(query, values, norm_weight=norm_weight).out


def measure_position(rounds: int, small: bool = False) -> dict[str, Any]:
    """Of each shape the times of a forward without gradients and of both, and what the least bytes take."""
    found = {}
    for shape in SMALL if small else FULL:
        # The compiler gives up on the forms after some shapes; here each has its own.
        torch.compiler.reset()
        found[str(shape)] = _measure(shape, rounds)
    return found


def _measure(shape: Position, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    channels = shape.size[shape.channel]
    values = [shape.new().requires_grad_() for _ in range(shape.depth)]
    query = (torch.randn(channels) / channels**0.5).requires_grad_()
    norm_weight = (1 + torch.randn(channels) / 8).requires_grad_()
    dout = shape.new()
    plain = partial(eager, shape.channel)
    ops: dict[str, Op] = {EAGER: plain, COMPILED: torch.compile(plain), OURS: ours}
    inputs = [query, norm_weight, *values]

    def forward(op: Op) -> Tensor:
        with torch.no_grad():
            return op(query, norm_weight, values)

    def both(op: Op) -> list[Tensor]:
        out = op(query, norm_weight, values)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = plain(exact[0], exact[1], exact[2:])
    expected = [out.detach(), *torch.autograd.grad(out, exact, dout.double())]
    for name, op in ops.items():
        for i, (got, want) in enumerate(zip(both(op), expected, strict=True)):
            check_close(f"{shape} {name}: {i}", got, want, TOLERANCE)
        check_close(f"{shape} {name}: forward", forward(op), expected[0], TOLERANCE)
    map_bytes = values[0].numel() * values[0].element_size()
    phases: dict[str, Any] = {}
    for phase, run, reads, writes in (
        (FORWARD, forward, shape.depth, 1),
        (BOTH, both, 2 * shape.depth + 1, shape.depth + 1),
    ):
        seconds = interleave({name: partial(run, op) for name, op in ops.items()}, rounds)
        phases[phase] = {
            "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
            "times_ours": {
                name: ratio(times, seconds[OURS]) for name, times in seconds.items() if name != OURS
            },
            "least_bytes": (reads + writes) * map_bytes,
            "floor_ms": _floor(values, dout, phase == BOTH, rounds),
        }
        medians = ", ".join(f"{n} {ms['median']:.1f}" for n, ms in phases[phase]["ms"].items())
        print(f"{shape}, {phase}, ms: {medians}", flush=True)
    return phases


def _floor(values: list[Tensor], dout: Tensor, backward: bool, rounds: int) -> float:
    """The time in which the fastest probe moves the least bytes; without a compiler, reads what has to be read."""
    read = [v.detach() for v in values]
    written = [torch.zeros_like(dout)]
    if backward:
        read += [*read, dout]
        written += [torch.zeros_like(dout) for _ in values]
    probes: dict[str, Callable[[], object]] = {
        name: partial(probe, read, written) for name, probe in transfer_probes().items()
    }
    if not probes:
        # Probes read a map as a run of memory.
        runs = [
            m.permute(0, 2, 3, 1) if m.dim() == 4 and not m.is_contiguous() else m for m in read
        ]
        probes = {name: partial(probe, runs) for name, probe in read_probes().items()}
    return min(summarize(times).median for times in interleave(probes, rounds).values())


def position_targets(found: Results) -> list[Target]:
    """At least three times faster than what is fastest of the others, where a retrieval is of twelve values or more."""
    return [
        Target(
            f"position_attention, {phase}, times faster than {fastest}",
            shape,
            of_phase["times_ours"][fastest]["of_medians"],
            3.0,
            True,
        )
        for shape, phases in found.items()
        for phase, of_phase in phases.items()
        for fastest in [fastest_baseline(of_phase["ms"])]
    ]


def position_lines(found: Results) -> list[str]:
    """Times, least bytes, and the time of the probe that moves these."""
    rows = []
    for shape, phases in found.items():
        for phase, of_phase in phases.items():
            cells = [time_cell(of_phase["ms"][name]) for name in (EAGER, COMPILED, OURS)]
            times = [f"{of_phase['times_ours'][n]['of_medians']:.2f}" for n in (EAGER, COMPILED)]
            rows.append(
                [
                    shape,
                    phase,
                    *cells,
                    " / ".join(times),
                    f"{of_phase['least_bytes'] / 2**20:.1f}",
                    f"{of_phase['floor_ms']:.1f}",
                ]
            )
    head = ["", "", EAGER, COMPILED, OURS, "eager / compiled over ours"]
    return table([*head, "least bytes, MiB", "probe, ms"], rows)
