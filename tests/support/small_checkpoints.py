"""A small published network's checkpoints, and networks that load them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from support.published_networks import PublishedNetwork, state_of, trained
from torch import Tensor

from ela_kernels.models import LoadedWeights, ResNet

BLOCKS, WIDTHS = (1, 2, 1, 1), (8, 8, 16, 16)
FORMS = {"mrla": "base", "mrla_light": "light", "ela": "base", "none": "none"}


def network(attention: str = "none", classes: int = 5, **options: Any) -> ResNet:
    torch.manual_seed(7)
    options = {"variant": "published", **options}
    return ResNet(BLOCKS, WIDTHS, num_classes=classes, attention=attention, **options)


def checkpoint(attention: str = "none", **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    options = {"head_dim": 32 if attention == "mrla_light" else 16, **options}
    return state_of(trained(PublishedNetwork(FORMS[attention], BLOCKS, WIDTHS, **options)))


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 40, 40)


def assert_loaded(model: ResNet, report: LoadedWeights, state: Mapping[str, Tensor]) -> None:
    """Every tensor that was reported as loaded is in the model."""
    own = model.state_dict()
    assert report.loaded
    for mine, theirs in report.loaded.items():
        assert torch.equal(own[mine], state[theirs]), mine
    assert report.loaded.keys() | report.missing.keys() == {
        name for name in own if not name.endswith((".decision", "._extra_state"))
    }
    assert set(report.loaded.values()) | report.left.keys() == state.keys()


def without(state: dict[str, Tensor], *ends: str) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not name.endswith(ends)}


def with_shape(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**state, name: torch.zeros(3, 3)}
