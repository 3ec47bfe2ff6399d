"""The ELA block: what it computes, what it leaves out when skipped, and what it tells EBQM."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, Operations, batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import ela_kernels as ek

MODES = ["retrieval", "layer", "reuse"]


def watch(network: Network) -> list[list[Tensor]]:
    """Have the layers keep their divergences, as EBQM does."""
    for layer in network.layers:
        layer.watched = True
    return [layer.observations for layer in network.layers]


def calls(module: nn.Module, count: dict[str, int], name: str) -> None:
    module.register_forward_hook(lambda *_: count.__setitem__(name, count.get(name, 0) + 1))


def test_formula() -> None:
    layers = [ek.ELA(32, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU) for _ in range(2)]
    x = torch.randn(3, 32, 5, 4)
    history, by_hand = ek.LayerHistory(), ek.LayerHistory()
    want = x
    for layer in layers:
        twin = copy.deepcopy(layer)
        x = layer(x, history)
        want = want + nn.functional.gelu(twin.norm(twin.attn(want, by_hand)))
        assert torch.equal(x, want)
    assert [layer.place for layer in layers] == [0, 1]
    assert history.depth == history.position == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_layer_passes_its_input_on(mode: str) -> None:
    network, x = Network((4,), skip=mode), batch()
    layer = network.layers[2]
    layer.skipped = True
    history = ek.LayerHistory()
    for i, module in enumerate(network.layers):
        before, depth = x, history.depth
        x = module(x, history)
        if i == 2:
            assert torch.equal(x, before) == (mode != "reuse")
            assert x.data_ptr() != before.data_ptr()  # whoever changes it in place changes no input
            assert history.depth == depth + (mode != "layer")
            if mode != "layer":
                k, v = module.attn.key_value(before)
                torch.testing.assert_close(history.keys[-1], k)  # sums in another order
                torch.testing.assert_close(history.values[-1], v)
    assert [m.place for m in network.layers] == [0, 1, 2, 3]
    assert history.position == 4
    assert history.weights is not None
    provides = mode != "layer"
    assert history.weights.shape[-1] == (4 if provides else 3)
    x.sum().backward()
    assert (layer.attn.Wv.weight.grad is not None) == provides
    assert (layer.attn.Wk.weight.grad is not None) == provides
    assert layer.attn.Wq.weight.grad is None
    assert (layer.norm.weight.grad is None) == (mode != "reuse")


@pytest.mark.parametrize("mode", ["retrieval", "layer"])
@pytest.mark.parametrize("training", [True, False])
def test_a_skipped_layer_costs_a_copy(mode: str, training: bool) -> None:
    layer, x = ek.ELA(32, skip=mode, drop_path=0.5), torch.randn(2, 32, 4, 4)
    layer.train(training)
    layer.watched = layer.skipped = True
    history = ek.LayerHistory()
    ek.LayerAttention(32)(x, history)
    with Operations() as ran:
        layer(x, history)
    views = {"unfold", "view", "_unsafe_view", "expand", "clone", "detach"}
    work = [name for name in ran.names if name not in views]
    if mode == "layer":
        assert work == ["_to_copy"]
    else:
        # the key (a pooled vector times a filter), the value and a copy, and nothing else
        assert work == ["sum", "div", "constant_pad_nd", "mv", "convolution", "_to_copy"]
    assert layer.observations == []


def test_calls_are_counted(kernels: object, ran: list[str]) -> None:
    network = Network((3,), skip="retrieval")
    layer, count = network.layers[1], {}
    for part in ("attn.Wq", "attn.Wk", "attn.Wv", "norm", "act", "drop_path"):
        calls(layer.get_submodule(part), count, part)
    network(batch())
    assert count == dict.fromkeys(("attn.Wq", "attn.Wk", "attn.Wv", "norm", "act", "drop_path"), 1)
    assert ran == ["cpp block", "cpp forward", "cpp block"]  # hooks: no module is passed by

    count.clear(), ran.clear()
    layer.skipped = True
    network(batch())
    assert count == {"attn.Wk": 1, "attn.Wv": 1}
    assert ran == ["cpp block"] * 2

    count.clear(), ran.clear()
    layer.skip = "layer"
    network(batch())
    assert count == {}
    assert ran == ["cpp block"] * 2


def test_no_read_of_a_value_on_the_host() -> None:
    network = Network((4,))
    watch(network)
    network.layers[2].skipped = network.layers[2].probe_next = True
    with Operations() as ran:
        network(batch())
    assert "convolution" in ran.names
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero"} & set(ran.names)


class TestObservations:
    def test_training_passes_are_kept_and_others_not(self) -> None:
        network = Network((3,))
        network(batch())
        assert not any(layer.observations for layer in network.layers)
        kept = watch(network)
        network(batch(5))
        assert [len(k) for k in kept] == [0, 1, 1]  # the first layer has no divergence
        assert all(k[0].shape == (5, 2) and not k[0].requires_grad for k in kept[1:])
        network.eval()
        network(batch())
        assert [len(k) for k in kept] == [0, 1, 1]

    def test_they_are_this_layers_divergence(self) -> None:
        network, x = Network((3,)), batch()
        kept, history = watch(network), ek.LayerHistory()
        for layer, observations in zip(network.layers, kept, strict=True):
            x = layer(x, history)
            if observations:
                assert torch.equal(observations[0], history.kl.detach())

    def test_recomputation_adds_none(self) -> None:
        network = Network((4,))
        network.wrap = partial(checkpoint, use_reentrant=False)
        network.layers[2].skipped = network.layers[2].probe_next = True
        kept = watch(network)
        network(batch()).sum().backward()
        assert [len(k) for k in kept] == [0, 1, 1, 1]

    def test_they_do_not_pile_up(self) -> None:
        network = Network((2,))
        kept = watch(network)
        for _ in range(100):
            network(batch(1))
        assert len(kept[1]) == 64

    @pytest.mark.parametrize("mode", MODES)
    def test_a_probe_sees_what_the_layer_would_have_had(
        self, mode: str, backend: str, ran: list[str]
    ) -> None:
        network, x = Network((4,), skip=mode), batch()
        kept = watch(network)
        network(x)
        want = kept[2][0]
        for observations in kept:
            observations.clear()
        ran.clear()
        layer = network.layers[2]
        layer.skipped = layer.probe_next = True
        out = network(x)
        # float32: the same scores in two kernels, or summed in two orders
        torch.testing.assert_close(kept[2][0], want, rtol=1e-4, atol=1e-5)
        assert not layer.probe_next
        assert ran.count("cpp weights") == (backend == "cpp")
        count = {"n": 0}
        calls(layer.attn.Wq, count, "n")
        out.sum().backward()
        network(x)
        assert count["n"] == 0  # only once
        assert len(kept[2]) == 1
        assert layer.attn.Wq.weight.grad is None

    def test_no_probe_in_eval_mode(self) -> None:
        network = Network((3,)).eval()
        kept = watch(network)
        network.layers[1].skipped = network.layers[1].probe_next = True
        network(batch())
        assert kept[1] == []
        assert network.layers[1].probe_next


def gradients(network: Network, x: Tensor, wrap: Callable[..., Tensor] | None = None) -> Any:
    twin = copy.deepcopy(network)
    if wrap is not None:
        twin.wrap = wrap
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # for drop path
    twin(x).square().sum().backward()
    return [x.grad, *(p.grad for p in twin.parameters())]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skipped", [(), (2,), (1, 3), (2, 3)])
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointing_changes_no_gradient(
    mode: str, skipped: tuple[int, ...], early_stop: bool, backend: str
) -> None:
    network, x = Network((4,), skip=mode, drop_path=0.3), batch(4)
    for i in skipped:
        network.layers[i].skipped = True
    plain = gradients(network, x)
    with set_checkpoint_early_stop(early_stop):  # otherwise the end of a layer is not recomputed
        recomputed = gradients(network, x, partial(checkpoint, use_reentrant=False))
    for got, want in zip(recomputed, plain, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)
    without = {"retrieval": 3, "layer": 5, "reuse": 1}[mode]
    assert sum(g is None for g in plain) == len(skipped) * without + (
        # a key and value that no later layer retrieves
        2 * sum(i == 3 or (i == 2 and 3 in skipped) for i in skipped) * (mode != "layer")
    )


@pytest.mark.parametrize("mode", MODES)
def test_several_layers_can_be_one_checkpoint(mode: str, backend: str) -> None:
    layers, x = Network((6,), skip=mode).layers, batch(3)
    layers[2].skipped = layers[4].skipped = True

    def segment(first: int, last: int, x: Tensor, history: ek.LayerHistory) -> Tensor:
        for layer in layers[first:last]:
            x = layer(x, history)
        return x

    found = []
    for recompute in (False, True):
        for layer in layers:
            layer.zero_grad()
        y, history = x.clone().requires_grad_(), ek.LayerHistory()
        out = y
        for ends in ((0, 3), (3, 6)):
            call = partial(checkpoint, segment, use_reentrant=False) if recompute else segment
            out = call(*ends, out, history)
        out.square().sum().backward()
        found.append([y.grad, *(p.grad for layer in layers for p in layer.parameters())])
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


def test_autocast(kernels: object) -> None:
    network, x = Network((3,)), batch()
    network.layers[1].skipped = network.layers[1].probe_next = True
    kept = watch(network)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x)
        out.float().square().mean().backward()
    assert kept[1][0].dtype == kept[2][0].dtype == torch.float32
    assert network.layers[2].attn.Wq.weight.grad.dtype == torch.float32
    # bfloat16 keeps 8 bits, and batch normalisation divides by a spread smaller than the values
    torch.testing.assert_close(out.float(), network(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_decision_and_are_not_watched(copied: Callable[[Any], Any]) -> None:
    network, x = Network((3,)).eval(), batch()
    network.layers[1].skipped = network.layers[1].probe_next = True
    kept = watch(network.train())
    network(x)
    twin = copied(network)
    assert [layer.skipped for layer in twin.layers] == [False, True, False]
    assert not any(layer.watched or layer.observations for layer in twin.layers)
    assert not any(layer.probe_next for layer in twin.layers)
    assert torch.equal(twin.eval()(x), network.eval()(x))
    assert len(kept[2]) == 1


class TestStateDict:
    def test_decisions_and_places_are_in_it(self) -> None:
        network, x = Network((3,)), batch()
        network(x)
        network.layers[1].skipped = True
        network.layers[1].skip = "layer"
        other = Network((3,))
        other.load_state_dict(network.state_dict())
        assert [layer.skipped for layer in other.layers] == [False, True, False]
        assert [layer.skip for layer in other.layers] == ["reuse", "layer", "reuse"]
        assert [layer.place for layer in other.layers] == [0, 1, 2]
        assert torch.equal(other.eval()(x), network.eval()(x))

    def test_it_loads_with_weights_only(self, tmp_path: Any) -> None:
        network = Network((2,))
        network.layers[1].skipped = True
        torch.save(network.state_dict(), tmp_path / "state.pt")
        other = Network((2,))
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert other.layers[1].skipped
        assert other.layers[1].place is None

    def test_a_checkpoint_without_decisions_loads(self) -> None:
        network, other = Network((2,)), Network((2,))
        state = {k: v for k, v in network.state_dict().items() if "_extra_state" not in k}
        other.layers[1].skipped = True
        other.load_state_dict(state)
        assert not other.layers[1].skipped
        missing = {k: v for k, v in state.items() if "Wq" not in k}
        with pytest.raises(RuntimeError, match="Wq"):
            other.load_state_dict(missing)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"skip": "both"}, ValueError, "skip"),
        ({"drop_path": 1.5}, ValueError, "drop_path"),
        ({"drop_path": float("nan")}, ValueError, "drop_path"),
        ({"drop_path": "0.1"}, TypeError, "drop_path"),
        ({"head_dim": 7}, ValueError, "head_dim"),
        ({"norm_layer": "batch"}, TypeError, "norm_layer"),
        ({"norm_layer": nn.BatchNorm2d(CHANNELS)}, TypeError, "norm_layer"),
        ({"norm_layer": lambda dim: dim}, TypeError, "norm_layer"),
        ({"act_layer": "relu"}, TypeError, "act_layer"),
        ({"act_layer": nn.ReLU()}, TypeError, "act_layer"),
        ({"act_layer": lambda: torch.relu}, TypeError, "act_layer"),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got .*allowed"):
        ek.ELA(CHANNELS, **arguments)


def test_zero_drop_path_and_zero_size_batch() -> None:
    network = Network((2,)).eval()
    assert network(batch(0)).shape == (0, CHANNELS, 5, 5)


class TestDropPath:
    def test_share_and_scale(self) -> None:
        layer, size = ek.ELA(CHANNELS, head_dim=8, drop_path=0.3).drop_path, 20_000
        out = layer(torch.ones(size, 2, 1, 1))
        assert torch.equal(out[:, 0], out[:, 1])  # a sample is dropped as a whole
        kept = out[:, 0].flatten() != 0
        # 4 standard deviations of a share of 20,000 samples: 4 * sqrt(0.3 * 0.7 / 20000) = 0.013
        assert abs(float(kept.float().mean()) - 0.7) < 0.013
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7))

    def test_seed(self) -> None:
        layer, x = ek.ELA(CHANNELS, head_dim=8, drop_path=0.5).drop_path, torch.ones(64, 2, 1, 1)
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
        assert not torch.equal(layer(x), first)

    def test_the_ends(self) -> None:
        x = torch.randn(4, 2, 3, 3)
        always = ek.ELA(CHANNELS, head_dim=8, drop_path=1.0).drop_path
        assert torch.equal(always(x), torch.zeros_like(x))
        assert always.eval()(x) is x
        assert ek.ELA(CHANNELS, head_dim=8).drop_path(x) is x
