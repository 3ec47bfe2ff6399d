"""explain(): which kernels served each layer of a pass, and every reason against better ones."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from support.residual_stage import Stage, forms, x_like
from torch import nn

import ela_kernels as ek
from ela_kernels.explaining import Explanation, LayerExplanation
from ela_kernels.models import CifarResNet

pytestmark = pytest.mark.usefixtures("kernels", "fresh_log")


def test_a_network() -> None:
    network = CifarResNet((2, 2), (8, 16), attention="ela", head_dim=4)
    found = ek.explain(network, torch.randn(2, 3, 12, 12))
    assert forms(found) == ["cpp block"] * 4
    names = {name for name, m in network.named_modules() if isinstance(m, ek.LayerAttention)}
    assert {e.name for e in found} == names
    assert {e.layer for e in found} == {"LayerAttention"}
    assert all(e.reasons == {} for e in found)


def test_a_summary() -> None:
    """Calls that were served alike are one line; another reason is another."""
    one, other = {"block": ("a hook",)}, {"block": ("a bias", "a hook")}
    found = Explanation(
        LayerExplanation(name, "LayerAttention", form, "cpp", reasons)
        for name, form, reasons in (
            ("a", "layer", one),
            ("b", "block", {}),
            ("c", "layer", one),
            ("d", "layer", other),
        )
    )
    assert found.summary().splitlines() == [
        "2 x LayerAttention: cpp, the whole layer in one call",
        "    not the residual block in one call: a hook",
        "1 x LayerAttention: cpp, the residual block in one call",
        "1 x LayerAttention: cpp, the whole layer in one call",
        "    not the residual block in one call: a bias",
        "    not the residual block in one call: a hook",
    ]
    assert Explanation().summary() == str(Explanation())


def test_layers_alone() -> None:
    stage = Stage(ek.LayerAttention(12, 4), ek.LayerAttention(12, 4))
    assert forms(ek.explain(stage, x_like())) == ["cpp layer"] * 2
    with ek.use_backend("eager"):
        found = ek.explain(stage, x_like())
    assert forms(found) == ["eager eager"] * 2
    assert found[0].reasons["layer"] == ("use_backend('eager') is in force",)
    layer = ek.LightLayerAttention(12, 4)
    (only,) = ek.explain(layer, x_like(), x_like())
    assert only == LayerExplanation("", "LightLayerAttention", "layer", "cpp", {})


def test_skipped_layers() -> None:
    stage = Stage(ek.ELA(12, 4), ek.ELA(12, 4, skip="retrieval"), ek.ELA(12, 4, skip="layer"))
    stage.layers[1].skipped = stage.layers[2].skipped = True
    found = ek.explain(stage, x_like())
    assert [e.form for e in found] == ["block", "pair", "skipped"]
    assert found[2].layer == "ELA"


def test_functions_and_histories_by_themselves() -> None:
    class Plain(nn.Module):
        def forward(self, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            history = ek.LayerHistory()
            history.attend(q, q, v, heads=2)
            return ek.layer_attention(q, [q], [v], 2).out

    q, v = torch.randn(2, 6), torch.randn(2, 6, 3, 4)
    found = ek.explain(Plain(), q, v)
    assert [(e.name, e.form, e.backend) for e in found] == [("", "op", "cpp")] * 2


def test_a_light_layer_that_no_kernel_serves() -> None:
    network = CifarResNet((2,), (8,), attention="mrla_light", head_dim=4)
    layer = next(m for m in network.modules() if isinstance(m, ek.LightLayerAttention))
    layer.Wk.register_forward_hook(lambda *_: None)
    found = ek.explain(network, torch.randn(2, 3, 12, 12))
    assert [e.form for e in found] == ["eager", "block"]
    assert found[0].reasons.keys() == {"block", "layer"}


@pytest.mark.parametrize("call", ["module", "block", "function"])
def test_a_forced_light_form_refuses_with_its_reasons(call: str) -> None:
    layer, x = ek.LightLayerAttention(12, 4), x_like()
    q, decay = torch.randn(2, 12), torch.rand(12)

    def run() -> Any:
        if call == "module":
            return layer(x, x)
        if call == "block":
            network = CifarResNet((2,), (8,), attention="mrla_light", head_dim=4)
            for m in network.modules():
                if isinstance(m, ek.LightLayerAttention):
                    m.Wv.register_forward_hook(lambda *_: None)
            return network(torch.randn(2, 3, 12, 12))
        return ek.light_layer_attention(q, q, x, x, decay, 3)

    layer.Wv.register_forward_hook(lambda *_: None)
    words = "it has no kernel for" if call == "function" else "Wq, Wk or Wv has hooks"
    run()
    with ek.use_backend("eager"):
        run()
    with ek.use_backend("cpp"), pytest.raises(ValueError, match=words):
        run()
    with ek.use_backend("cuda"), pytest.raises(ValueError, match="'cuda' was forced and cannot"):
        run()


def test_a_forced_light_form_of_an_empty_batch() -> None:
    """There is nothing to serve."""
    layer = ek.LightLayerAttention(12, 4)
    x = torch.randn(0, 12, 5, 6)
    with ek.use_backend("cpp"):
        assert layer(x, x).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(training: bool) -> None:
    network = CifarResNet((2,), (8,), attention="ela", head_dim=4, drop_path=0.5).train(training)
    images = torch.randn(4, 3, 12, 12)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    ek.explain(network, images)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.state_dict().items():
        if not name.endswith(
            "_extra_state"
        ):  # what a layer learns of its place is the same in every pass
            assert torch.equal(value, before[name]), name
    assert not any(layer.observations for layer in network.modules() if isinstance(layer, ek.ELA))


def test_nothing_that_is_watched_by_ebqm_is_observed() -> None:
    network = CifarResNet((3,), (8,), attention="ela", head_dim=4)
    ek.EBQM(network)
    ek.explain(network, torch.randn(4, 3, 12, 12))
    assert not any(layer.observations for layer in network.modules() if isinstance(layer, ek.ELA))


def test_a_backward_that_is_to_come_finds_what_it_saved() -> None:
    network = CifarResNet((2,), (8,), attention="ela", head_dim=4)
    images = torch.randn(4, 3, 12, 12)
    loss = network(images).sum()
    ek.explain(network, images)
    loss.backward()


def test_buffers_of_every_kind() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ek.LayerAttention(12, 4)
            self.register_buffer("replaced", torch.zeros(1))
            self.register_buffer("filled", None)
            self.register_buffer("expanded", torch.zeros(1).expand(3))
            with torch.inference_mode():
                self.register_buffer("of_inference", torch.zeros(2))
            self.lazy = nn.LazyBatchNorm1d()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.replaced = self.replaced + 1
            self.filled = torch.ones(1)
            self.register_buffer("new", torch.ones(1))
            with torch.inference_mode():
                self.of_inference.add_(1)
            return self.layer(x, ek.LayerHistory())

    model = Counting()
    ek.explain(model, x_like())
    assert model.replaced.item() == 0
    assert model.filled is None
    assert "new" not in dict(model.named_buffers())
    assert model.of_inference.tolist() == [0, 0]


def test_who_handles_a_warning_may_run_a_layer() -> None:
    layer = ek.LayerAttention(12, 4)
    layer.Wv.register_forward_hook(lambda *_: None)
    seen = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())
            layer(x_like(), ek.LayerHistory())

    handler, logger = Handler(), logging.getLogger("ela_kernels")
    logger.addHandler(handler)
    try:
        layer(x_like(), ek.LayerHistory())
    finally:
        logger.removeHandler(handler)
    assert len(seen) == 1


def test_nothing_is_told_that_is_expected(caplog: pytest.LogCaptureFixture) -> None:
    stage, light = (
        Stage(*(ek.LayerAttention(12, 4) for _ in range(3))),
        ek.LightLayerAttention(12, 4),
    )
    with caplog.at_level(logging.WARNING, "ela_kernels"):
        with ek.use_backend("eager"):
            stage(x_like())
        for width in range(3, 6):
            with pytest.raises(ValueError, match=r"^prev_out: got shape"):
                light(x_like(), torch.randn(2, 12, 5, width))
        with ek.use_backend("cpp"), pytest.raises(ValueError, match="was forced and cannot"):
            light(x_like(), x_like(dtype=torch.float64))
    assert not caplog.messages


def test_a_subclass_in_a_block_and_another_device() -> None:
    class Mine(ek.LayerAttention):
        pass

    layer = ek.ELA(12, 4)
    layer.attn = Mine(12, 4)
    (found,) = ek.explain(Stage(layer), x_like())
    assert (found.form, found.layer) == ("layer", "Mine")
    assert found.reasons == {"block": ("attn is a Mine, and the block is for LayerAttention",)}
    on_meta = Stage(ek.LayerAttention(12, 4)).to("meta")
    (found,) = ek.explain(on_meta, x_like().to("meta"))
    assert found.form == "eager"
    assert found.reasons["layer"] == ("no backend has kernels for tensors on meta",)


def test_modules_pickled_before_their_parts_had_a_file_of_their_own() -> None:
    data = pickle.dumps(ek.LayerAttention(12, 4), protocol=0)
    assert b"query_key_value\nChannelFilter" in data
    found = pickle.loads(
        data.replace(b"query_key_value\nChannelFilter", b"layer_attention\nChannelFilter")
    )
    assert type(found.Wq) is type(ek.LayerAttention(12, 4).Wq)


def test_an_error_of_the_model_is_the_model_s() -> None:
    with pytest.raises(ValueError, match="x: got shape"):
        ek.explain(Stage(ek.LayerAttention(12, 4)), torch.randn(2, 7, 5, 6))
    assert forms(ek.explain(Stage(ek.LayerAttention(12, 4)), x_like())) == ["cpp layer"]


def test_the_table() -> None:
    layer = ek.ELA(12, 4)
    layer.act = nn.GELU()
    text = str(ek.explain(Stage(ek.ELA(12, 4), layer), x_like()))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "class", "served", "by", "what"]
    assert lines[1].split()[:3] == ["layers.0.attn", "LayerAttention", "cpp"]
    assert "act is GELU" in lines[3]
    assert max(map(len, lines)) < 120
    assert "no call of a layer" in str(ek.explain(nn.Linear(2, 2), torch.randn(1, 2)))


def test_compiled_layers_are_not_told_that_they_are_slow(caplog: pytest.LogCaptureFixture) -> None:
    stage = torch.compile(Stage(ek.LayerAttention(12, 4)), backend="eager")
    with caplog.at_level(logging.WARNING, "ela_kernels"), torch.no_grad():
        stage(x_like())
    assert not caplog.messages
