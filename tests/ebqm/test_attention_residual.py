"""EBQM on attention residuals: a skipped one takes over what was retrieved last before it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.residuals import DIM, Residuals, by_hand, decide, loss_of, names, skipped, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.ebqm import Reason, idle_parameters, spare_skipped


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    chosen = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


class TestNumbers:
    @pytest.mark.parametrize("skip", [set(), {2}, {1, 2, 4}, {5}, {0, 3}])
    def test_output_gradients_and_divergence(self, skip: set[int], backend: str) -> None:
        model, ids = Residuals().double(), tokens()
        decide(model, skip)
        history = ek.PositionHistory()
        found = loss_of(model(ids, history), ids)
        logits, kls = by_hand(model, ids, skip)
        want = loss_of(logits, ids)
        torch.testing.assert_close(found, want)
        # Against the last that retrieved, however many were skipped since.
        torch.testing.assert_close(history.kl, [kl for kl in kls if kl is not None][-1])
        assert history.position == 6
        parameters = list(model.parameters())
        for a, b in zip(
            torch.autograd.grad(found, parameters, allow_unused=True),
            torch.autograd.grad(want, parameters, allow_unused=True),
            strict=True,
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)

    def test_gradcheck_through_a_retrieval_that_is_used_twice(self, backend: str) -> None:
        first, second = (ek.AttentionResidual(4, dtype=torch.float64) for _ in range(2))
        second.skipped = True

        def run(a: torch.Tensor, b: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
            history = ek.PositionHistory()
            history.append(a)
            history.append(b)
            out = torch.func.functional_call(first, {"query": query}, (history,))
            history.append(out.sin())
            return out + second(history).square()

        inputs = [torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(2)]
        query = torch.randn(4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(run, (*inputs, query))

    def test_it_gives_the_same_tensor_and_reads_nothing(self, ran: list[str]) -> None:
        first, second = ek.AttentionResidual(DIM), ek.AttentionResidual(DIM)
        second.skipped = True
        history = ek.PositionHistory()
        history.append(torch.randn(2, 3, DIM))
        out, weights = first(history), history.weights
        history.append(torch.randn(2, 3, DIM))
        before = list(ran)
        assert second(history) is out
        assert history.weights is weights
        assert ran == before

    def test_the_first_of_a_history_retrieves(self) -> None:
        mix, history, value = (
            ek.AttentionResidual(DIM),
            ek.PositionHistory(),
            torch.randn(2, 3, DIM),
        )
        mix.skipped = True
        history.append(value)
        torch.testing.assert_close(mix(history), value)
        assert history.weights is not None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, None])
    def test_under_autocast_and_checkpoints(self, dtype: torch.dtype | None) -> None:
        """Layers under checkpoints, with the history outside of them."""
        model, ids = Residuals(), tokens()
        decide(model, {2, 3})

        def run(wrap: bool) -> list[torch.Tensor | None]:
            history = ek.PositionHistory()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                history.append(model.embed(ids))
                for layer, mix in zip(model.layers, model.mixes, strict=False):
                    x = mix(history)
                    if dtype is not None:
                        assert x.dtype == dtype
                    y = checkpoint(layer, x, use_reentrant=False) if wrap else layer(x)
                    history.append(y)
                out = model.mixes[-1](history)
            return list(
                torch.autograd.grad(
                    out.float().square().sum(), model.parameters(), allow_unused=True
                )
            )

        for a, b in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class TestWatching:
    def test_divergences_are_those_of_the_formula(self, backend: str) -> None:
        model, ids = Residuals().double(), tokens()
        ebqm = ek.EBQM(model, smoothing=0.0, warmup=1, interval=1, low=0.0)
        loss_of(model(ids), ids).backward()
        ebqm.step()
        _, kls = by_hand(model, ids, set())
        report = ebqm.report()
        assert [row.place for row in report.layers] == [*range(6)]
        assert {row.stage for row in report.layers} == {0}
        assert math.isnan(report.layers[0].divergence)
        for row, kl in zip(report.layers[1:], kls[1:], strict=True):
            z = 1 - (-kl).exp()
            assert row.divergence == pytest.approx(z.mean().item(), rel=1e-6)
            assert row.deviation == pytest.approx(z.std(correction=0).item(), rel=1e-4)
            assert 0 < row.entropy < 1
            assert math.isnan(row.importance)
            assert row.left_out == 0
        assert report.layers[0].reason is Reason.FIRST
        assert "mixes.5" in str(report)

    def test_sequences_of_different_lengths_in_one_step(self) -> None:
        """Every position of all micro-batches counts alike."""
        model, parts = Residuals().double(), [tokens(), tokens(5)[:, :3]]
        ebqm = ek.EBQM(model, smoothing=0.0)
        for ids in parts:
            model(ids).sum().backward()
        ebqm.step()
        found = [by_hand(model, ids, set())[1] for ids in parts]
        for i, row in enumerate(ebqm.report().layers[1:], 1):
            z = torch.cat([1 - (-kls[i]).exp().flatten() for kls in found])
            assert row.divergence == pytest.approx(z.mean().item(), rel=1e-6)

    def test_entropy_is_that_of_the_weights(self) -> None:
        model, ids = Residuals(1), tokens()
        for mix in model.mixes:
            nn.init.zeros_(mix.query)  # equal weights
        ebqm = ek.EBQM(model, warmup=1, interval=1)
        model(ids).sum().backward()
        ebqm.step()
        assert ebqm.report().layers[1].entropy == pytest.approx(1.0)
        assert ebqm.report().layers[1].divergence == pytest.approx(0.5)  # 1 - exp(-log 2)

    @pytest.mark.parametrize("shape", [(2, DIM, 3, 4), (2, 5, DIM), (2, DIM)])
    def test_the_report_of_maps_tokens_and_vectors(self, shape: tuple[int, ...]) -> None:
        """The weights are a mean over samples and positions, a number for each value."""
        mixes = nn.ModuleList(ek.AttentionResidual(DIM) for _ in range(2))
        ebqm, history = ek.EBQM(mixes, warmup=1, interval=1), ek.PositionHistory()
        for mix in mixes:
            nn.init.normal_(mix.query)
            history.append(torch.randn(shape))
            mix(history)
        ebqm.step()
        row, weights = ebqm.report().layers[1], history.weights
        assert weights is not None
        want = weights.movedim(1, -1).reshape(-1, 2).mean(0).tolist()
        assert row.weights == pytest.approx(want)
        assert 0 < row.entropy < 1

    def test_a_history_is_a_stage(self) -> None:
        """Whatever the order in which they are registered; and none that comes first in one is skipped."""
        mixes = nn.ModuleList(ek.AttentionResidual(DIM) for _ in range(4))
        ebqm = ek.EBQM(mixes, warmup=1, interval=1, low=0.999, high=1.0, max_share=1.0, max_row=9)
        for chosen in ((1, 0), (3, 2)):
            history = ek.PositionHistory()
            for i in chosen:
                history.append(torch.randn(2, 3, DIM, requires_grad=True))
                mixes[i](history)
        ebqm.step()
        rows = ebqm.report().layers
        assert [row.place for row in rows] == [1, 0, 1, 0]
        assert [row.stage for row in rows] == [0, 0, 1, 1]
        assert [row.skipped for row in rows] == [True, False, True, False]

    def test_a_skipped_one_is_probed(self, backend: str) -> None:
        model, ids = Residuals().double(), tokens()
        decide(model, {3})
        ebqm = ek.EBQM(model, smoothing=0.0, warmup=99, interval=99, probe_interval=2)
        seen = []
        for _ in range(4):
            model.zero_grad()
            loss_of(model(ids), ids).backward()
            seen.append([len(mix.observations) for mix in model.mixes])
            ebqm.step()
            assert model.mixes[3].query.grad is None
        # The first of the history has no divergence, and the skipped one is looked at after the second step.
        assert [s[3] for s in seen] == [0, 0, 1, 0]
        assert all(s[0] == 0 and s[1] == s[2] == s[4] == s[5] == 1 for s in seen)
        _, kls = by_hand(model, ids, set())  # up to it nobody is skipped
        want = (1 - (-kls[3]).exp()).mean().item()
        assert ebqm.report().layers[3].divergence == pytest.approx(want, rel=1e-6)

    def test_a_probe_is_for_one_pass_of_a_step_and_without_gradient(self) -> None:
        model, ids = Residuals(), tokens()
        decide(model, {3})
        ebqm = ek.EBQM(model, probe_interval=1)
        ebqm.step()
        for _ in range(2):  # two micro-batches
            history = ek.PositionHistory()
            model(ids, history)
        assert [len(mix.observations) for mix in model.mixes] == [0, 2, 2, 1, 2, 2]
        kl = history.probe(model.mixes[3].query)
        assert kl is not None
        assert kl.shape == ids.shape
        assert not kl.requires_grad

    @pytest.mark.parametrize("why", ["eval", "no_grad", "explain", "detached", "list"])
    def test_what_is_no_training_pass_is_not_observed(self, why: str) -> None:
        model, ids = Residuals(), tokens()
        ebqm = ek.EBQM(model)
        if why == "eval":
            model.eval()
        if why == "detached":
            ebqm.detach()
        with torch.set_grad_enabled(why != "no_grad"):
            if why == "explain":
                ek.explain(model, ids)
            elif why == "list":
                model.mixes[1]([torch.randn(2, 3, DIM)] * 2)
            else:
                model(ids)
        assert not any(mix.observations for mix in model.mixes)

    def test_explain_says_that_it_is_skipped(self) -> None:
        model = Residuals(2)
        decide(model, {1})
        found = ek.explain(model, tokens())
        assert [(e.name, e.form == "skipped") for e in found] == [
            ("mixes.0", False),
            ("mixes.1", True),
            ("mixes.2", False),
        ]


class TestTraining:
    def test_a_redundant_module_is_skipped_and_comes_back(self, backend: str) -> None:
        """Two that share a query, with a value between that it turns away from; in training, to the same numbers."""
        model = Residuals(twins=3)
        ebqm = ek.EBQM(
            model, low=0.1, high=0.2, warmup=4, interval=2, probe_interval=2, smoothing=0.5
        )
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        spare_skipped(optimizer, model)
        losses, ids = [], tokens(8)
        for step in range(30):
            skip = skipped(model)
            loss = loss_of(model(ids), ids)
            with torch.no_grad():
                want = loss_of(by_hand(model, ids, skip)[0], ids)
            # float32: sums in another order
            torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ebqm.step()
            losses.append(loss.item())
            assert skipped(model) == ({3} if step >= 3 else set())
        assert losses[-1] < losses[0]
        assert ebqm.report().layers[3].reason in (Reason.REDUNDANT, Reason.HELD)
        with torch.no_grad():
            model.mixes[3].query.neg_()
        for _ in range(12):
            model(ids).sum().backward()
            ebqm.step()
        assert 3 not in skipped(model)

    def test_a_resumed_run_decides_the_same(self) -> None:
        settings = {"low": 0.1, "high": 0.2, "warmup": 4, "interval": 2, "probe_interval": 2}
        model, ids = Residuals(twins=3), tokens(8)
        ebqm = ek.EBQM(model, **settings)
        runs = [(model, ebqm)]
        for step in range(12):
            if step == 7:
                assert skipped(model) == {3}
                other = Residuals()
                other.load_state_dict(model.state_dict())
                assert skipped(other) == {3}
                assert [mix.place for mix in other.mixes] == [*range(6)]
                runs.append((other, ek.EBQM(other, **settings)))
                runs[1][1].load_state_dict(ebqm.state_dict())
            for network, watcher in runs:
                network(ids).sum().backward()
                watcher.step()
        assert repr(runs[0][1].report()) == repr(runs[1][1].report())

    def test_optimizers_spare_what_is_idle(self) -> None:
        model = Residuals()
        model(tokens())
        assert idle_parameters(model) == []
        decide(model, {0, 2, 4})  # the first of a history retrieves
        assert names_of(model, idle_parameters(model)) == names(2, 4)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
        spare_skipped(optimizer, model)
        before = copy.deepcopy(model.state_dict())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
        assert names(2, 4) <= still
        assert not names(1, 3) & still
