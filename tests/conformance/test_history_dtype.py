"""Values held in half precision under float32 layers: every backend gives what float64 gives for the held numbers."""

from __future__ import annotations

from typing import Any

import torch
from support.backends import WITH_KERNELS, Backend, over, words
from support.held_values import HALVES, check_against_float64
from support.history_stages import make_layers
from support.layer_checks import FORMS
from support.layer_stages import gradients, make_blocks, make_stage
from support.pairs import pairs
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS

KINDS = ("op", "layer", "block")


def run(modules: nn.Module, x: Tensor, history: ek.LayerHistory) -> list[Tensor]:
    """Outputs, weights, divergence, the gradients of everything that all of them have, and running statistics."""
    assert isinstance(modules, nn.ModuleList)
    outs, y = [], x
    for module in modules:
        y = module(y, history)
        outs.append(y)
    assert history.weights is not None
    loss = outs[-1].square().sum() + outs[0].sin().sum() + history.weights.square().sum()
    attended = [history.weights]
    if history.kl is not None:
        loss = loss + history.kl.sum()
        attended.append(history.kl)
    wanted = [x, *modules.parameters()]
    buffers = [b.to(x.dtype) for b in modules.buffers()]
    return [*(t.detach() for t in (*outs, *attended)), *gradients(loss, wanted), *buffers]


def stage_of(kind: str, backend: Backend, shape: Any, head_dim: int, depth: int, form: Any) -> Any:
    if kind == "op":
        modules, x = make_layers(depth, dtype=torch.float32)
    else:
        make = make_stage if kind == "layer" else make_blocks
        modules, x = make(shape, depth, head_dim, torch.float32, form)
    x = x.detach().to(backend.device).contiguous(memory_format=form)
    return modules.to(backend.device), x.requires_grad_()


@over(
    "pair",
    lambda backend: pairs(
        {
            "kind": KINDS,
            "dtype": HALVES,
            "form": FORMS,
            "depth": [2] if backend.is_slow else [1, 2, 6],
        }
    ),
    ids=words,
)
def test_stages(backend, pair):
    shape = (2, 6, 3, 4) if backend.is_slow else (3, 12, 5, 7)
    given = stage_of(pair["kind"], backend, shape, 3, pair["depth"], pair["form"])
    check_against_float64(run, *given, pair["dtype"])


@over(
    "pair",
    lambda backend: pairs(
        {
            # Without maps so small that no value of theirs is rounded.
            "size": [(s, d) for s, d in backend.layer_sizes if s[0] * s[2] * s[3] > 4],
            "form": FORMS,
            "kind": ["layer", "block"],
            "dtype": HALVES,
        }
    ),
    [b for b in WITH_KERNELS if KERNELS[b.name].value_dtypes],
    ids=words,
)
def test_sizes(backend, pair):
    shape, head_dim = pair["size"]
    given = stage_of(pair["kind"], backend, shape, head_dim, 2, pair["form"])
    check_against_float64(run, *given, pair["dtype"])


@over("dtype", lambda backend: HALVES)
def test_given_values_are_rounded_as_pytorch_rounds_them(backend, dtype):
    """Also its own value, and what overflows or is no number."""
    torch.manual_seed(3)
    q, k = (torch.randn(2, 6, device=backend.device) for _ in range(2))
    v = torch.randn(2, 6, 3, 5, device=backend.device)
    v[0, 0, 0] = torch.tensor([1e5, -1e5, torch.inf, torch.nan, 3e-6], device=backend.device)
    history = ek.LayerHistory(dtype=dtype)
    out = history.attend(q, k, v, heads=2)
    torch.testing.assert_close(history.values[0], v.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out, v.to(dtype).float(), rtol=1e-6, atol=0, equal_nan=True)


@over("dtype", lambda backend: HALVES)
def test_where_values_are_held_in_half_the_bytes(backend, dtype):
    """On the CPU kernels; elsewhere the layers are told to be served without, and why."""
    blocks, x = stage_of("block", backend, (2, 6, 3, 5), 3, 3, torch.contiguous_format)
    history = ek.LayerHistory(dtype=dtype)
    found = ek.explain(blocks[0], x, history)[0]
    held = history._now.pairs.values[0].dtype
    assert history.values[0].dtype == dtype
    if backend.name == "cpp":
        assert (found.form, found.backend, held) == ("block", "cpp", dtype)
        assert not found.reasons
        return
    assert held == torch.float32
    (reason,) = found.reasons["held"]
    if backend.has_kernels:
        assert found.form == "op"
        assert reason == f"it has no kernels for values held in {dtype} by layers in torch.float32"
        assert found.reasons["layer"] == (reason,)
    else:
        assert reason == "use_backend('eager') is in force"


@over("pair", lambda backend: pairs({"kind": ["layer", "block"], "dtype": HALVES}), ids=words)
def test_layers_that_only_provide(backend, pair):
    modules, x = stage_of(pair["kind"], backend, (2, 6, 3, 5), 3, 4, torch.contiguous_format)

    def run_some(modules: nn.ModuleList, x: Tensor, history: ek.LayerHistory) -> list[Tensor]:
        y = x
        for i, module in enumerate(modules):
            layer = getattr(module, "attn", module)
            if i in (0, 2):
                layer.provide(y, history)
                y = y * 1.5
            else:
                y = module(y, history)
        return [y.detach(), *gradients(y.square().sum(), [x, *modules.parameters()])]

    check_against_float64(run_some, modules, x, pair["dtype"])
