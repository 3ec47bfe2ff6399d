"""What the CUDA kernels launch in the pull form, run on the CPU by the stand-in runtime, and that no order matters.

What they compute is tested in tests/conformance.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.cases import Maker
from support.cuda_on_cpu import FORMS, launched, name_of
from support.layouts import contiguous
from support.pull_stages import Stage

import ela_kernels as ek
from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.gpu_tables import GpuContribution

pytestmark = pytest.mark.usefixtures("kernels")


def retrievals(
    shape: Sequence[int], depths: Sequence[int], heads: int, layout: Maker = contiguous
) -> list[GpuContribution]:
    """What layers of some depths have left."""
    return [
        GpuContribution(
            torch.randn(shape[:2]),
            torch.randn(shape[0], heads, depth).softmax(-1),
            torch.randn(shape[0], heads, depth),
            layout(shape, torch.float32),
            False,
            0.0,
        )
        for depth in depths
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 31, 32, 33, 65, 256])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_bits_depend_on_no_order_and_no_grid(count, layout, kernels):
    retrieved = retrievals((2, 16, 3, 5), range(1, count + 1), 2, layout)
    dkey, dvalue = cuda.gather(retrieved, 0, 2, False, True, True)
    assert launched(kernels) == ["layer_attention_bwd_gather"]
    for order, limit in ((1, 0), (2, 0), (3, 1)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        again = cuda.gather(retrieved, 0, 2, False, True, True)
        assert torch.equal(dkey, again[0])
        assert torch.equal(dvalue, again[1])


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(
    ("need", "without", "kernel"),
    [
        ("key", (), "layer_attention_bwd_gather_key"),
        ("value", (), "layer_attention_bwd_gather"),
        ("key value", (0,), "layer_attention_bwd_gather"),
        ("key value", (1, 2), "layer_attention_bwd_gather"),
        ("key value", (0, 1, 2), "layer_attention_bwd_gather_key"),
    ],
    ids=str,
)
def test_gather_of_a_part(need, without, kernel, layout, kernels):
    """Of keys or values alone, and of layers whose output no gradient came through."""
    retrieved = retrievals((2, 12, 5, 3), (2, 3, 4), 3, layout)
    for m in without:
        retrieved[m].dout = None
    cuda.gather(retrieved, 1, 3, False, "key" in need, "value" in need)
    assert launched(kernels) == [kernel]


def test_launches_of_a_deep_stage(kernels):
    Stage((1, 8, 2, 2), 2, 40, torch.float32).run()
    names = launched(kernels)
    for name, count in (("fwd", 40), ("bwd_dots", 40), ("bwd_tail", 40), ("bwd_gather", 40)):
        assert names.count(f"layer_attention_{name}") == count


def test_the_probe_of_a_skipped_layer(kernels):
    history, (q, k, *_), v = ek.LayerHistory(), torch.randn(6, 2, 12), torch.randn(2, 12, 3, 3)
    for _ in range(3):
        history.attend(torch.randn(2, 12), torch.randn(2, 12), v, heads=3)
    kernels.take_launches()
    history.probe(q, k, heads=3)
    assert launched(kernels) == ["layer_attention_fwd_weights"]
