"""A decision is a part of the model: whatever copies, averages, moves or loads its tensors takes it along."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, Operations, batch, skipped
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ela_kernels as ek
from ela_kernels.modules import skipping


def decided(mode: str = "retrieval", skip: set[int] = frozenset({1, 3})) -> Network:
    network = Network((5,), skip=mode)
    network(batch(4))  # running statistics
    for i in skip:
        network.layers[i].skipped = True
    return network.eval()


@torch.no_grad()
def by_lerp(old: nn.Module, new: nn.Module, decay: float) -> None:
    for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


@torch.no_grad()
def by_hand(old: nn.Module, new: nn.Module, decay: float) -> None:
    for a, b in zip(old.parameters(), new.parameters(), strict=True):
        a.data.mul_(decay).add_(b.data, alpha=1 - decay)
    for a, b in zip(old.buffers(), new.buffers(), strict=True):
        a.data.copy_(decay * a.data + (1 - decay) * b.data)  # past the version counter


class TestAverages:
    @pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
    @pytest.mark.parametrize("update", [by_lerp, by_hand])
    @pytest.mark.parametrize("decay", [0.0, 0.9])
    def test_a_moving_average_follows(
        self, mode: str, update: Callable[..., None], decay: float
    ) -> None:
        average, network, x = decided(skip={2}), decided(mode), batch()
        for _ in range(1 if decay == 0 else 150):
            update(average, network, decay)
        assert skipped(average) == {1, 3}
        assert {layer.skip for layer in average.layers} == {mode}
        # 0.9**150 of what it was: rounding
        torch.testing.assert_close(average(x), network(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("buffers", [True, False])
    def test_averaged_model(self, buffers: bool) -> None:
        network = decided(skip=set())
        average = AveragedModel(
            network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers
        )
        for skip, updates in (({1, 4}, 3), ({1}, 3), (set(), 3)):
            for i, layer in enumerate(network.layers):
                layer.skipped = i in skip
            for _ in range(updates):
                average.update_parameters(network)
            assert skipped(average.module) == skip

    def test_one_between_two_decisions_is_kept_between_them(self) -> None:
        network = decided(skip=set())
        layer = network.layers[1]
        layer.decision[0] = 0.3
        assert not layer.skipped
        state = {k: v.clone() for k, v in network.state_dict().items()}
        for moved in (
            network.to(torch.float64),
            network.half(),
            network.float(),
            copy.deepcopy(network),
        ):
            assert moved.layers[1].decision.dtype == torch.float32
            assert float(moved.layers[1].decision[0]) == pytest.approx(0.3)
        other = decided(skip=set())
        other.load_state_dict(state)
        assert float(other.layers[1].decision[0]) == pytest.approx(0.3)
        other.layers[1].decision.mul_(2)
        assert other.layers[1].skipped

    def test_averaged_checkpoints(self) -> None:
        states = [decided(skip=s).state_dict() for s in ({1, 3}, {1}, {1, 2})]
        mean = {
            k: torch.stack([s[k].float() for s in states]).mean(0).to(v.dtype)
            if "_extra_state" not in k
            else v
            for k, v in states[0].items()
        }
        other = decided(skip=set())
        other.load_state_dict(mean)
        assert skipped(other) == {1}


class TestMoves:
    def test_memory_that_was_never_written(self) -> None:
        with torch.device("meta"):
            network = Network((3,))
        assert skipped(network) == set()
        network.to_empty(device="cpu")
        assert skipped(network) == set()
        network = decided()
        network.to_empty(device="cpu")
        assert skipped(network) == {1, 3}
        network.to("meta").to_empty(device="cpu")
        assert skipped(network) == {1, 3}
        for layer in network.layers:
            layer.reset_parameters()
        assert skipped(network) == set()

    def test_of_a_model_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            network = Network((3,)).eval()
        network.layers[1].skipped = True
        network.to("cpu")
        network.float()
        assert skipped(network) == {1}
        with torch.inference_mode():
            network.to(torch.float64)
        network.layers[2].skipped = True
        network.to("cpu")
        assert skipped(network) == {1, 2}

    def test_meta_modules_show_and_save_themselves(self) -> None:
        with torch.device("meta"):
            network = Network((2,))
            assert "skipped=False" in repr(network)
            state = network.state_dict()
        assert state["stages.0.0._extra_state"].device.type == "cpu"
        assert network(batch().to("meta")).shape == (2, CHANNELS, 5, 5)

    def test_shared_memory(self) -> None:
        network = decided().share_memory()
        assert skipped(network) == {1, 3}
        assert all(layer.decision.is_shared() for layer in network.layers)

    def test_functional_call_takes_the_decisions_it_is_given(self) -> None:
        network, other, x = decided(skip=set()), decided(), batch()
        tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        got = torch.func.functional_call(network, tensors, (x,))
        assert torch.equal(got, other(x))
        assert skipped(network) == set()

    def test_an_ensemble_of_different_decisions(self) -> None:
        """`vmap` over models: each has its own decisions, which no Python code can look at."""
        networks, x = [decided(skip=s) for s in (set(), {1, 3}, {4})], batch()
        parameters, buffers = torch.func.stack_module_state(networks)
        base = copy.deepcopy(networks[0])

        def one(parameters: Any, buffers: Any) -> Any:
            return torch.func.functional_call(base, (parameters, buffers), (x,))

        got = torch.vmap(one)(parameters, buffers)
        for out, network in zip(got, networks, strict=True):
            with ek.use_backend("eager"):
                # float32: sums in another order
                torch.testing.assert_close(out, network(x), rtol=1e-4, atol=1e-5)

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            network = decided()
            network(batch())
            network.layers[2].skipped = True
        assert skipped(network) == {1, 2, 3}
        network.layers[2].skipped = False
        assert skipped(network) == {1, 3}


class TestOnAnAccelerator:
    """Where reading a decision waits for the device; here the host plays one."""

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(skipping, "waits_for_device", lambda _: True)

    @staticmethod
    def reads(network: Network) -> int:
        with Operations() as ran, torch.no_grad():
            network(batch())
        return ran.names.count("stack")

    def test_all_that_changed_are_read_at_once(self) -> None:
        network = decided()
        skipped(network)
        assert self.reads(network) == 0
        with torch.no_grad():
            for layer in network.layers:  # as a broadcast writes them
                layer.decision.copy_(torch.tensor([1.0, 0.0]))
        assert self.reads(network) == 1
        assert skipped(network) == {0, 1, 2, 3, 4}
        assert self.reads(network) == 0

    def test_what_is_set_need_not_be_read(self) -> None:
        network = decided()
        skipped(network)
        for layer in network.layers:
            layer.skipped, layer.skip = not layer.skipped, "layer"
        assert self.reads(network) == 0
        assert skipped(network) == {0, 2, 4}

    def test_what_the_version_does_not_show_is_read_after_eval(self) -> None:
        network = decided()
        skipped(network)
        for layer in network.layers:
            layer.decision.data.zero_()
        assert skipped(network.eval()) == set()

    def test_moved_loaded_and_copied(self) -> None:
        network = decided()
        assert skipped(network.to(torch.float64)) == {1, 3}
        assert skipped(copy.deepcopy(network)) == {1, 3}
        other = decided(skip=set())
        other.load_state_dict(network.state_dict())
        assert skipped(other) == {1, 3}


class TestStateDicts:
    def test_of_a_version_without_the_buffer(self) -> None:
        network = decided("layer")
        state = {k: v for k, v in network.state_dict().items() if "decision" not in k}
        for key in state:
            if "_extra_state" in key:
                state[key] = state[key][:4]
        other = Network((5,))
        other.load_state_dict(state)
        assert skipped(other) == {1, 3}
        assert {layer.skip for layer in other.layers} == {"layer"}
        assert [layer.place for layer in other.layers] == [0, 1, 2, 3, 4]
        assert torch.equal(other.eval()(x := batch()), network(x))

    def test_assigned(self) -> None:
        other = Network((5,))
        other.load_state_dict(decided().state_dict(), assign=True)
        assert skipped(other) == {1, 3}

    def test_of_other_parts_of_the_model_alone(self) -> None:
        network = decided()
        network.head = nn.Linear(2, 2)
        network.load_state_dict({"head.bias": torch.ones(2)}, strict=False)
        assert skipped(network) == {1, 3}

    def test_a_pickle_of_a_layer_that_had_attributes(self) -> None:
        layer = ek.ELA(CHANNELS, skip="layer")
        state = layer.__getstate__()
        for name in ("_last", "_last_mode", "_read_at", "_had_readers", "is_first"):
            del state[name]
        state["_buffers"] = {}
        state.update(skipped=True, skip="layer", observations=None)
        old = ek.ELA.__new__(ek.ELA)
        old.__setstate__(state)
        assert old.skipped
        assert old.skip == "layer"
        x = batch()
        assert torch.equal(old(x, ek.LayerHistory()), x)

    def test_a_whole_model_saved(self) -> None:
        file = io.BytesIO()
        torch.save(network := decided(), file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
        assert skipped(other) == {1, 3}
        assert skipped(pickle.loads(pickle.dumps(network))) == {1, 3}


class TestASkippedLayerIsAModule:
    @pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
    @pytest.mark.parametrize("grad", [True, False])
    def test_its_output_may_be_changed_in_place(self, mode: str, grad: bool, backend: str) -> None:
        network, x = decided(mode).train(grad), batch().requires_grad_(grad)
        results = []
        for change in (torch.relu, torch.relu_):
            history, y = ek.LayerHistory(), x
            with torch.set_grad_enabled(grad):
                for layer in network.layers:
                    before = y.clone()
                    out = layer(y, history)
                    z = change(out)
                    assert torch.equal(y, before)
                    y = z
            results.append(y)
        assert torch.equal(*results)
        if grad:
            first, second = (torch.autograd.grad(y.square().sum(), x)[0] for y in results)
            assert torch.equal(first, second)

    @pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_its_dtype_is_that_in_use(self, mode: str, dtype: torch.dtype) -> None:
        layer, x = decided(mode).layers[1], batch().to(dtype)
        found = []
        with torch.autocast("cpu", torch.bfloat16):
            for skip in (False, True):
                layer.skipped = skip
                found.append(layer(x, ek.LayerHistory()))
        assert found[0].dtype == found[1].dtype

    @pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
    def test_a_caller_that_changes_nothing_saves_the_copy(self, mode: str) -> None:
        layer, x = decided(mode).layers[1], batch().requires_grad_()
        out = layer(x, ek.LayerHistory(), copy=False)
        assert out.data_ptr() == x.data_ptr()
        assert out is not x  # hooks on it are not on x
        assert out.grad_fn is not None
        layer.skipped = False
        assert layer(x, ek.LayerHistory(), copy=False).data_ptr() != x.data_ptr()

    def test_its_memory_format_is_that_of_the_input(self) -> None:
        x = batch().to(memory_format=torch.channels_last)
        out = decided().layers[1](x, ek.LayerHistory())
        assert out.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
    def test_hooks_on_its_parts_run(self, mode: str) -> None:
        layer, ran = decided(mode).layers[1].train(), []
        layer.attn.register_forward_hook(lambda *_: ran.append("attn"))
        layer.attn.Wk.register_forward_pre_hook(lambda *_: ran.append("Wk"))
        layer.watched = True
        history = ek.LayerHistory()
        ek.LayerAttention(CHANNELS, head_dim=8)(batch(), history)
        layer(batch(), history)
        assert ran == ([] if mode == "layer" else ["Wk", "attn"])
        ran.clear()
        layer.probe_next = True
        layer(batch(), history)
        assert ran == (["Wk", "attn"] if mode == "layer" else ["Wk", "Wk", "attn"])
        assert len(layer.observations) == 1
