"""Converted networks whose retrievals can be skipped: EBQM, probes, pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.small_published import Network
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.modules.skipping import SkipMode

X = torch.randn(4, 3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> None:
    torch._dynamo.reset()


def both(drop: float = 0.0, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network in float64, and a copy converted to ELA."""
    torch.manual_seed(0)
    model = Network(drop=drop).double()
    ours = copy.deepcopy(model)
    ek.convert(ours, to="ela", strict=True, **options)
    return model, ours


def step(model: nn.Module, run: Any = None) -> list[Tensor | None]:
    """Output, gradients and running statistics of a training step; only of what the original has."""
    model.zero_grad()
    torch.manual_seed(1)
    out = (run or model)(X)
    out.square().sum().backward()
    buffers = [b.clone() for name, b in model.named_buffers() if "decision" not in name]
    return [out.detach(), *(p.grad for p in model.parameters()), *buffers]


def check(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def elas(model: nn.Module) -> list[ek.ELA]:
    return [m for m in model.modules() if isinstance(m, ek.ELA)]


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_with_nothing_skipped_the_results_are_the_same(drop: float, kernels: object) -> None:
    model, ours = both(drop)
    check(step(ours), step(model))
    assert len(elas(ours)) == 6
    assert {e.form for e in ek.explain(ours, X)} == {"block"}


class Without(nn.Module):
    """The original with the retrievals of some blocks left out, by hand."""

    def __init__(self, model: Any, skipped: set[int], skip: SkipMode) -> None:
        super().__init__()
        self.model, self.skipped, self.skip = model, skipped, skip

    def forward(self, x: Tensor) -> Tensor:
        k = v = retrieved = None
        for i, block in enumerate(self.model.blocks):
            assert not block.drop_path.training or isinstance(block.drop_path, nn.Identity)
            identity = x if block.down is None else block.down(x)
            x = block.relu(block.bn(block.conv(x)) + identity)
            if i not in self.skipped or self.skip != "layer":
                own, k, v = block.mrla(x, k, v)
            if i not in self.skipped:
                retrieved = own
            elif self.skip != "reuse":
                continue
            x = x + block.drop_path(block.relu(block.bn_mrla(retrieved)))
        return self.model.head(x.mean((2, 3)))


@pytest.mark.parametrize("skip", ["retrieval", "layer", "reuse"])
def test_skipped_retrievals(skip: SkipMode) -> None:
    model, ours = both(skip=skip)
    skipped = {1, 4, 5}
    for i in skipped:
        ours.blocks[i].ela.skipped = True
    check(step(ours), step(model, Without(model, skipped, skip)))


@pytest.mark.parametrize("skip", ["retrieval", "layer", "reuse"])
def test_the_first_layer_of_a_stage_may_be_skipped_by_hand(skip: SkipMode) -> None:
    _, ours = both(skip=skip)
    if skip != "layer":
        ours.blocks[0].ela.skipped = True
        ours(X).sum().backward()
        return
    ours.blocks[0].ela.skipped = ours.blocks[1].ela.skipped = True
    found: list[Any] = []
    ours.blocks[1].register_forward_hook(lambda m, args, out: found.append(out))
    ours(X).sum().backward()
    assert found[0][1].shape == (4, 0, 8)
    assert found[0][2].shape == (4, 0, 8, 4, 3)


def test_ebqm_watches_decides_and_probes() -> None:
    _, ours = both()
    own = ek.models.CifarResNet((1,), (8,), "basic", attention="ela", head_dim=4).double()
    assert type(ek.EBQM(own).report().layers[0].divergence) is float
    ebqm = ek.EBQM(ours, warmup=2, interval=1, probe_interval=1, low=0.9, high=0.95)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        ours(X).square().mean().backward()
        optimizer.step()
        ebqm.step()
    report = ebqm.report()
    assert [layer.name for layer in report.layers] == [f"blocks.{i}.ela" for i in range(6)]
    assert [layer.stage for layer in report.layers] == [0, 0, 0, 1, 1, 1]
    assert [layer.place for layer in report.layers] == [0, 1, 2, 0, 1, 2]
    seen = [layer.divergence for layer in report.layers]
    assert all(0 < x < 1 for i, x in enumerate(seen) if i % 3)
    assert any(layer.skipped for layer in report.layers)
    assert not report.layers[0].skipped
    assert not report.layers[3].skipped


@pytest.mark.parametrize("skip", ["retrieval", "layer", "reuse"])
def test_pruned(skip: SkipMode) -> None:
    _, ours = both(skip=skip)
    ours.eval()
    for i in (1, 2, 4):
        ours.blocks[i].ela.skipped = True
    want, before = ours(X), sum(p.numel() for p in ours.parameters())
    ek.prune(ours)
    assert torch.equal(ours(X), want)
    assert sum(p.numel() for p in ours.parameters()) < before
    names = set(ours.state_dict())
    assert ("blocks.1.bn_mrla.weight" in names) == (skip == "reuse")
    assert "blocks.1.mrla.mrla.Wv.weight" not in names  # nobody reads it: 2 is skipped too
    assert ("blocks.4.mrla.mrla.Wv.weight" in names) == (skip != "layer")  # 5 reads it
    fresh = both(skip=skip)[1].eval()
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(X), want)


