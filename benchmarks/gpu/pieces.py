"""The pieces of a whole layer alone, against the bandwidth of a copy: what makes key and value, and a block's end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.floor import Save, copy_contender, exceeds_cache, report_op, run_all
from benchmarks.gpu.footprint import PIECES, piece_bytes
from benchmarks.gpu.ops import ROUNDING, distance, refusing, tolerance
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import PIECE_CASES, SMOKE_CASES, Case
from benchmarks.gpu.timing import Budget, graphed, take_turns
from benchmarks.measure import Contender
from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.gpu import GpuBackend
from ela_kernels.backends.types import Arrived, Filters, LayerNeeds, NormAct, SavedLayer
from ela_kernels.modules.query_key_value import default_kernel_size

_EPS = 1e-5
# Elements so near to the activation's zero that float32 may fall on the other side of it.
_UNDECIDED = 1e-5


class LayerPieces:
    """One layer's input, filters, what it retrieved and the gradients that arrive; `seed` makes another set."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        channels = case.shape.channels

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.case = case
        self.filter_size = default_kernel_size(channels)
        self.x, self.dv, self.o, self.dout = (case.new_map(device, generator) for _ in range(4))
        self.dk = case.new_row(device, generator)
        self.filters = Filters(
            None,
            normal(1, 1, self.filter_size).to(case.dtype),
            (normal(channels, 1, 3, 3) / 3).to(case.dtype),
        )
        gamma, beta = 1 + 0.1 * normal(channels), 0.1 * normal(channels)
        self.norm = NormAct(gamma, beta, None, None, _EPS, True)
        flat = self.o.transpose(0, 1).reshape(channels, -1).float()
        variance, mean = torch.var_mean(flat, 1, correction=0)
        self.statistics = torch.stack((mean, variance))
        self.mean = self.x.float().mean((2, 3)).to(case.dtype)

    @staticmethod
    def is_alone(piece: str, kernels: KernelBackend) -> bool:
        """Whether a backend has the piece by itself: the CPU's kernels do a block's end in the calls of the layer."""
        return not piece.startswith("epilogue") or isinstance(kernels, GpuBackend)

    def run(self, piece: str, kernels: KernelBackend) -> dict[str, Tensor | None]:
        """What the piece gives, by name."""
        heads, scale = self.case.shape.heads, 1.0
        if piece == "producer":
            made = kernels.layer(self.x, self.filters, (), (), heads, scale, None)
            return {"v": made.v, "k": made.k}
        if piece == "producer backward":
            back, _ = kernels.layer_backward(
                SavedLayer(self.x, self.filters, self.mean, heads, None, None, None, None),
                Arrived(None, None, None, self.dk, self.dv),
                (),
                0,
                LayerNeeds(True, False, True, True, False),
            )
            return {"dx": back.x, "dwk": back.wk, "dwv": back.wv}
        assert isinstance(kernels, GpuBackend)  # as is_alone() says
        if piece == "epilogue":
            out = kernels.norm_forward(self.o, self.x, self.statistics, self.norm)
            return {"out": out}
        found = kernels.norm_backward(self.o, self.dout, self.statistics, self.norm)
        return {"do": found.o, "dgamma": found.gamma, "dbeta": found.beta}

    def expected(self, piece: str) -> dict[str, Tensor]:
        """The same in float64, by autograd."""
        if piece.startswith("producer"):
            x, wk, wv = (
                t.double().requires_grad_() for t in (self.x, self.filters.wk, self.filters.wv)
            )
            mean = x.mean((2, 3)).unsqueeze(1)
            k = F.conv1d(mean, wk, padding=self.filter_size // 2).squeeze(1)
            v = F.conv2d(x, wv, padding=1, groups=x.shape[1])
            if piece == "producer":
                return {"v": v.detach(), "k": k.detach()}
            arriving = [self.dv.double(), self.dk.double()]
            dx, dwk, dwv = torch.autograd.grad([v, k], [x, wk, wv], arriving)
            return {"dx": dx, "dwk": dwk, "dwv": dwv}
        gamma, beta = self.norm.gamma, self.norm.beta
        assert gamma is not None
        assert beta is not None
        o, gamma, beta = (t.double().requires_grad_() for t in (self.o, gamma, beta))
        normed = F.batch_norm(o, None, None, gamma, beta, training=True, eps=_EPS)
        if piece == "epilogue":
            return {"out": self.x.double() + normed.relu().detach()}
        do, dgamma, dbeta = torch.autograd.grad(normed.relu(), [o, gamma, beta], self.dout.double())
        do[normed.abs() < _UNDECIDED] = float("nan")
        return {"do": do, "dgamma": dgamma, "dbeta": dbeta}

    def check(self, piece: str, kernels: KernelBackend) -> float:
        """Refuse a piece whose results differ from float64; return how far the worst is off."""
        poisoned = [torch.full_like(self.x, float("nan")) for _ in range(3)]
        del poisoned  # what nothing writes will likely be allocated there
        found, worst = self.run(piece, kernels), 0.0
        for name, want in self.expected(piece).items():
            got = found[name]
            allowed = tolerance(self.case.dtype)
            if name in ("k", "dwk"):  # the mean is rounded as well
                allowed += 3 * ROUNDING[self.case.dtype]
            if name in ("dgamma", "dbeta"):  # sums with signs that the activation's zero decides
                allowed += 1e-3
            if got is not None and name == "do":
                undecided = want.isnan()
                got, want = got.masked_fill(undecided, 0.0), want.masked_fill(undecided, 0.0)
            worst = max(worst, distance(f"{piece}: {name}", got, want, allowed))
        assert math.isfinite(worst)
        return worst


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """All cases, each saved as soon as it is there; what the budget does not reach is named."""
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": []}
    copy, copy_bytes = copy_contender(setting)
    for case in SMOKE_CASES if setting.smoke else PIECE_CASES:
        if budget.left < 3 and report["cases"]:
            report["left_out"].append(case.name)
            continue
        # A piece touches three maps or so: as many sets of inputs as no cache holds.
        sets = [
            LayerPieces(case, setting.device, seed)
            for seed in range(max(1, math.ceil(4 * setting.l2_bytes / (3 * case.map_bytes))))
        ]
        found: dict[str, Any] = {
            "map_bytes": case.map_bytes,
            "input_sets": len(sets),
            "exceeds_cache": exceeds_cache(case, 2, setting),
            "ops": {},
        }
        for piece in PIECES:
            contenders: dict[str, Contender] = {"copy": copy}
            errors = {}
            for backend in setting.backends:
                kernels = KERNELS[backend]
                if not sets[0].is_alone(piece, kernels):
                    continue
                with refusing(f"{case.name}: {backend} {piece}", report["refused"]):
                    error = sets[0].check(piece, kernels)
                    runs: list[Callable[[], object]] = [
                        partial(s.run, piece, kernels) for s in sets
                    ]
                    contenders[backend] = graphed(partial(run_all, runs, 4), setting.device)
                    errors[backend] = error
            seconds = min(0.4, budget.left / 4)
            taken = take_turns(contenders, setting.device, setting.rounds, seconds)
            least = piece_bytes(piece, case, sets[0].filter_size)
            found["ops"][piece] = report_op(taken, least, 4 * len(sets), copy_bytes, errors)
        report["cases"][case.name] = found
        save(report)
    save(report)
