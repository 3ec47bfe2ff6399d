"""torchvision's feature extraction on networks with layer attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ela_kernels as ek
from ela_kernels import models

extraction = pytest.importorskip("torchvision.models.feature_extraction")

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("attention", ["ela", "mrla", "mrla_light"])
def test_features_of_attention_layers(attention: str) -> None:
    of_model: dict[str, Any] = {"attention": attention, "stem": "small"}
    model = models.ResNet((3, 2), (16, 32), "basic", 10, **of_model)
    model(torch.randn(4, 3, 16, 16))
    nodes = {"attentions.0.1": "middle", "attentions.1.1": "last"}
    found = extraction.create_feature_extractor(model, nodes)
    layers = [m for m in model.modules() if isinstance(m, ek.ELA)]
    if layers:
        layers[1].skipped = True  # after the trace: it is the layer's to decide
    x = torch.randn(2, 3, 16, 16)
    want = {}
    for place, name in ((model.attentions[0][1], "middle"), (model.attentions[1][1], "last")):
        place.register_forward_hook(lambda _m, _x, out, name=name: want.setdefault(name, out))
    for mode in (True, False):
        want.clear()
        state = {n: t.clone() for n, t in model.state_dict().items()}
        with torch.no_grad():
            model.train(mode)(x)
            expected = dict(want)
            model.load_state_dict(state)
            features = found.train(mode)(x)
        assert set(features) == {"middle", "last"}
        for name, feature in features.items():
            torch.testing.assert_close(feature, expected[name], rtol=0, atol=0)
