"""AttentionResidual: what it computes, and a small language model that trains with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.backends.extension import extension

ROOT = Path(ek.__file__).resolve().parents[1]
needs_kernels = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


class Plain(nn.Module):
    """The same in PyTorch's own operations, with the same parameters."""

    def __init__(self, of: ek.AttentionResidual) -> None:
        super().__init__()
        self.query, self.norm_weight, self.eps = of.query, of.norm_weight, of.eps

    def forward(self, values: list[Tensor]) -> Tensor:
        v = torch.stack(values, 1)
        s = F.rms_norm(v, v.shape[-1:], self.norm_weight, self.eps) @ self.query
        return (s.softmax(1).unsqueeze(-1) * v).sum(1)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class LanguageModel(nn.Module):
    """Characters to characters: the input of every sublayer, and of the head, is retrieved from all before it."""

    def __init__(self, vocabulary: int, dim: int = 48, blocks: int = 2, length: int = 48) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        layers: list[nn.Module] = []
        for _ in range(blocks):
            mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))
            layers += [
                nn.Sequential(nn.RMSNorm(dim), SelfAttention(dim, 4)),
                nn.Sequential(nn.RMSNorm(dim), mlp),
            ]
        self.layers = nn.ModuleList(layers)
        self.mixes = nn.ModuleList(ek.AttentionResidual(dim) for _ in range(len(layers) + 1))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, ids: Tensor, form: str) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        history, values = ek.PositionHistory(), [x]
        history.append(x)
        for i, mix in enumerate(self.mixes):
            if form == "plain":
                x = Plain(mix)(values)
            else:
                x = mix(history if form == "history" else values)
            if i < len(self.layers):
                x = self.layers[i](x)
                values.append(x)
                history.append(x)
        return self.head(x)


def text() -> tuple[Tensor, int]:
    """The package's own page as numbers, and how many kinds of characters it has."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    kinds = sorted(set(page))
    index = {c: i for i, c in enumerate(kinds)}
    return torch.tensor([index[c] for c in page]), len(kinds)


def train(
    model: LanguageModel, form: str, steps: int, optimizer: torch.optim.Optimizer
) -> list[float]:
    ids, kinds = text()
    length, losses = model.place.num_embeddings, []
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length - 1, (16,), generator=random)
        batch = torch.stack([ids[s : s + length + 1] for s in starts.tolist()])
        logits = model(batch[:, :-1], form)
        loss = F.cross_entropy(logits.reshape(-1, kinds), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(text()[1])


@needs_kernels
@pytest.mark.parametrize("form", ["history", "list"])
def test_twenty_steps_are_those_of_plain_pytorch(model, form):
    """In float64 to rounding; so what differs in float32 is rounding too."""
    ours, plain = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    losses = [
        train(m, f, 20, torch.optim.SGD(m.parameters(), 0.3))
        for m, f in ((ours, form), (plain, "plain"))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    # The queries have left zero, so that the weights are learned.
    assert all(m.query.abs().max() > 1e-4 for m in ours.mixes[1:])


@needs_kernels
def test_twenty_steps_in_float32(model):
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    losses = [
        train(m, f, 20, torch.optim.SGD(m.parameters(), 0.3))
        for m, f in ((ours, "history"), (plain, "plain"))
    ]
    # Each step adds an ulp or so of the loss's gradient; twenty of them leave four digits and more.
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-5, atol=0)


@needs_kernels
def test_a_language_model_learns(model):
    ids, kinds = text()
    share = torch.bincount(ids, minlength=kinds).double() / len(ids)
    # What a model reaches that knows how often each character comes, and nothing of what stands before it.
    floor = -(share * share.log()).sum().item()
    learner = copy.deepcopy(model)
    losses = train(learner, "history", 150, torch.optim.Adam(learner.parameters(), 3e-3))
    assert losses[0] > floor
    assert sum(losses[-10:]) / 10 < floor - 0.5


def test_it_starts_with_equal_weights_and_holds_what_it_found():
    mix, history = ek.AttentionResidual(6), ek.PositionHistory()
    assert torch.equal(mix.query, torch.zeros(6))
    values = [torch.randn(2, 5, 6) for _ in range(3)]
    for value in values:
        history.append(value)
    torch.testing.assert_close(mix(history), torch.stack(values).mean(0))
    torch.testing.assert_close(history.weights, torch.full((2, 3, 5), 1 / 3))
    assert history.kl is None
    history.append(torch.randn(2, 5, 6))
    mix(history)
    torch.testing.assert_close(history.kl, torch.full((2, 5), 4 / 3).log())
    torch.testing.assert_close(history.kl_mean, torch.full((2,), 4 / 3).log())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps(memory_format):
    mix = ek.AttentionResidual(6, eps=1e-3, scale=0.5)
    nn.init.normal_(mix.query)
    values = [torch.randn(2, 6, 3, 4).to(memory_format=memory_format) for _ in range(3)]
    tokens = [v.flatten(2).transpose(1, 2) for v in values]
    torch.testing.assert_close(mix(values).flatten(2).transpose(1, 2), mix(tokens))
    assert mix(values).is_contiguous(memory_format=memory_format)


def test_state_and_words():
    mix = ek.AttentionResidual(6, device="meta", dtype=torch.float64)
    assert {n: (p.shape, p.dtype) for n, p in mix.named_parameters()} == {
        "query": ((6,), torch.float64),
        "norm_weight": ((6,), torch.float64),
    }
    assert str(ek.AttentionResidual(6, scale=0.5)) == "AttentionResidual(6, eps=1e-06, scale=0.5)"
    copied = copy.deepcopy(ek.AttentionResidual(6))
    copied.load_state_dict(ek.AttentionResidual(6).state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dim": 0}, ValueError, "dim: got 0; allowed"),
        ({"dim": 6.0}, TypeError, "dim: got float; allowed"),
        ({"dim": 6, "eps": -1}, ValueError, "eps: got -1; allowed"),
        ({"dim": 6, "scale": "1"}, TypeError, "scale: got str; allowed"),
    ],
)
def test_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        ek.AttentionResidual(**arguments)


@needs_kernels
def test_explain_names_the_module():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = ek.AttentionResidual(6)

        def forward(self, x: Tensor) -> Tensor:
            history = ek.PositionHistory()
            history.append(x)
            history.append(self.mix(history))
            return self.mix([x, x])

    with ek.use_backend("auto"):
        found = ek.explain(Network(), torch.randn(2, 5, 6))
    assert [(e.name, e.layer, e.form, e.backend) for e in found] == [
        ("mix", "AttentionResidual", "op", "cpp"),
        ("mix", "AttentionResidual", "push", "cpp"),
    ]


def test_compiled():
    torch.compiler.reset()
    mix = ek.AttentionResidual(6)
    nn.init.normal_(mix.query)

    def run(x: Tensor) -> Tensor:
        history = ek.PositionHistory()
        for i in range(3):
            history.append(x + i)
        return mix(history) + history.weights[:, 0].unsqueeze(-1)

    x = torch.randn(2, 5, 6, requires_grad=True)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, run(x))
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), x), torch.autograd.grad(run(x).sin().sum(), x)
    )
    torch.compiler.reset()
