"""The operator of a whole layer in a compiled graph, called as a graph calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.extension import extension
from ela_kernels.ops.layer_attention.in_graph.call import Call

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


def _call(
    epilogue: str, active: bool | None = None, kept: bool = False, tolerance: float = 0.0
) -> tuple[Any, ...]:
    def vector(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)

    keys, values = [vector(2, 8) for _ in range(2)], [vector(2, 8, 3, 4) for _ in range(2)]
    norm = (vector(8), vector(8)) if epilogue == "norm" else (None, None)
    x, o = vector(2, 8, 3, 4), vector(2, 8, 3, 4)
    statistics = torch.stack((o.mean((0, 2, 3)), o.var((0, 2, 3), correction=0))).detach()
    call = Call(
        *(x, vector(1, 1, 3), vector(1, 1, 3), vector(8, 1, 3, 3), keys, values),
        torch.randn(2, 2, 2, dtype=torch.float64).softmax(-1).requires_grad_(),
        *(*norm, None, torch.rand(2, dtype=torch.float64) if epilogue == "norm" else None, None),
        None if active is None else torch.tensor(active),
        *((o, statistics, torch.tensor(True)) if kept else (None, None, None)),
        *(2, 0.5, tolerance, epilogue, 1e-5, False, "cpp"),
    )
    return (*call, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("none",),
        ("residual",),
        ("norm",),
        ("norm", True, True),
        ("norm", False, True),
        ("norm", False),
        ("none", None, False, 0.3),
        ("norm", None, False, 0.3),
    ],
)
def test_the_operator_keeps_the_rules_of_operators(arguments: Any) -> None:
    call = _call(*arguments)
    torch.library.opcheck(torch.ops.ela_kernels.layer, call)


def test_a_graph_for_kernels_that_are_not_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(KERNELS["cpp"]), "unavailable_reason", lambda _: "no extension")
    with pytest.raises(
        RuntimeError, match=r"compiled for backend 'cpp'.*no extension.*compile it again"
    ):
        torch.ops.ela_kernels.layer(*_call("norm"))
