"""Stages, rows and readers are learnt from the passes that ran: from no name, and from no order of registration."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.ebqm import Reason

ELA = partial(ek.ELA, CHANNELS, head_dim=8)


class LastFirst(nn.Module):
    """Registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = ELA(), ELA(), nn.ModuleList([ELA(), ELA()])

    def run(self) -> list[ek.ELA]:
        return [*self.first, self.middle, self.last]

    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        for layer in self.run():
            x = layer(x, history)
        return x


class Branches(nn.Module):
    """Two branches, their layers registered in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList([ELA(), ELA()]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, one, two = x, x, ek.LayerHistory(), ek.LayerHistory()
        for left, right in self.pairs:
            a, b = left(a, one), right(b, two)
        return a + b


class Interleaved(nn.Module):
    """The branches run one after the other, backwards in the list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ELA() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for part in (self.layers[4::-2], self.layers[5::-2]):
            history, y = ek.LayerHistory(), x
            for layer in part:
                y = layer(y, history)
            outs.append(y)
        return outs[0] + outs[1]


class OwnReader(nn.Module):
    """The user's own retrieval reads the last layers' pairs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers, self.kind = nn.ModuleList(ELA() for _ in range(3)), kind

    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        for layer in self.layers:
            x = layer(x, history)
        q = x.mean((2, 3))
        if self.kind == "attend":
            return history.attend(q, q, x, heads=2)
        if self.kind == "values":
            return x + sum(history.values)
        return x + (q @ sum(history.keys).T).sum()


class UsedTwice(nn.Module):
    """One layer in two places of a stage, and one in two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ELA() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.layers
        for order in ((a, b, a, c), (c, b)):
            history = ek.LayerHistory()
            for layer in order:
                x = layer(x, history)
        return x


