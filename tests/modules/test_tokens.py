"""Tokens `[B, N, C]`: the same numbers as on the map that they are, and the prefix passes by."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ela_models import Operations
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.layout import readable
from ela_kernels.modules.tokens import as_map

C, HEAD = 16, 8
# Prefix, grid that is given, height and width.
LAYOUTS = [
    (0, None, 4, 4),
    (1, None, 3, 3),
    (0, (3, 5), 3, 5),
    (5, (4, 2), 4, 2),
    (2, (1, 6), 1, 6),
    (1, (1, 1), 1, 1),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


class Stage(nn.Module):
    """Layers of one kind, on tokens or, with `maps`, on the map that they are, which is cut out by hand."""

    def __init__(self, kind: str, depth: int, prefix: int, grid: Any, **options: Any) -> None:
        super().__init__()
        self.kind, self.prefix, self.maps = kind, prefix, None
        make: Callable[..., nn.Module] = {
            "ela": ek.ELA,
            "base": ek.LayerAttention,
            "light": ek.LightLayerAttention,
        }[kind]
        self.layers = nn.ModuleList(
            make(C, HEAD, prefix_tokens=prefix, grid=grid, **options) for _ in range(depth)
        )
        self.wrap: Callable[..., Tensor] = lambda layer, *args: layer(*args)

    def forward(self, x: Tensor) -> Tensor:
        if self.maps is None:
            return self._stage(x)
        height, width = self.maps
        first, x = x[:, : self.prefix], x[:, self.prefix :]
        x = x.reshape(-1, height, width, C).permute(0, 3, 1, 2)
        return torch.cat((first, self._stage(x).flatten(2).transpose(1, 2)), 1)

    def _stage(self, x: Tensor) -> Tensor:
        history, before = ek.LayerHistory(), x
        for layer in self.layers:
            if self.kind == "ela":
                x = self.wrap(layer, x, history)
            elif self.kind == "base":
                x = x + self.wrap(layer, x, history)
            else:
                before = self.wrap(layer, x, before)
                # As published, where the output holds the prefix of x: here it is to stay.
                add = before.clone()
                if before.dim() == 3:
                    add[:, : self.prefix] = 0
                x = x + add
        return x


def both(kind: str, layout: Any, depth: int = 3, **options: Any) -> tuple[Stage, Stage, Tensor]:
    """A stage on tokens, the same on maps, and tokens."""
    prefix, grid, height, width = layout
    ours = Stage(kind, depth, prefix, grid, **options)
    theirs = copy.deepcopy(ours)
    theirs.maps = (height, width)
    return ours, theirs, torch.rand(3, prefix + height * width, C) + 0.5


def step(stage: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    x = x.clone().requires_grad_()
    out = stage(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in stage.parameters()]
    assert x.grad is not None
    return [out.detach(), x.grad, *grads, *stage.buffers()]


def check(got: list[Tensor], want: list[Tensor], exact: int | None = None) -> None:
    """Bit by bit the first `exact` of them, or all."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if exact is None or i < exact or not a.is_floating_point():
            assert torch.equal(a, b), (a - b).abs().max()
        else:
            # Sums of the same numbers in another order.
            rounding = 100 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * a.abs().max().item())


def exactly(kind: str, layout: Any, backend: str) -> int | None:
    """How many of a step's numbers are the same bit by bit: all, or the output alone.

    PyTorch adds gradients of an input up in the order in which they come, which a view before the layer changes where
    the input is used beside it; and a map of one position lies planar and interleaved at once, which changes its sums.
    """
    is_sum_ours = kind == "ela" or (kind == "base" and backend == "cpp")
    return None if is_sum_ours and layout[2:] != (1, 1) else 1


@layouts
@pytest.mark.parametrize("kind", ["ela", "base", "light"])
def test_numbers_and_gradients_are_those_of_maps(kind: str, layout: Any, backend: str) -> None:
    ours, theirs, x = both(kind, layout)
    check(step(ours, x), step(theirs, x), exactly(kind, layout, backend))
    with torch.inference_mode():
        check([ours.eval()(x)], [theirs.eval()(x)])