def test_checkpoints_of_the_original_load_and_the_decisions_are_added() -> None:
    model, ours = both()
    assert ours.load_state_dict(model.state_dict()).missing_keys == []
    added = set(ours.state_dict()) - set(model.state_dict())
    assert added == {f"blocks.{i}.ela.{k}" for i in range(6) for k in ("decision", "_extra_state")}
    assert list(dict(ours.named_parameters())) == list(dict(model.named_parameters()))
    ours.blocks[1].ela.skipped = True
    other = both()[1]
    other.load_state_dict(ours.state_dict())
    assert [e.skipped for e in elas(other)] == [False, True, False, False, False, False]


def test_copied_undone_and_done_again() -> None:
    model, ours = both()
    ours.blocks[1].ela.skipped = True
    other = copy.deepcopy(ours)
    assert other.blocks[1].ela.skipped
    assert other.blocks[1].ela.norm is other.blocks[1].bn_mrla
    assert elas(ek.unconvert(other)) == []
    assert set(other.state_dict()) == set(model.state_dict())
    check(step(other), step(model))
    # From the other form, and once more.
    ek.convert(other)
    first = ek.convert(other, to="ela")
    other.blocks[1].ela.skipped = True
    assert ek.convert(other, to="ela") == first
    assert other.blocks[1].ela.skipped


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    """Decisions are data in a compiled graph, as for ELA itself."""
    _, ours = both()
    ours.train(training)
    compiled = copy.deepcopy(ours)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for skipped in (set(), {1, 5}, {4}):
        for i in range(6):
            ours.blocks[i].ela.skipped = compiled.blocks[i].ela.skipped = i in skipped
        torch.testing.assert_close(run(X), ours(X), rtol=1e-10, atol=1e-10)


def test_hooks_that_would_not_run_are_refused() -> None:
    _, ours = both()
    ours.blocks[1].mrla.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"got hooks on mrla"):
        ours(X)


def test_another_goal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^to: got 'mrla'; allowed are 'ela' and None"):
        ek.convert(Network(), to="mrla")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^skip: got 'all'"):
        ek.convert(Network(), to="ela", skip="all")  # type: ignore[arg-type]


def test_light_forms_and_layers_without_a_block_are_said_to_stay() -> None:
    report = ek.convert(Network(light=True), to="ela")
    assert not any("ELA" in what for what in report.converted.values())


def test_analysed() -> None:
    """A converted network is looked at as one of ours, before and after it can be skipped."""
    model, ours = both()
    ek.convert(model)
    for network, what in ((model, "mrla.mrla"), (ours, "ela")):
        found = ek.analyze(network, [X])
        assert [layer.name for layer in found.layers] == [f"blocks.{i}.{what}" for i in range(6)]
        assert "left out" not in str(found)
    plain, skippable = (ek.analyze(network, [X]).layers for network in (model, ours))
    for a, b in zip(plain, skippable, strict=True):
        assert a.weights == pytest.approx(b.weights)
        assert a.divergence == pytest.approx(b.divergence, nan_ok=True)


def test_the_other_goal_for_the_rest_of_a_model() -> None:
    """What can be skipped keeps its decision, light forms stay, and a refusal leaves all as it was."""
    model = nn.ModuleDict({"ela": Network(), "base": Network(), "light": Network(light=True)})
    ek.convert(model["ela"], to="ela")
    model["ela"].blocks[1].ela.skipped = True
    ek.convert(model)
    model["stranger"] = nn.Module()
    for name in ("Wq", "Wk", "Wv"):
        setattr(model["stranger"], name, nn.Identity())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="stranger"):
        ek.convert(model, to="ela", strict=True)
    assert [type(m) for m in model.modules()] == kinds
    del model["stranger"]
    ek.convert(model, to="ela", strict=True)
    assert len(elas(model["base"])) == len(elas(model["ela"])) == 6
    assert model["ela"].blocks[1].ela.skipped
    assert {e.form for e in ek.explain(model["light"], X.float())} == {"block"}


@pytest.mark.parametrize("skipped", [False, True])
def test_function_transforms(skipped: bool) -> None:
    """Ours runs there too, and gives what it gives outside; of samples one by one as well."""
    model, ours = both()
    ours.eval(), model.eval()
    elas(ours)[1].skipped = skipped
    of = ours if skipped else model
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, Tensor], x: Tensor, network: nn.Module) -> Tensor:
        found: Tensor = torch.func.functional_call(network, given, x).square().sum()
        return found

    got = torch.func.grad(loss)(parameters, X, ours)
    wanted = torch.autograd.grad(
        of(X).square().sum(),
        [of.get_parameter(name) for name in parameters],
        allow_unused=True,
    )
    for gradient, wish in zip(got.values(), wanted, strict=True):
        wish = torch.zeros_like(gradient) if wish is None else wish
        torch.testing.assert_close(gradient, wish, rtol=1e-10, atol=1e-11)
    one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    for name, gradients in one_by_one(parameters, X[:, None], ours).items():
        torch.testing.assert_close(gradients.sum(0), got[name], rtol=1e-10, atol=1e-10)
    _, tangent = torch.func.jvp(ours, (X,), (X,))
    _, along = torch.autograd.functional.jvp(model, X, X) if not skipped else (None, tangent)
    torch.testing.assert_close(tangent, along, rtol=1e-10, atol=1e-11)
