"""What EBQM sees of a model that is exported, exchanged in part, watched twice, or run without training."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, batch, plant, skipped, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, update_bn

import ela_kernels as ek
from ela_kernels.ebqm import Reason
from ela_kernels.modules import observations

QUICK: dict[str, Any] = {"warmup": 10, "interval": 5, "probe_interval": 5, "smoothing": 0.8}


def seen(ebqm: ek.EBQM) -> list[bool]:
    return [not math.isnan(row.divergence) for row in ebqm.report().layers]


def export(network: Network, strict: bool, training: bool) -> None:
    torch.export.export(network.train(training), (batch(),), strict=strict)


class TestExport:
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_it_goes_on_seeing(self, strict: bool, training: bool) -> None:
        network = Network((3,))
        ebqm = ek.EBQM(network)
        network(batch()).sum().backward()
        export(network, strict, training)
        assert all(type(layer.totals.values) is torch.Tensor for layer in network.layers)
        ebqm.step()
        assert seen(ebqm) == [False, True, True]
        before = ebqm.report().layers[1].divergence
        plant(network, {1, 2})
        train(network, ebqm, 200)
        assert ebqm.report().layers[1].divergence < 0.5 * before

    def test_what_is_exported_has_the_decisions(self) -> None:
        network = Network((3,)).eval()
        network.layers[1].skipped = True
        ek.EBQM(network)
        program = torch.export.export(network, (batch(),))
        x = batch()
        # float32: the functional op in another order of sums
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


class TestPassesThatAreNoTraining:
    def test_without_gradients(self) -> None:
        network = Network((3,))
        ebqm = ek.EBQM(network)
        with torch.no_grad():
            network(batch())
        with torch.inference_mode():
            network(batch())
        update_bn([batch()], network)
        average = AveragedModel(network)
        update_bn([batch()], average)
        ebqm.step()
        assert seen(ebqm) == [False] * 3

    def test_a_probe_waits_for_one(self) -> None:
        network = Network((3,))
        ek.EBQM(network)
        network.layers[1].skipped = network.layers[1].probe_next = True
        with torch.no_grad():
            network(batch())
        assert network.layers[1].probe_next
        network(batch())
        assert not network.layers[1].probe_next

    @pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
    def test_recomputed_parts_are_seen_once(self, mode: str) -> None:
        network = Network((3,), skip=mode)
        ek.EBQM(network)
        layer = network.layers[1]
        layer.skipped = layer.probe_next = True
        layer.attn = checkpoint_wrapper(layer.attn)
        network.layers[2].attn = checkpoint_wrapper(network.layers[2].attn)
        network(batch()).sum().backward()
        assert [len(layer.observations) for layer in network.layers] == [0, 1, 1]


class TestTransforms:
    """torch.func works on wrappers of tensors that mean nothing once it has ended."""

    def network(self) -> Network:
        return Network((3,), norm_layer=lambda dim: nn.GroupNorm(2, dim))

    def test_gradients_of_each_sample_are_no_pass(self) -> None:
        network = self.network()
        ebqm = ek.EBQM(network, probe_interval=1)
        network.layers[1].skipped = True

        def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return functional_call(network, parameters, (x[None],)).square().mean()

        parameters = {name: p.detach() for name, p in network.named_parameters()}
        for _ in range(2):
            vmap(grad(loss), (None, 0))(parameters, batch())
            ebqm.step()
        assert seen(ebqm) == [False] * 3

    def test_a_gradient_is_one(self) -> None:
        network, x = self.network(), batch()
        ebqm, other = ek.EBQM(network, probe_interval=1), copy.deepcopy(network)
        plain = ek.EBQM(other, probe_interval=1)

        def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            return functional_call(network, parameters, (x,)).square().mean()

        for _ in range(2):
            grad(loss)({name: p.detach() for name, p in network.named_parameters()})
            other(x).sum().backward()
            for each in (ebqm, plain):
                each.step()
                each.model.layers[1].skipped = True
        found, want = ebqm.report().layers, plain.report().layers
        for layer, wanted in zip(found[1:], want[1:], strict=True):
            assert layer.divergence == pytest.approx(wanted.divergence, rel=1e-4)

    def test_an_ensemble_is_no_pass_of_one_of_its_models(self) -> None:
        networks = [Network((3,)) for _ in range(2)]
        networks[1].layers[1].skipped = True
        ebqm = ek.EBQM(networks[0])
        parameters, buffers = stack_module_state(networks)
        x = batch()
        out = vmap(lambda p, b: functional_call(networks[0], (p, b), (x,)))(parameters, buffers)
        ebqm.step()
        assert seen(ebqm) == [False] * 3
        want = torch.stack([network(x) for network in networks])
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_what_one_left_behind_that_was_dropped() -> None:
    network = Network((3,))
    ebqm = ek.EBQM(network)
    network(batch())
    del ebqm
    gc.collect()
    ebqm = ek.EBQM(network)
    ebqm.step()
    assert seen(ebqm) == [False] * 3


def test_nothing_retrieved_before_in_a_compiled_layer() -> None:
    torch._dynamo.reset()
    network = Network((3,))
    ebqm = ek.EBQM(network)
    network.layers[0].skipped = True
    network.layers[0].compile(backend="eager")
    network(batch())
    ebqm.step()
    assert ebqm._statistics.read()[:2] == [None, None]
    assert seen(ebqm) == [False, False, True]


class TestTwo:
    def test_both_see_everything(self) -> None:
        network = Network((4,))
        first = ek.EBQM(network, **QUICK)
        with pytest.warns(UserWarning, match="another EBQM watches"):
            second = ek.EBQM(network, **QUICK)
        for _ in range(4):
            for _ in range(2):
                network(batch()).sum().backward()
            second.step()
            first.step()
        assert [r.divergence for r in first.report().layers[1:]] == [
            r.divergence for r in second.report().layers[1:]
        ]
        assert seen(first) == [False, True, True, True]

    def test_one_that_never_steps_keeps_little(self) -> None:
        network = Network((2,))
        first = ek.EBQM(network)
        with pytest.warns(UserWarning, match="another EBQM watches"):
            second = ek.EBQM(network)
        for _ in range(100):
            network(batch(1))
            second.step()
        assert max(len(kept) for kept, _ in first._watch._inbox.values()) == 64

    def test_one_that_is_gone_is_not_spoken_of(self, recwarn: pytest.WarningsRecorder) -> None:
        network = Network((2,))
        ek.EBQM(network)
        ek.EBQM(network).detach()
        ek.EBQM(copy.deepcopy(network))
        assert not recwarn.list


class TestChanges:
    def test_an_exchanged_layer_is_seen_from_its_first_pass_and_starts_anew(self) -> None:
        network = Network((4,))
        plant(network, {2, 3})
        ebqm = ek.EBQM(network, **{**QUICK, "warmup": 1000})
        train(network, ebqm, 10)
        before = ebqm.report().layers
        network.stages[0][2] = ek.ELA(CHANNELS, head_dim=8)
        train(network, ebqm, 1)
        after = ebqm.report().layers
        assert seen(ebqm) == [False, True, True, True]
        assert after[3].divergence == pytest.approx(before[3].divergence, abs=0.3)
        network.stages[0][3].skipped = True
        network.stages[0][3] = ek.ELA(CHANNELS, head_dim=8)
        train(network, ebqm, 5)
        assert ebqm.report().layers[3].reason is Reason.WARMUP
        assert not network.layers[3].skipped

    def test_layers_that_come_and_go(self) -> None:
        network = Network((5,))
        plant(network, {2, 4})
        ebqm = ek.EBQM(network, **QUICK)
        train(network, ebqm, 20)
        assert skipped(network) == {2, 4}
        del network.stages[0][1]
        network.stages.append(nn.ModuleList([ek.ELA(CHANNELS, head_dim=8) for _ in range(2)]))
        train(network, ebqm, 10)
        report = ebqm.report()
        assert [r.name for r in report.layers] == [
            *(f"stages.0.{i}" for i in range(4)),
            *(f"stages.1.{i}" for i in range(2)),
        ]
        assert [r.place for r in report.layers] == [0, 1, 2, 3, 0, 1]
        assert {1, 3} <= skipped(network)
        assert report.layers[5].reason is not Reason.NOT_OBSERVED
        assert len(report.layers[4].over_time) == len(report.decisions)
        ebqm.load_state_dict(ebqm.state_dict())

    def test_what_left_is_not_watched_any_more(self) -> None:
        network = Network((3,))
        ebqm, gone = ek.EBQM(network), network.layers[1]
        del network.stages[0][1]
        train(network, ebqm, 1)
        assert not gone.watched


class TestWrappers:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda layer: torch.compile(layer, backend="eager"),
            checkpoint_wrapper,
            nn.DataParallel,
            lambda layer: torch.compile(checkpoint_wrapper(layer), backend="eager"),
        ],
    )
    def test_names_are_those_of_the_plain_model(self, wrap: Callable[[nn.Module], Any]) -> None:
        plain = Network((3,))
        other = copy.deepcopy(plain)
        for i in range(3):
            other.stages[0][i] = wrap(other.stages[0][i])
        outer = AveragedModel(nn.DataParallel(other))
        state = ek.EBQM(outer).state_dict()
        assert state["layers"] == [f"stages.0.{i}" for i in range(3)]
        ek.EBQM(plain).load_state_dict(state)

    def test_a_state_with_names_of_wrappers(self) -> None:
        network = Network((2,))
        state = ek.EBQM(network).state_dict()
        for name in ("module.{}", "{}._orig_mod", "_orig_mod.module.{}"):
            names = [name.format(n) for n in state["layers"]]
            other = ek.EBQM(Network((2,)))
            other.load_state_dict({**state, "layers": names})

    def test_an_attention_that_is_wrapped_is_pruned(self) -> None:
        network, x = Network((4,), skip="retrieval"), batch()
        network.layers[1].attn = checkpoint_wrapper(network.layers[1].attn)
        network(x)
        network.layers[1].skipped = True
        network.eval()
        want = network(x)
        assert torch.equal(ek.prune(network)(x), want)
        names = {n for n, _ in network.layers[1].named_parameters()}
        assert names == {
            "attn._checkpoint_wrapped_module.Wk.weight",
            "attn._checkpoint_wrapped_module.Wv.weight",
        }


def test_a_step_that_the_optimizer_did_not_take() -> None:
    """An overflow under GradScaler: its divergences are not finite, and no reason to bring any layer back."""
    network = Network((9, 5))
    plant(network, {3, 6})
    ebqm = ek.EBQM(network, **QUICK)
    train(network, ebqm, 10)
    assert skipped(network) == {3, 6}
    for step in range(10):
        is_bad = step in (0, 6)
        network(torch.full_like(batch(), math.nan) if is_bad else batch()).sum().backward()
        ebqm.step(applied=not is_bad)
        assert skipped(network) == {3, 6}
    assert ebqm.steps == 20
    network(torch.full_like(batch(), math.nan)).sum().backward()  # its probes are not finite
    ebqm.step()
    for _ in range(4):
        network(batch()).sum().backward()
        ebqm.step()
    assert skipped(network) == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_other_default_dtypes(dtype: torch.dtype, compiled: bool) -> None:
    torch.set_default_dtype(dtype)
    try:
        network = Network((3,))
        ebqm = ek.EBQM(network, warmup=1, interval=1)
        call = torch.compile(network, backend="eager") if compiled else network
        for _ in range(2):
            call(batch()).sum().backward()
            ebqm.step()
        assert network.layers[1].decision.dtype == torch.float32
        assert seen(ebqm) == [False, True, True]
        ebqm.load_state_dict(ebqm.state_dict())
        assert ebqm.state_dict()["statistics"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch._dynamo.reset()


@pytest.mark.parametrize("around", [True, False])
def test_a_default_device_other_than_the_models(around: bool) -> None:
    network = Network((3,))
    ebqm = None if around else ek.EBQM(network, warmup=1, interval=1)
    x = batch()
    with torch.device("meta"):
        ebqm = ek.EBQM(network, warmup=1, interval=1) if ebqm is None else ebqm
        for _ in range(2):
            network(x).sum().backward()
            ebqm.step()
        state = copy.deepcopy(ebqm.state_dict())
        ebqm.load_state_dict(state)
        network.load_state_dict(network.state_dict())
    assert seen(ebqm) == [False, True, True]


class TestStaticGraph:
    def test_a_wrapped_model(self, tmp_path: Any) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
        )
        try:
            network = Network((3,))
            static = nn.parallel.DistributedDataParallel(network, static_graph=True)
            with pytest.raises(ValueError, match=r"^static_graph: got .*static_graph=False"):
                ek.EBQM(static)
            ek.EBQM(network)
            with pytest.raises(ValueError, match=r"^static_graph: got "):
                static(batch())
            assert observations.STATIC_GRAPH.startswith("static_graph")
            usual = nn.parallel.DistributedDataParallel(Network((3,)))
            ebqm = ek.EBQM(usual)
            for skip in (False, True, False):
                usual.module.layers[1].skipped = skip
                usual(batch()).sum().backward()
                ebqm.step()
        finally:
            torch.distributed.destroy_process_group()