@layouts
@pytest.mark.parametrize("mode", ["reuse", "retrieval", "layer"])
def test_skipped_layers(mode: str, layout: Any, backend: str) -> None:
    ours, theirs, x = both("ela", layout, depth=5, skip=mode)
    for stage in (ours, theirs):
        for i in (1, 2, 4):
            stage.layers[i].skipped = True
    for _ in range(2):  # in the second pass the layers know each other, and pairs may wait
        ours.zero_grad(), theirs.zero_grad()
        check(step(ours, x), step(theirs, x), exactly("ela", layout, backend))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kind", ["ela", "base", "light"])
def test_one_call_of_the_kernels_and_no_copy_of_the_input(
    kind: str, prefix: int, kernels: object
) -> None:
    ours, _, x = both(kind, (prefix, (3, 5), 3, 5))
    assert {e.form for e in ek.explain(ours, x)} == {"block" if kind == "ela" else "layer"}
    _, patches = ours.layers[0]._split(x, C)
    assert patches.data_ptr() == x[:, prefix:].data_ptr()
    assert readable(patches) is patches


@pytest.mark.parametrize(("prefix", "copies"), [(0, 0), (1, 1)])
def test_what_is_copied(prefix: int, copies: int, kernels: object) -> None:
    """Beside the operations of the map: a view each way, and with a prefix one copy of the output."""
    ours, theirs, x = both("ela", (prefix, (3, 5), 3, 5), depth=1)
    patches = as_map(x[:, prefix:], (3, 5))
    names = []
    for layer, given in ((ours.layers[0], x), (theirs.layers[0], patches)):
        with Operations() as seen:
            layer.eval()(given, ek.LayerHistory())
        names.append(seen.names)
    views = {"view", "permute", "transpose", "split_with_sizes", "_unsafe_view", "alias"}
    more = [name for name in names[0] if name not in views]
    for name in names[1]:
        if name in more:
            more.remove(name)
    assert more == ["cat"] * copies
    out = ours.layers[0](x, ek.LayerHistory())
    assert out.is_contiguous()


def test_the_retrieval_has_zeros_before_the_patches(backend: str) -> None:
    layer = ek.LayerAttention(C, HEAD, prefix_tokens=2)
    x = torch.randn(3, 11, C)
    out = layer(x, ek.LayerHistory())
    assert out.shape == x.shape
    assert not out[:, :2].any()
    assert out[:, 2:].all()
    added = layer(x, ek.LayerHistory(), residual=True)
    assert torch.equal(added[:, :2], x[:, :2])
    torch.testing.assert_close(added, x + out)


def test_the_light_form_holds_the_prefix_as_it_came(backend: str) -> None:
    layer = ek.LightLayerAttention(C, HEAD, prefix_tokens=2)
    x, before = torch.randn(3, 11, C), torch.randn(3, 11, C)
    out = layer(x, before)
    assert torch.equal(out[:, :2], x[:, :2])
    with pytest.raises(ValueError, match=r"^prev_out: got shape \[3, 10, 16\]; allowed is that of"):
        layer(x, before[:, :10])


def test_layers_on_tokens_and_on_maps_share_a_history(backend: str) -> None:
    a, b = ek.ELA(C, HEAD, prefix_tokens=1), ek.ELA(C, HEAD)
    x = torch.randn(3, 10, C)
    patches = as_map(x[:, 1:])
    mixed, maps = ek.LayerHistory(), ek.LayerHistory()
    got = b(as_map(a(x, mixed)[:, 1:]), mixed)
    want = b(b.__class__.forward(a, patches, maps), maps)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("mode", ["retrieval", "layer"])
