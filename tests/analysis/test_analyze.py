"""analyze(): what layers retrieve on some batches, and what EBQM would skip."""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.analyzed import C, Stage, images, maps, network, stage
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.analysis import Analysis
from ela_kernels.ebqm import Reason
from ela_kernels.models import CifarResNet


def rows(found: Analysis) -> list[tuple[Any, ...]]:
    return [
        (layer.name, layer.place, layer.weights, layer.kl, layer.divergence)
        for layer in found.layers
    ]


def test_weights_and_divergences_by_hand() -> None:
    """Means over all samples, in batches of different sizes, and heads; the average of EBQM over the batches."""
    model, batches = stage(), maps()
    found = ek.analyze(model, batches, smoothing=0.5)
    passes = []
    for x in batches:
        kept: list[Any] = []
        model(x, kept)
        passes.append(kept)
    assert found.batches == 3
    for t, layer in enumerate(found.layers):
        weights = torch.cat([kept[t][0] for kept in passes])
        assert (layer.name, layer.layer) == (f"layers.{t}", "LayerAttention")
        assert (layer.stage, layer.place, layer.samples, layer.retrieves) == (0, t, 7, True)
        assert layer.weights == pytest.approx(weights.mean((0, 1)).tolist(), rel=1e-12)
        assert len(layer.weights) == t + 1
        if t == 0:
            assert math.isnan(layer.kl)
            assert math.isnan(layer.divergence)
            assert layer.reason is Reason.FIRST
            continue
        kl = torch.cat([kept[t][1] for kept in passes])
        assert layer.kl == pytest.approx(kl.mean().item(), rel=1e-12)
        x1, x2, x3 = ((1 - (-kept[t][1]).exp()).mean().item() for kept in passes)
        # Smoothed by a half, bias-corrected; kept in float32.
        assert layer.divergence == pytest.approx((x1 / 4 + x2 / 2 + x3) / 1.75, rel=1e-5)


@pytest.mark.parametrize("skip", [None, "retrieval", "layer", "reuse"])
def test_it_is_what_ebqm_finds(skip: str | None) -> None:
    """The same batches as training steps that change nothing: the same statistics, scores and decisions."""
    model, batches = network(), images(4)
    layers = [m for m in model.modules() if isinstance(m, ek.ELA)]
    options = {"low": 0.45, "high": 0.6, "quantile": 0.7, "max_row": 1, "smoothing": 0.8}
    if skip is not None:
        layers[1].skip, layers[1].skipped = skip, True  # type: ignore[assignment]
    found = ek.analyze(copy.deepcopy(model), batches, **options)
    ebqm = ek.EBQM(model, warmup=4, interval=4, probe_interval=1, **options)  # type: ignore[arg-type]
    for layer in layers:
        layer.probe_next = True
    for x in batches:
        model(x).sum().backward()
        ebqm.step()
    report = ebqm.report()
    assert len(found.layers) == len(report.layers) == 5
    # The stages' second numbers: EBQM counts them as registered, which here is as they run.
    for a, b in zip(found.layers, report.layers, strict=True):
        assert (a.name, a.stage, a.place) == (b.name, b.stage, b.place)
        assert (a.skipped, a.reason) == (b.skipped, b.reason)
        for name in ("divergence", "deviation", "score"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5, nan_ok=True)
    assert found.skipped == report.skipped
    assert found.skipped
    assert [a.retrieves for a in found.layers] == [True, skip is None, True, True, True]


@pytest.mark.parametrize("skip", ["retrieval", "layer", "reuse"])
def test_a_skipped_layer_is_asked_what_it_would_retrieve(skip: str) -> None:
    model, batches = network(), images()
    before = ek.analyze(model, batches).layers[1]
    layer = next(m for name, m in model.named_modules() if name == before.name)
    assert isinstance(layer, ek.ELA)
    layer.skip, layer.skipped = skip, True  # type: ignore[assignment]
    found = ek.analyze(model, batches).layers[1]
    assert not found.retrieves
    assert found.weights == pytest.approx(before.weights, rel=1e-5)
    assert found.kl == pytest.approx(before.kl, rel=1e-4)
    assert "skipped now" in str(ek.analyze(model, batches))


@pytest.mark.parametrize("number", [1, 2], ids=["read", "unread"])
def test_a_pruned_layer_has_nothing_to_show(number: int) -> None:
    model, batches = network(), images()
    model(batches[0])
    layer = [m for m in model.modules() if isinstance(m, ek.ELA)][number]
    layer.skipped = True
    ek.prune(model)
    found = ek.analyze(model, batches).layers[number]
    assert (found.retrieves, found.weights, found.samples) == (False, (), 0)
    assert (found.skipped, found.reason) == (True, Reason.PRUNED)


