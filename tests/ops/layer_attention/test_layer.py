"""The CPU kernels of a whole layer on several threads. What they compute is tested in tests/conformance."""

from __future__ import annotations

import pytest
import torch
from support.layer_stages import FORMS, gradients, make_stage, run_stage

from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_the_same_bits_on_any_number_of_threads(batch, form, monkeypatch):
    """A batch is worked on sample by sample or as a whole, by the number of threads; nothing may depend on it."""
    monkeypatch.setattr("ela_kernels.backends.cpp.attention._ONE_THREAD_ELEMENTS", 0)
    layers, x = make_stage((batch, 20, 19, 9), 3, 5, torch.float32, form)
    first = None
    for threads in (1, 2, 3, *[4] * 12):  # often enough for threads to meet
        torch.set_num_threads(threads)
        outs, history = run_stage(layers, x)
        loss = outs[-1].square().sum() + history.kl.sum()
        found = [outs[-1], *gradients(loss, [x, *layers.parameters()])]
        first = found if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), threads