def test_a_skipped_layer_copies_only_where_it_is_asked_to(mode: str, prefix: int) -> None:
    layer = ek.ELA(C, HEAD, skip=mode, prefix_tokens=prefix)
    layer.skipped = True
    x = torch.randn(3, prefix + 9, C)
    for copies in (False, True):
        out = layer(x, ek.LayerHistory(), copy=copies)
        assert torch.equal(out, x)
        assert (out.data_ptr() != x.data_ptr()) is copies
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf, ek.LayerHistory(), copy=False).sum(), leaf)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("reentrant_free", [True, False])
def test_checkpointing(prefix: int, reentrant_free: bool, backend: str) -> None:
    ours, theirs, x = both("ela", (prefix, None, 3, 3))
    ours.layers[1].skipped = theirs.layers[1].skipped = True
    for stage in (ours, theirs):
        for layer in stage.layers:
            layer.norm.momentum = 0.0  # a norm inside a checkpoint counts twice
    ours.wrap = lambda layer, *args: checkpoint(layer, *args, use_reentrant=not reentrant_free)
    if not reentrant_free:
        with pytest.raises(RuntimeError, match="reentrant"):
            step(ours, x)
        return
    got, want = step(ours, x), step(theirs, x)
    number = len(list(ours.parameters())) + 2
    check(got[:number], want[:number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", ["ela", "base", "light"])
def test_autocast(kind: str, prefix: int, dtype: torch.dtype, backend: str) -> None:
    ours, theirs, x = both(kind, (prefix, None, 3, 3))
    with torch.autocast("cpu", dtype):
        got, want = step(ours, x), step(theirs, x)
    exact = exactly(kind, (prefix, None, 3, 3), backend)
    check(got[:1], want[:1], exact)
    for a, b in zip(got[1:], want[1:], strict=True):
        if exact is None:
            assert torch.equal(a, b)
        else:  # gradients are added up in half precision
            close = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=close, atol=close * b.abs().max().item())


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("kind", ["ela", "base", "light"])
def test_one_compiled_graph(kind: str, prefix: int, kernels: object) -> None:
    torch._dynamo.reset()
    ours, _, x = both(kind, (prefix, None, 4, 4))
    twin = copy.deepcopy(ours)
    if kind == "ela":
        ours.layers[1].skipped = twin.layers[1].skipped = True
    counter = CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for got, want in zip(step(compiled, x), step(twin, x), strict=True):
        # float32: PyTorch's own pieces, in another order of sums
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("grid", [None, (4, 4)])
def test_batches_of_any_size_are_one_graph(grid: Any, kernels: object) -> None:
    torch._dynamo.reset()
    ours = both("ela", (1, grid, 4, 4))[0]
    ours.eval()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    for size in (2, 3, 5):
        given = torch.randn(size, 17, C)
        torch.testing.assert_close(compiled(given), ours(given), rtol=1e-4, atol=1e-5)


def test_export_and_trace() -> None:
    ours, _, x = both("ela", (1, None, 4, 4))
    ours.eval()
    want = ours(x)
    exported = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(exported(x), want, rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(ours, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1])
def test_what_ebqm_decides_is_what_it_decides_on_maps(prefix: int, backend: str) -> None:
    ours, theirs, _ = both("ela", (prefix, None, 4, 4), depth=6)
    reports = []
    for stage in (ours, theirs):
        torch.manual_seed(1)
        ebqm = ek.EBQM(stage, warmup=2, interval=2, probe_interval=1, low=0.9, high=0.95)
        for _ in range(8):
            stage.zero_grad()
            stage(torch.rand(2, prefix + 16, C) + 0.5).sum().backward()
            ebqm.step()
        reports.append(ebqm.report().layers)
    decided = [[layer.skipped for layer in stage.layers] for stage in (ours, theirs)]
    assert decided[0] == decided[1]
    assert any(decided[0])
    assert [row.divergence for row in reports[0]] == [row.divergence for row in reports[1]]
    x = torch.rand(2, prefix + 16, C)
    want = ours.eval()(x)
    ek.prune(ours)
    assert any(layer.pruned for layer in ours.layers)
    torch.testing.assert_close(ours(x), want)


def test_tokens_that_lie_as_a_map_does(backend: str) -> None:
    """As an embedding of patches leaves them: `conv(images).flatten(2).transpose(1, 2)`, which is no copy."""
    layer = ek.ELA(C, HEAD)
    maps = torch.randn(3, C, 4, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    got = layer(tokens, ek.LayerHistory())
    want = layer(maps, ek.LayerHistory()).flatten(2).transpose(1, 2)
    assert torch.equal(got, want)


def test_no_samples(backend: str) -> None:
    layer = ek.ELA(C, HEAD, prefix_tokens=1).eval()
    assert layer(torch.randn(0, 10, C), ek.LayerHistory()).shape == (0, 10, C)


def test_hooks_see_what_they_saw() -> None:
    layer = ek.ELA(C, HEAD, prefix_tokens=1)
    seen: list[int] = []
    for module in (layer, layer.attn, layer.norm):
        module.register_forward_hook(lambda m, args, out: seen.append(out.dim()))
    layer(torch.randn(2, 10, C), ek.LayerHistory())
    assert seen == [4, 4, 3]  # tokens are seen from outside alone


def test_copies_and_pickles_know_the_layout() -> None:
    layer = ek.ELA(C, HEAD, prefix_tokens=1, grid=(2, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other.prefix_tokens, other.grid) == (1, (2, 3))
        assert "prefix_tokens=1, grid=(2, 3)" in repr(other)
    old = copy.deepcopy(layer)
    del old.prefix_tokens, old.grid
    assert old(torch.randn(2, C, 3, 2), ek.LayerHistory()).shape == (2, C, 3, 2)
    assert "grid" not in repr(ek.ELA(C))


MAKERS = [ek.ELA, ek.LayerAttention, ek.LightLayerAttention]
REFUSED = {
    "no square": ({}, (2, 12, C), r"12 tokens after prefix_tokens=0.*grid=\(height, width\)"),
    "a class token": ({}, (2, 17, C), r"prefix_tokens=1: 17 is 4 \* 4 \+ 1, as with a class token"),
    "registers": ({}, (2, 21, C), r"prefix_tokens=5: 21 is 4 \* 4 \+ 5"),
    "one more": ({"prefix_tokens": 1}, (2, 18, C), r"prefix_tokens=2: 17 is 4 \* 4 \+ 1"),
    "no tokens": ({}, (2, 0, C), r"at least one patch"),
    "a prefix alone": ({"prefix_tokens": 1}, (2, 1, C), r"at least one patch"),
    "fewer": ({"prefix_tokens": 3}, (2, 2, C), r"2 tokens with prefix_tokens=3"),
    "channels": ({}, (2, 16, 9), r"allowed is \[B, 16, H, W\] or \[B, N, 16\] \(tokens\)"),
    "channels first": ({}, (2, C, 25), r"allowed is \[B, 16, H, W\] or \[B, N, 16\] \(tokens\)"),
    "another grid": ({"grid": (3, 4)}, (2, 13, C), r"grid=\(3, 4\) are 12.*prefix_tokens=1"),
    "a grid too large": ({"grid": (3, 4)}, (2, 11, C), r"grid=\(3, 4\) are 12"),
    "too few dimensions": ({}, (2, C), r"allowed is \[B, 16, H, W\] or \[B, N, 16\]"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", MAKERS)
def test_tokens_that_do_not_fit(make: Any, name: str) -> None:
    options, shape, message = REFUSED[name]
    layer, x = make(C, HEAD, **options), torch.randn(shape)
    second = x if make is ek.LightLayerAttention else ek.LayerHistory()
    with pytest.raises(ValueError, match=rf"^x: got shape \[.*{message}"):
        layer(x, second)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens: got -1; allowed is an int of at least"),
        ({"prefix_tokens": True}, TypeError, "prefix_tokens: got bool; allowed is an int"),
        ({"prefix_tokens": 1.0}, TypeError, "prefix_tokens: got float; allowed is an int"),
        ({"grid": 4}, TypeError, "grid: got int; allowed is "),
        ({"grid": "ab"}, TypeError, "grid: got str; allowed is "),
        ({"grid": (2, 3, 4)}, TypeError, r"grid: got \(2, 3, 4\); allowed is "),
        ({"grid": (2, True)}, TypeError, r"grid: got \(2, True\); allowed is "),
        ({"grid": (2.0, 3)}, TypeError, r"grid: got \(2.0, 3\); allowed is "),
        ({"grid": (0, 3)}, ValueError, r"grid: got \(0, 3\); allowed is "),
    ],
)
def test_arguments(make: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make(C, HEAD, **options)


@pytest.mark.parametrize("make", MAKERS)
def test_jagged_and_sparse_tokens(make: Any) -> None:
    layer = make(C, HEAD)
    jagged = torch.nested.nested_tensor([torch.randn(4, C), torch.randn(9, C)], layout=torch.jagged)
    for x in (jagged, torch.randn(2, 9, C).to_sparse()):
        second = x if make is ek.LightLayerAttention else ek.LayerHistory()
        with pytest.raises(TypeError, match=r"^x: got .*allowed is"):
            layer(x, second)