def test_the_mode() -> None:
    """Batch norm's statistics are those of the batch in training, and running ones otherwise."""
    model, batches = network(), images()
    by_training, by_default = (
        ek.analyze(model.eval(), batches, **o) for o in ({"training": True}, {})
    )
    assert rows(by_training)[1] == rows(by_default)[1]
    by_evaluation = ek.analyze(model.train(), batches, training=False)
    assert rows(by_evaluation)[1] != rows(by_training)[1]
    assert rows(ek.analyze(model.eval(), batches, training=None))[1] == rows(by_evaluation)[1]
    assert rows(ek.analyze(model.train(), batches, training=None))[1] == rows(by_training)[1]


def test_no_more_batches_are_read_than_asked_for() -> None:
    read = []

    def loader() -> Any:
        for x in maps():
            read.append(x)
            yield x

    assert ek.analyze(stage(), loader(), batches=2).batches == 2
    assert len(read) == 2
    assert ek.analyze(stage(), loader(), batches=50).batches == 3


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, torch.zeros(len(x))],
        lambda x: (x,),
        lambda x: Pair(x, 1),
        lambda x: {"x": x, "label": 1},
        lambda x: {"images": x, "labels": torch.zeros(len(x))},
        lambda x: ({"x": x}, torch.zeros(len(x))),
    ],
    ids=["tuple", "list", "one", "named", "keyword", "images", "nested"],
)
def test_kinds_of_batches(wrap: Callable[[Tensor], Any]) -> None:
    expected = ek.analyze(stage(), maps())
    found = ek.analyze(stage(), [wrap(x) for x in maps()])
    assert rows(found)[1:] == rows(expected)[1:]


def test_forward_calls_the_model() -> None:
    loader = [{"deep": {"down": [x]}} for x in maps()]
    found = ek.analyze(stage(), loader, forward=lambda model, b: model(b["deep"]["down"][0]))
    assert rows(found)[1:] == rows(ek.analyze(stage(), maps()))[1:]


def test_inputs_are_moved_to_the_device_of_the_model() -> None:
    """Without a second device: what is asked to move says where it was sent."""

    class Batch:
        sent: list[torch.device] = []  # noqa: RUF012

        def to(self, device: torch.device) -> Tensor:
            self.sent.append(device)
            return maps()[0]

    ek.analyze(stage(), [(Batch(), Batch()), {"x": Batch()}])
    assert Batch.sent == [torch.device("cpu")] * 3


def test_a_shared_layer_has_a_row_for_each_place() -> None:
    torch.manual_seed(3)
    layer = ek.LayerAttention(C, 4).double()
    found = ek.analyze(Stage(layer, layer, layer), maps())
    assert [(a.name, a.place, len(a.weights)) for a in found.layers] == [
        ("layers.0", t, t + 1) for t in range(3)
    ]
    assert len({a.divergence for a in found.layers}) == 1
    assert len({a.kl for a in found.layers[1:]}) == 2


def test_layers_of_ones_own() -> None:
    """A subclass, a module that calls the history, and a call that names nobody."""

    class Mine(ek.LayerAttention):
        pass

    class Calls(nn.Module):
        def __init__(self, names: bool) -> None:
            super().__init__()
            self.names = names

        def forward(self, x: Tensor, history: ek.LayerHistory) -> Tensor:
            q = x.mean((2, 3))
            return history.attend(q, q, x, heads=2, caller=self if self.names else None)

    model = Stage(Mine(C, 4).double(), Calls(True), Calls(False))
    found = ek.analyze(model, maps())
    assert [(a.name, a.layer, len(a.weights)) for a in found.layers] == [
        ("layers.0", "Mine", 1),
        ("layers.1", "Calls", 2),
        ("", "function", 3),
    ]
    assert found.layers[2].reason is None
    assert math.isnan(found.layers[2].divergence)
    assert not math.isnan(found.layers[2].kl)
    assert "not a layer that EBQM watches" in str(found)


def test_beside_ela_layers_others_are_not_decided_about() -> None:
    torch.manual_seed(3)
    model = Stage(*(kind(C, 4).double() for kind in (ek.ELA, ek.LayerAttention, ek.ELA)))
    found = ek.analyze(model, maps())
    assert [a.reason is None for a in found.layers] == [False, True, False]
    assert math.isnan(found.layers[1].score)
    assert len(found.layers[1].weights) == 2


