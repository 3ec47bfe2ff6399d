"""Models with layers by their names in timm: their weights, their options, and what they refuse."""

from __future__ import annotations

import sys

import pytest
import torch

timm = pytest.importorskip("timm")

from ela_kernels.integrations.attach import attached_blocks  # noqa: E402
from ela_kernels.integrations.timm import MODELS  # noqa: E402

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", MODELS)
def test_registered_models(name, tmp_path):
    assert name in timm.list_models()
    base = name[: name.rindex("_mrla" if "_mrla" in name else "_ela")]
    options = {"img_size": 32} if base.startswith("vit") else {}
    torch.manual_seed(1)
    expected = timm.create_model(base, **options).eval()
    torch.save(expected.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
        layer_attention={"head_dim": 8},
        **options,
    ).eval()
    assert model.pretrained_cfg["architecture"] == name
    assert len(attached_blocks(model)) == (12 if base.startswith("vit") else 16)
    assert {b.ela.attn.head_dim for b in attached_blocks(model).values()} == {8}
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), expected(x))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = timm.create_model(
        name, checkpoint_path=str(tmp_path / "own.pth"), layer_attention={"head_dim": 8}, **options
    )
    assert torch.equal(again.eval()(x), expected(x))


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        (
            "ela",
            TypeError,
            "layer_attention: got 'ela'; allowed is a dict of options of the layers: e",
        ),
        (
            {"skp": 1},
            ValueError,
            "layer_attention: got 'skp' in it; allowed is a dict of options of t",
        ),
        (
            {"form": "mrla"},
            ValueError,
            "layer_attention: got 'form' in it; allowed is a dict of opti",
        ),
    ],
)
def test_options_of_a_named_model_are_refused_by_name(given, error, sentence):
    with pytest.raises(error) as caught:
        timm.create_model("resnet50_ela", layer_attention=given)
    assert str(caught.value).startswith(sentence)
    assert "every, head_dim, norm, drop_path, skip, tolerance, history_dtype" in str(caught.value)


def test_a_registered_model_takes_what_the_plain_one_takes():
    model = timm.create_model("resnet50_mrla.a1_in1k", features_only=True, out_indices=(1, 2))
    assert model.pretrained_cfg["tag"] == "a1_in1k"
    assert [y.shape[1] for y in model(torch.randn(1, 3, 64, 64))] == [256, 512]
    assert list(attached_blocks(model))[-1] == "layer2.3"


def test_a_missing_library_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "ela_kernels.integrations.timm")
    with pytest.raises(
        ImportError, match=r"needs timm, which could not be imported .*'ela-kernels\[ti"
    ):
        import ela_kernels.integrations.timm  # noqa: F401
