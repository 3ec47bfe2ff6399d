"""Layers and blocks that a GPU's programs cut into pieces, in the interpreter. All else is in tests/conformance."""

from __future__ import annotations

import pytest
import torch
from support.layer_stages import FORMS, check, layer_step, make_blocks, make_stage, step


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_patches_of_a_plane_in_several_programs(form):
    check(layer_step, *make_stage((1, 3, 13, 18), 2, 1, torch.float32, form))
    check(step, *make_blocks((1, 3, 13, 18), 2, 1, torch.float32, form))