def test_what_is_left_out() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = stage()
            self.idle = ek.ELA(C, 4)
            self.light = ek.LightLayerAttention(C, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.light(self.stage(x), x)

    found = ek.analyze(Two(), maps())
    assert set(found.left) == {"idle", "light"}
    assert "no weights over the layers" in found.left["light"]
    assert "did not come by" in found.left["idle"]
    assert "left out: light: the light form" in str(found)
    assert len(found.layers) == 4


def test_a_converted_model() -> None:
    model = CifarResNet((3,), (8,), attention="mrla", head_dim=4, fused=False)
    with pytest.raises(ValueError, match="the concatenating form"):
        ek.analyze(model, images())
    ek.convert(model)
    assert [a.place for a in ek.analyze(model, images()).layers] == [0, 1, 2]


def test_wrapped_models() -> None:
    expected = rows(ek.analyze(network(), images()))
    for wrapped in (
        nn.DataParallel(network()),
        torch.compile(network(), backend="eager"),
        nn.Sequential(torch.compile(network(), backend="eager")),
    ):
        found = rows(ek.analyze(wrapped, images()))
        assert [row[2:4] for row in found[1:3]] == [row[2:4] for row in expected[1:3]]
        assert [row[0].removeprefix("0.") for row in found] == [row[0] for row in expected]


def test_a_compiled_model_that_has_run() -> None:
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    compiled(images()[0])
    assert rows(ek.analyze(compiled, images()))[1] == rows(ek.analyze(model, images()))[1]


def test_not_finite() -> None:
    batches = maps()
    batches[1][0] = math.nan
    found = ek.analyze(stage(), batches)
    assert [a.reason for a in found.layers] == [Reason.FIRST] + [Reason.NOT_FINITE] * 3
    assert math.isnan(found.layers[1].weights[0])
    assert found.to_dict()["layers"][1]["weights"] == [None, None]
    assert "nan" in str(found)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": 3}, TypeError, "model: got int"),
        (
            {"model": nn.Linear(4, 4)},
            ValueError,
            "model: got Linear, in which no layer .* no layer attention: ela_kernels.integrations.attach",
        ),
        (
            {"model": nn.LazyLinear(4)},
            ValueError,
            "model: got the parameter weight without numbers",
        ),
        ({"model": nn.Linear(4, 4, device="meta")}, ValueError, "on the meta device"),
        ({"loader": torch.zeros(2, 4)}, TypeError, r"loader: got Tensor.*\[batch\]"),
        ({"loader": {"x": 1}}, TypeError, "loader: got dict"),
        ({"loader": 7}, TypeError, "loader: got int"),
        ({"loader": []}, ValueError, "loader: got no batch"),
        ({"loader": [()]}, ValueError, "a batch that is an empty tuple"),
        ({"loader": [7]}, TypeError, "a batch that is a int.* give `forward`"),
        (
            {"loader": [{"foo": 1}]},
            ValueError,
            r"the keys \['foo'\].*Stage.forward.*give `forward`",
        ),
        ({"batches": 0}, ValueError, "batches: got 0"),
        ({"batches": True}, TypeError, "batches: got bool"),
        ({"forward": 1}, TypeError, "forward: got int"),
        ({"training": "yes"}, TypeError, "training: got str"),
        ({"low": 2.0}, ValueError, "low: got 2.0"),
        ({"warmup": 5}, TypeError, "warmup: got .* allowed are settings of EBQM .* low, high"),
        ({"lows": 0.5}, TypeError, "lows: got"),
        ({"ceiling": 0.5}, TypeError, "ceiling: got 0.5, but it is not there any more, since low"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], said: str) -> None:
    default: list[Any] = maps()
    if isinstance(change.get("model"), nn.Linear):
        default = [torch.zeros(2, 4)]
    given = {"model": stage(), "loader": default, **change}
    with pytest.raises(error, match=said):
        ek.analyze(given.pop("model"), given.pop("loader"), **given)


def test_advice_is_for_the_model_that_there_is() -> None:
    """Only a network that `convert` may know is sent there; one whose layers did not run is told that."""
    published = nn.ModuleList([ek.modules.ConcatLayerAttention(C, 4)])
    with pytest.raises(ValueError, match=r"allowed is .*ela_kernels.convert\(model\) puts them"):
        ek.analyze(published, maps(1), forward=lambda model, x: x)
    with pytest.raises(ValueError, match=r"did not come by.*AttentionResidual layers$"):
        ek.analyze(stage(), maps(1), forward=lambda model, x: x)
