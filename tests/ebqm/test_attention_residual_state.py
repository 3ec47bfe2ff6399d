"""Attention residuals that are skipped: their state, pruning, and what is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.residuals import DIM, Residuals, decide, names, skipped, tokens
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ela_kernels as ek
from ela_kernels.ebqm import Reason


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class TestState:
    def test_a_checkpoint_without_decisions_retrieves(self) -> None:
        model = Residuals()
        state = {n: t for n, t in model.state_dict().items() if n in dict(model.named_parameters())}
        other = Residuals()
        decide(other, {1, 2})
        other.load_state_dict(state)
        assert skipped(other) == set()

    def test_copies_and_pickles(self) -> None:
        model, ids = Residuals(), tokens()
        ebqm = ek.EBQM(model)
        model(ids)
        decide(model, {2, 4})
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert skipped(other) == {2, 4}
            assert not any(mix.observations or mix.watched for mix in other.mixes)
            torch.testing.assert_close(other(ids), model(ids), rtol=0, atol=0)
        assert len(model.mixes[1].observations) > 0
        ebqm.detach()

    def test_a_moving_average_follows(self) -> None:
        model = Residuals()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.4), use_buffers=True)
        for skip in ({1}, {2, 3}, set()):
            decide(model, skip)
            for _ in range(3):
                average.update_parameters(model)
            assert skipped(average.module) == skip

    def test_on_meta_and_back(self) -> None:
        mix = ek.AttentionResidual(DIM, device="meta", dtype=torch.float64)
        assert mix.decision.is_meta
        mix.to_empty(device="cpu").reset_parameters()
        assert not mix.skipped
        assert torch.equal(mix.query, torch.zeros(DIM, dtype=torch.float64))
        assert torch.equal(mix.norm_weight, torch.ones(DIM, dtype=torch.float64))
        assert mix.half().decision.dtype == torch.float32

    def test_pruned(self, backend: str) -> None:
        model, ids = Residuals().eval(), tokens()
        model(ids)
        decide(model, {2, 3})
        want = model(ids)
        assert ek.prune(model) is model
        assert not names(2, 3) & {name for name, _ in model.named_parameters()}
        assert names(1, 4) <= {name for name, _ in model.named_parameters()}
        assert torch.equal(model(ids), want)
        for other in (copy.deepcopy(model), Residuals().eval()):
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(1.0)
            other.load_state_dict(model.state_dict())
            assert torch.equal(other(ids), want)
            assert skipped(other) == {2, 3}
        model.train()
        ebqm = ek.EBQM(model, warmup=1, interval=1, probe_interval=1)
        for _ in range(2):
            model(ids).sum().backward()
            ebqm.step()
        assert [row.reason is Reason.PRUNED for row in ebqm.report().layers] == [
            i in (2, 3) for i in range(6)
        ]
        with pytest.raises(ValueError, match="got a layer that retrieves for a layer Attention"):
            model.mixes[2].set_extra_state(ek.AttentionResidual(DIM).get_extra_state())


class TestRefused:
    def test_a_list_where_it_is_skipped(self) -> None:
        mix = ek.AttentionResidual(DIM)
        mix.skipped = True
        with pytest.raises(
            ValueError, match="values: got list with an AttentionResidual that is skip"
        ):
            mix([torch.randn(2, 3, DIM)])

    def test_a_retrieval_that_was_changed_in_place(self) -> None:
        first, second = ek.AttentionResidual(DIM), ek.AttentionResidual(DIM)
        second.skipped = True
        history = ek.PositionHistory()
        history.append(torch.randn(2, 3, DIM))
        with torch.no_grad():
            first(history).add_(1.0)
        with pytest.raises(
            RuntimeError, match="reuse: got what was retrieved last, changed in place"
        ):
            second(history)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"skip": "layer"}, "skip: got 'layer' for an AttentionResidual; allowed is 'reuse'"),
            ({"skip": "retrieval"}, "skip: got 'retrieval' for an AttentionResidual; allowed is"),
            ({"skip": "reuse", "provides": False}, "provides: got False for an AttentionResidual"),
        ],
    )
    def test_modes_that_it_has_not(self, arguments: dict[str, object], words: str) -> None:
        layers = nn.ModuleList([ek.ELA(16), ek.AttentionResidual(DIM)])
        with pytest.raises(ValueError, match=words):
            ek.EBQM(layers, **arguments)
        assert (layers[0].skip, layers[0].provides) == ("reuse", True)
        name, value = list(arguments.items())[-1]
        with pytest.raises(ValueError, match=words):
            setattr(layers[1], name, value)
        ek.EBQM(layers, skip="reuse", provides=True)

    def test_pruning_what_retrieves(self) -> None:
        model = Residuals()
        decide(model, {2})
        with pytest.raises(ValueError, match=r"AttentionResidual 'mixes\.2' that has never run"):
            ek.prune(model)
        model(tokens())
        decide(model, {0, 2})
        with pytest.raises(ValueError, match=r"AttentionResidual 'mixes\.0' that comes first"):
            ek.prune(model)
        assert names(2) <= {name for name, _ in model.named_parameters()}

    def test_a_pruned_one_that_comes_first(self) -> None:
        model = Residuals()
        model(tokens())
        decide(model, {2})
        mix, history = ek.prune(model).mixes[2], ek.PositionHistory()
        history.append(torch.randn(2, 3, DIM))
        with pytest.raises(RuntimeError, match="this module was pruned, and cannot retrieve"):
            mix(history)


def test_analyze_leaves_no_trace() -> None:
    """In a model that enables gradients for itself, which EBQM would take for training."""
    model = Residuals(1)
    stage = nn.ModuleList(ek.ELA(16) for _ in range(2))
    model.stage = stage
    ebqm = ek.EBQM(model)

    def run(_: nn.Module, ids: torch.Tensor) -> None:
        history, x = ek.LayerHistory(), torch.randn(2, 16, 3, 3)
        for layer in stage:
            x = layer(x, history)
        with torch.enable_grad():
            model(ids)

    found = ek.analyze(model, [tokens()], forward=run)
    assert found.left == {}
    assert {layer.name for layer in found.layers} >= {"mixes.0", "mixes.1"}
    assert not any(mix.observations or mix.place is not None for mix in model.mixes)
    assert all(mix.watched for mix in model.mixes)
    ebqm.detach()
