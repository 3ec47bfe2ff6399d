"""convert() on the concatenating layers of this package: the same model, its layers fused, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.modules import ConcatHistory, ConcatLayerAttention


class Model(nn.Module):
    """As a model around the published layers is written: it makes the concatenating history."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConcatLayerAttention(32) for _ in range(3))
        self.shared = self.layers[0]
        self.norm = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> tuple[Tensor, ConcatHistory]:
        history = ConcatHistory()
        for layer in self.layers:
            x = x + layer(x, history)
        return self.norm(x), history


def test_convert_keeps_parameters_names_and_results(kernels: object, ran: list[str]) -> None:
    model, x = Model(), torch.randn(2, 32, 5, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, history_before = model(x)
    parameters = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    assert not ran

    assert list(ek.convert(model).converted) == ["layers.0", "layers.1", "layers.2"]
    after, history = model(x)
    assert ran.count("cpp forward") == 3
    # float32 in two orders of summation
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(history.weights, history_before.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(history.kl, history_before.kl, rtol=1e-4, atol=1e-6)
    assert history.depth == history_before.depth == 3
    assert all(type(layer) is ek.LayerAttention for layer in model.layers)
    assert model.shared is model.layers[0]
    assert list(model.state_dict()) == list(state)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    after.square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.layers[1].Wv.weight, state["layers.1.Wv.weight"])


def test_unconvert_restores_what_convert_changed_and_nothing_else() -> None:
    model, x = Model(), torch.randn(2, 32, 5, 5)
    model.own = ek.LayerAttention(32)
    model.eval()
    want, _ = model(x)
    attributes = [set(vars(layer)) for layer in model.layers]
    reports = [ek.convert(model) for _ in range(2)]  # twice is as good as once
    assert reports[0] == reports[1]
    assert ek.unconvert(model) is model
    assert all(type(layer) is ConcatLayerAttention for layer in model.layers)
    assert type(model.own) is ek.LayerAttention
    assert [set(vars(layer)) for layer in model.layers] == attributes
    assert torch.equal(model(x)[0], want)


def test_a_layer_itself_can_be_converted() -> None:
    layer = ConcatLayerAttention(32)
    assert ek.convert(layer).converted == {"": "LayerAttention"}
    assert layer(torch.randn(1, 32, 4, 4), ek.LayerHistory()).shape == (1, 32, 4, 4)


def test_a_copy_of_a_converted_model_can_be_undone() -> None:
    model = Model()
    ek.convert(model)
    model = copy.deepcopy(model)
    assert type(ek.unconvert(model).layers[0]) is ConcatLayerAttention


class Derived(ConcatLayerAttention):
    def forward(self, x: Tensor, history: ConcatHistory) -> Tensor:
        return 2 * super().forward(x, history)


def test_a_form_of_its_own_is_left_and_the_rest_is_converted() -> None:
    model = Model()
    model.stranger = Derived(32)
    report = ek.convert(model)
    assert len(report.converted) == 3
    assert "forward of its own" in report.left["stranger"]
    assert type(model.stranger) is Derived
    with pytest.raises(ValueError, match=r"(?s)^model: .*strict.*stranger"):
        ek.convert(model, strict=True)


def test_models_without_such_layers_stay_and_that_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), ek.LightLayerAttention(32), ek.ELA(32))
    classes = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="no module has Wq, Wk and Wv"):
        report = ek.convert(model)
    assert not report.converted
    assert not report.left
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("function", [ek.convert, ek.unconvert])
def test_no_module_is_refused(function) -> None:
    with pytest.raises(TypeError, match=r"^model: got str; allowed is a torch\.nn\.Module"):
        function("model")


def test_fused_and_concatenating_layers_do_not_share_a_history() -> None:
    x = torch.randn(1, 32, 4, 4)
    fused, concatenating = ek.LayerAttention(32), ConcatLayerAttention(32)
    for first, second in ((fused, concatenating), (concatenating, fused)):
        history = ConcatHistory()
        first(x, history)
        with pytest.raises(TypeError, match=r"^history: .*Convert all of them, or none"):
            second(x, history)
