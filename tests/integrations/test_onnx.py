"""`torch.onnx.export(..., dynamo=True)` in one call, run by onnxruntime on batches of several sizes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels import models
from ela_kernels.integrations.export import decompositions

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

BATCH = torch.export.Dim("batch", min=1, max=64)
# float32 through two runtimes with their own orders of sums, values near 1.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.ResNet((3, 2), (16, 32), "basic", 10, attention=kind, stem="small")
    model(torch.randn(4, 3, 16, 16))
    return model.eval()


def ela(prunes: bool, modes: dict[int, str]) -> nn.Module:
    model = network("ela")
    layers = [m for m in model.modules() if isinstance(m, ek.ELA)]
    for i, mode in modes.items():
        layers[i].skipped, layers[i].skip = True, mode
    if prunes:
        ek.prune(model)
    return model


class Op(nn.Module):
    """All that the functional op gives, weights of an earlier layer among its inputs."""

    def forward(self, q: Tensor, k: list[Tensor], v: list[Tensor], prev: Tensor) -> Any:
        return tuple(ek.layer_attention(q, k, v, heads=2, prev_weights=prev))


def as_onnx(model: Any, inputs: tuple[Any, ...], shapes: Any) -> Any:
    """The program's bytes, checked."""
    with torch.no_grad():
        program = torch.onnx.export(
            model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    stored = io.BytesIO()
    program.save(stored)
    onnx.checker.check_model(onnx.load_from_string(stored.getvalue()), full_check=True)
    return runtime.InferenceSession(stored.getvalue())


def run(session: Any, *inputs: Tensor) -> list[Tensor]:
    names = [i.name for i in session.get_inputs()]
    given = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]


def check(session: Any, model: nn.Module) -> None:
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 16, 16)
        with torch.no_grad():
            want = model(x)
        torch.testing.assert_close(run(session, x)[0], want, **CLOSE)


MODELS: dict[str, Any] = {
    "mrla": lambda: network("mrla"),
    "mrla_light": lambda: network("mrla_light"),
    "ela": lambda: ela(False, {1: "reuse", 3: "layer"}),
    "pruned": lambda: ela(True, {1: "layer", 2: "reuse", 3: "retrieval"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_network(name: str) -> None:
    model = MODELS[name]()
    x = torch.randn(2, 3, 16, 16)
    check(as_onnx(model, (x,), ({0: BATCH},)), model)


def test_an_exported_program() -> None:
    """Made before ONNX was thought of, it holds operators; decomposed, it holds none."""
    model = ela(False, {1: "reuse"})
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))
    check(as_onnx(program.run_decompositions(decompositions()), (), None), model)


def test_the_op() -> None:
    def inputs(size: int) -> tuple[Any, ...]:
        keys = [torch.randn(size, 8) for _ in range(3)]
        values = [torch.randn(size, 8, 4, 3) for _ in range(3)]
        return torch.randn(size, 8), keys, values, torch.randn(size, 2, 2).softmax(-1)

    of_batch = {0: BATCH}
    shapes = (of_batch, [of_batch] * 3, [of_batch] * 3, of_batch)
    session = as_onnx(Op(), inputs(2), shapes)
    for size in (1, 3):
        q, keys, values, prev = inputs(size)
        want = ek.layer_attention(q, keys, values, heads=2, prev_weights=prev)
        found = run(session, q, *keys, *values, prev)
        torch.testing.assert_close(found, list(want), **CLOSE)