class NowAndThen(nn.Module):
    """A layer that only some passes run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.with_last = nn.ModuleList(ELA() for _ in range(3)), True

    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        for layer in self.layers if self.with_last else self.layers[:2]:
            x = layer(x, history)
        return x


KINDS: dict[str, Callable[[], nn.Module]] = {
    "last first": LastFirst,
    "branches": Branches,
    "interleaved": Interleaved,
    "attend": partial(OwnReader, "attend"),
    "values": partial(OwnReader, "values"),
    "keys": partial(OwnReader, "keys"),
    "used twice": UsedTwice,
    "now and then": NowAndThen,
}


def elas(model: nn.Module) -> list[ek.ELA]:
    return [m for m in model.modules() if isinstance(m, ek.ELA)]


def reloaded(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
def test_pruning_changes_no_bit(kind: str, mode: str) -> None:
    """Every set of two skipped layers, and every single one."""
    make, x = KINDS[kind], batch()
    count = len(elas(make()))
    for skip in {frozenset((i, j)) for i in range(count) for j in range(count)}:
        model = make()
        model(x), model.eval()
        for i, layer in enumerate(elas(model)):
            layer.skip, layer.skipped = mode, i in skip
        with torch.no_grad():
            want = model(x)
            copies = [copy.deepcopy(model), reloaded(model, make)]
            for pruned in (model, *copies):
                before = sum(p.numel() for p in pruned.parameters())
                assert torch.equal(ek.prune(pruned)(x), want)
                assert sum(p.numel() for p in pruned.parameters()) < before


def test_what_nobody_reads_goes() -> None:
    model = LastFirst()
    model(batch())
    model.last.skipped = model.middle.skipped = True
    ek.prune(model)
    assert model.last.attn is None
    assert model.middle.attn is None
    model = LastFirst()
    model(batch())
    model.middle.skipped = True
    assert ek.prune(model).middle.attn is not None


def test_a_reader_outside_of_the_pruned_part_counts() -> None:
    body, head, x = nn.ModuleList([ELA(), ELA()]), ELA(), batch()

    def run() -> Tensor:
        history, y = ek.LayerHistory(), x
        for layer in (*body, head):
            y = layer(y, history)
        return y

    run()
    body.eval(), head.eval()
    body[1].skipped = True
    want = run()
    ek.prune(body)
    assert torch.equal(run(), want)
    assert body[1].attn is not None


def test_a_layer_that_only_some_passes_run() -> None:
    model, x = NowAndThen(), batch()
    model(x)
    model.with_last = False
    model(x), model.eval()
    model.layers[1].skipped = True
    ek.prune(model)
    assert model.layers[1].attn is not None  # the third layer may run again


def test_a_reader_that_is_gone_no_longer_counts() -> None:
    model = NowAndThen()
    model(batch())
    model.layers[1].skipped = True
    del model.layers[2]
    gc.collect()
    model.eval()
    want = model(batch(1).fill_(1.0))
    assert torch.equal(ek.prune(model)(batch(1).fill_(1.0)), want)
    assert model.layers[1].attn is None


def test_a_decision_taken_back_after_loading() -> None:
    model, x = LastFirst(), batch()
    model(x)
    model.middle.skipped = model.last.skipped = True
    for back in (True, False):
        other = reloaded(model, LastFirst)
        other.last.skipped = not back
        want = other(x)
        fresh = copy.deepcopy(other)
        assert ek.prune(reloaded(other, LastFirst)).middle.attn is not None  # it may be read
        assert torch.equal(ek.prune(fresh)(x), want)
        assert torch.equal(ek.prune(other)(x), want)
        assert (other.middle.attn is None) != back  # the pass has shown who reads it


class TestWhatIsNotKnownIsRefused:
    def test_a_checkpoint_of_an_earlier_version(self) -> None:
        model = LastFirst()
        model(batch())
        model.middle.skipped = True
        state = {
            k: v[:4] if k.endswith("_extra_state") else v for k, v in model.state_dict().items()
        }
        other = LastFirst()
        other.load_state_dict(state)
        with pytest.raises(
            ValueError, match=r"^model: got a skipped layer 'middle' that has never"
        ):
            ek.prune(other)
        other(batch())
        ek.prune(other)

    def test_compiled_passes_teach_nothing(self) -> None:
        model = LastFirst()
        torch.compile(model, backend="eager")(batch())
        model.middle.skipped = True
        with pytest.raises(ValueError, match=r"a compiled pass learns nothing"):
            ek.prune(model)
        torch._dynamo.reset()


@pytest.mark.parametrize("wrap", ["plain", "checkpoint", "inference"])
def test_how_it_is_learnt(wrap: str) -> None:
    model, x = LastFirst(), batch()
    if wrap == "checkpoint":
        history, y = ek.LayerHistory(), x.requires_grad_()
        for layer in model.run():
            y = checkpoint(layer, y, history, use_reentrant=False)
        y.sum().backward()
    else:
        with torch.inference_mode(wrap == "inference"):
            model(x)
    model.middle.skipped = True
    model.eval()
    want = model(x)
    assert torch.equal(ek.prune(model)(x), want)


def observe(layer: ek.ELA, x: float) -> None:
    layer.observations.append(torch.full((2, 2), -torch.log1p(torch.tensor(-x)).item()))


def decisions(model: nn.Module, redundant: set[int], **settings: Any) -> ek.EBQM:
    """EBQM after one decision on a model of which the layers numbered in `redundant` repeat what was there."""
    model(batch())
    ebqm = ek.EBQM(model, warmup=1, interval=1, smoothing=0.0, **settings)
    for i, layer in enumerate(elas(model)):
        if layer.place:
            observe(layer, 0.001 if i in redundant else 0.9)
    ebqm.step()
    return ebqm


class TestRows:
    def test_of_layers_registered_in_another_order(self) -> None:
        model = LastFirst()  # registered: last, middle, first.0, first.1
        report = decisions(model, {0, 1, 3}, max_row=2, max_share=1.0, low=0.8, high=0.9).report()
        assert [(r.stage, r.place) for r in report.layers] == [(0, 3), (0, 2), (0, 0), (0, 1)]
        assert [r.reason for r in report.layers].count(Reason.ROW) == 1
        assert report.layers[2].reason is Reason.FIRST
        run = [layer.skipped for layer in model.run()]
        assert run.count(True) == 2
        assert run != [False, True, True, True]

    def test_of_branches(self) -> None:
        model = Branches()
        # The second and third of the left branch, which are neighbours, and the second of the right one.
        report = decisions(model, {2, 4, 3}, max_row=1, max_share=1.0, low=0.5, high=0.6).report()
        assert [(r.stage, r.place) for r in report.layers] == [
            (branch, place) for place in range(3) for branch in range(2)
        ]
        assert [r.reason for r in report.layers].count(Reason.ROW) == 1
        assert model.pairs[1][1].skipped
        assert model.pairs[1][0].skipped != model.pairs[2][0].skipped

    def test_a_layer_that_is_first_in_one_of_its_places_is_kept(self) -> None:
        model = UsedTwice()
        report = decisions(model, {0, 1, 2}, max_row=3, max_share=1.0, low=0.8, high=0.9).report()
        assert [r.reason for r in report.layers] == [Reason.FIRST, Reason.REDUNDANT, Reason.FIRST]

    def test_of_a_loaded_model_that_has_not_run(self) -> None:
        model = Interleaved()
        model(batch())
        other = reloaded(model, Interleaved)
        ebqm = ek.EBQM(other)
        assert {r.place for r in ebqm.report().layers} == {0, 1, 2}
        other(batch())
        stages = [r.stage for r in ebqm.report().layers]
        assert stages == [0, 1, 0, 1, 0, 1]
