"""The pull form on the CUDA kernels, run on the CPU: the gather by itself, and stages that share a LayerHistory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from support.cases import HALF_TYPES, Case, Maker
from support.cuda_on_cpu import launched
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
)
from support.oracle import largest, oracle, tolerances
from support.stage_forms import check_freed_after_a_failed_pass
from torch import Tensor

import ela_kernels as ek
from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.gpu_tables import GpuContribution

DTYPES = (torch.float32, *HALF_TYPES)
FORMS = (contiguous, channels_last)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    with cuda_on_cpu.kernels_on_cpu() as module:
        yield module


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


def retrievals(
    shape: Sequence[int],
    depths: Sequence[int],
    heads: int,
    dtype: torch.dtype,
    makers: Maker | Sequence[Maker] = contiguous,
    channels_last: bool = False,
) -> list[GpuContribution]:
    """What layers of some depths have left; `makers` lay their output gradients out, repeated in turn."""
    makers = [makers] if callable(makers) else list(makers)
    batch, channels = shape[0], shape[-1 if channels_last else 1]
    return [
        GpuContribution(
            torch.randn(batch, channels).to(dtype),
            torch.randn(batch, heads, depth).softmax(-1),
            torch.randn(batch, heads, depth),
            makers[m % len(makers)](shape, dtype),
            channels_last,
        )
        for m, depth in enumerate(depths)
    ]


def assert_sum(found: Tensor, terms: Sequence[Tensor]) -> None:
    """`found` is the sum of the float64 `terms`.

    A product and each of the M additions, in whatever order, err by at most half an ulp of float32 of what they round,
    which no partial sum of absolute values exceeds: (M + 1) u sum |term|. The result is rounded once more.
    """
    exact = torch.stack(list(terms)).sum(0)
    info, u = torch.finfo(found.dtype), torch.finfo(torch.float32).eps / 2
    allowed = (len(terms) + 1) * u * torch.stack(list(terms)).abs().sum(0)
    rounded = (exact.abs() + allowed) * info.eps / 2 + info.smallest_normal * info.eps
    error = (found.double() - exact).abs()
    assert not error.isnan().any()
    assert (error <= allowed + rounded).all(), (error - allowed - rounded).max()


def check_gather(
    retrieved: list[GpuContribution],
    index: int,
    heads: int,
    channels_last: bool = False,
    need: str = "key value",
) -> tuple[Tensor | None, Tensor | None]:
    dkey, dvalue = cuda.gather(
        retrieved, index, heads, channels_last, "key" in need, "value" in need
    )
    per_head = retrieved[0].q.shape[1] // heads

    def column(x: Tensor) -> Tensor:
        return x[..., index].double().repeat_interleave(per_head, 1)  # [B, C]

    assert (dkey is not None) == ("key" in need)
    if dkey is not None:
        assert dkey.dtype == retrieved[0].q.dtype
        assert_sum(dkey, [column(r.dscores) * r.q.double() for r in retrieved])
    given = [r for r in retrieved if r.dout is not None]
    assert (dvalue is not None) == ("value" in need and bool(given))
    if dvalue is not None:
        channel = -1 if channels_last else 1
        terms = []
        for r in given:
            dout = r.dout.double().movedim(channel, 1)
            factor = column(r.weights).reshape(*dout.shape[:2], *[1] * (dout.dim() - 2))
            terms.append((factor * dout).movedim(1, channel))
        assert dvalue.shape == given[0].dout.shape
        assert_sum(dvalue, terms)
    return dkey, dvalue


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
def test_gather_of_maps(layout, dtype):
    for shape, heads in (((3, 12, 5, 7), 3), ((2, 16, 4, 8), 2)):
        check_gather(retrievals(shape, (3, 4, 6), heads, dtype, layout), 2, heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=name_of)
def test_gather_of_tokens(layout, dtype):
    for shape, heads in (((2, 9, 12), 2), ((2, 5, 32), 2)):
        check_gather(retrievals(shape, (1, 2, 5), heads, dtype, layout, True), 0, heads, True)


@pytest.mark.parametrize("turn", range(4))
def test_gather_of_each_gradient_laid_out_otherwise(turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    check_gather(
        retrievals((2, 6, 4, 5), (3, 4, 5, 6), 2, torch.float32, mixed[turn:] + mixed[:turn]), 1, 2
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 31, 32, 33, 65, 256])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gather_of_many_layers(count, layout, kernels):
    retrieved = retrievals((2, 16, 3, 5), range(1, count + 1), 2, torch.float32, layout)
    dkey, dvalue = check_gather(retrieved, 0, 2)
    assert launched(kernels) == ["layer_attention_bwd_gather"]
    for order, limit in ((1, 0), (2, 0), (3, 1)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        again = cuda.gather(retrieved, 0, 2, False, True, True)
        assert torch.equal(dkey, again[0])
        assert torch.equal(dvalue, again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((1, 1, 1, 1), 1),
        ((2, 37, 7, 7), 37),
        ((2, 24, 4, 4), 4),
        ((3, 8, 1, 1), 8),
        ((1, 6, 37, 41), 2),
        ((1, 272, 3, 3), 2),
        ((1, 1100, 2, 4), 2),
        ((2, 16, 33, 31), 2),
    ],
    ids=str,
)
def test_gather_of_sizes(shape, heads, layout, dtype):
    check_gather(retrievals(shape, (2, 3), heads, dtype, layout), 1, heads)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("elements", [1, 4, 7])
def test_gather_from_addresses_off_the_boundary(elements, layout):
    def off(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = layout(shape, dtype)
        moved = torch.empty(x.numel() + elements, dtype=dtype)[elements:]
        return moved.as_strided(x.shape, x.stride(), elements).copy_(x)

    for makers in (off, [layout, off]):
        check_gather(retrievals((2, 16, 4, 4), (2, 3), 2, torch.bfloat16, makers), 0, 2)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(
    ("need", "without", "kernel"),
    [
        ("key", (), "layer_attention_bwd_gather_key"),
        ("value", (), "layer_attention_bwd_gather"),
        ("key value", (0,), "layer_attention_bwd_gather"),
        ("key value", (1, 2), "layer_attention_bwd_gather"),
        ("key value", (0, 1, 2), "layer_attention_bwd_gather_key"),
    ],
    ids=str,
)
def test_gather_of_a_part(need, without, kernel, layout, kernels):
    """Of keys or values alone, and of layers whose output no gradient came through."""
    retrieved = retrievals((2, 12, 5, 3), (2, 3, 4), 3, torch.float32, layout)
    for m in without:
        retrieved[m].dout = None
    check_gather(retrieved, 1, 3, need=need)
    assert launched(kernels) == [kernel]


class Stage:
    """Layers with queries, keys and values of their own, so that what one layer's rounding does stays in it."""

    def __init__(
        self,
        shape: Sequence[int],
        heads: int,
        depth: int,
        dtype: torch.dtype,
        layout: Maker = contiguous,
        channels_last: bool = False,
        provide: Sequence[int] = (),
        through: str = "out weights kl",
    ) -> None:
        batch, channels = shape[0], shape[-1 if channels_last else 1]
        self.heads, self.channels_last, self.provide, self.through = (
            heads,
            channels_last,
            provide,
            through,
        )
        rows = [torch.randn(batch, channels).to(dtype) for _ in range(2 * depth)]
        self.inputs = {
            "q": rows[:depth],
            "k": rows[depth:],
            "v": [layout(shape, dtype) for _ in range(depth)],
        }
        self.dout = [layout(shape, dtype) for _ in range(depth)]
        self.dweights = [torch.randn(batch, heads, t + 1) for t in range(depth)]
        self.dkl = [torch.randn(batch, heads) for _ in range(depth)]

    def run(self) -> dict[str, list[Tensor | None]]:
        """Gradients of every query, key and value through a LayerHistory, under the backend in force."""
        leaves = {n: [x.detach().requires_grad_() for x in xs] for n, xs in self.inputs.items()}
        history, roots, arriving = ek.LayerHistory(), [], []
        options: dict[str, Any] = {"heads": self.heads, "channels_last": self.channels_last}
        for t, (q, k, v) in enumerate(zip(leaves["q"], leaves["k"], leaves["v"], strict=True)):
            if t in self.provide:
                history.provide(k, v, **options)
                continue
            out = history.attend(q, k, v, **options)
            named = {"out": out, "weights": history.weights, "kl": history.kl}
            coming = {"out": self.dout[t], "weights": self.dweights[t], "kl": self.dkl[t]}
            for name, root in named.items():
                if name in self.through and root is not None:
                    roots.append(root)
                    arriving.append(coming[name])
        flat = [x for xs in leaves.values() for x in xs]
        found = iter(torch.autograd.grad(roots, flat, arriving, allow_unused=True))
        return {name: [next(found) for _ in xs] for name, xs in leaves.items()}

    def expected(self) -> tuple[dict[str, list[Tensor]], dict[str, list[float]]]:
        """The same gradients from the oracle of single calls, last layer first, and what rounding may add to each.

        A layer's previous weights are another layer's output, so the gradient that arrives at these is the sum of the
        caller's and of that layer's `d prev_weights`; the error of the latter goes into the scores' gradient, whose
        softmax backward takes it twice. That the kernels' previous weights are rounded is a relative error below
        `factor` of :func:`support.oracle.tolerances`, which counts it once: twice its tolerance has room for it.
        """
        depth = len(self.inputs["q"])
        sums = {
            n: [torch.zeros(x.shape, dtype=torch.float64) for x in xs]
            for n, xs in self.inputs.items()
        }
        allowed = {n: [0.0] * depth for n in sums}
        cases = self.cases()
        carried, carried_error = None, 0.0
        for t, case in reversed(cases.items()):
            if carried is not None:
                case.dweights = carried if case.dweights is None else case.dweights + carried
            found, tolerance = oracle(case), tolerances(case)
            scale = (case.q.shape[1] // self.heads) ** -0.5
            more_q = 2 * carried_error * scale * largest(case.keys)
            more_k = 2 * carried_error * scale * largest([case.q])
            sums["q"][t] += found["d q"]
            allowed["q"][t] += 2 * tolerance["d q"] + more_q
            for j in range(t + 1):
                sums["k"][j] += found[f"d keys[{j}]"]
                allowed["k"][j] += 2 * tolerance[f"d keys[{j}]"] + more_k
                sums["v"][j] += found[f"d values[{j}]"]
                allowed["v"][j] += 2 * tolerance[f"d values[{j}]"]
            carried, carried_error = found.get("d prev_weights"), 2 * tolerance["d prev_weights"]
        return sums, allowed

    def cases(self) -> dict[int, Case]:
        """Each retrieving layer as a call of its own, with its previous layer's weights in float64."""
        cases: dict[int, Case] = {}
        prev = None
        for t in range(len(self.inputs["q"])):
            if t in self.provide:
                continue
            case = Case(
                self.inputs["q"][t],
                self.inputs["k"][: t + 1],
                self.inputs["v"][: t + 1],
                self.heads,
                prev_weights=prev,
                channels_last=self.channels_last,
                dout=self.dout[t] if "out" in self.through else None,
                dweights=self.dweights[t] if "weights" in self.through else None,
                dkl=self.dkl[t] if "kl" in self.through and prev is not None else None,
            )
            case.wanted = list(case.inputs())
            if (
                cases
            ):  # pads what arrives at the previous layer's weights: they are as many as its keys
                assert prev is not None
            prev = oracle(case)["weights"].detach()
            cases[t] = case
        return cases


def check_stage(stage: Stage) -> None:
    found = stage.run()
    sums, allowed = stage.expected()
    for name, exact in sums.items():
        for t, (x, y, error) in enumerate(zip(found[name], exact, allowed[name], strict=True)):
            if x is None:
                assert not y.any(), f"{name}[{t}]"
                continue
            info = torch.finfo(x.dtype)
            torch.testing.assert_close(
                x.double(),
                y,
                rtol=info.eps,
                atol=error + info.smallest_normal * info.eps,
                msg=lambda text, name=name, t=t: f"d {name}[{t}]: {text}",
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last, channel_slice], ids=name_of)
@pytest.mark.parametrize("provide", [(), (0,), (2,), (3, 4)], ids=str)
def test_stages(provide, layout, dtype):
    check_stage(Stage((2, 16, 4, 5), 2, 5, dtype, layout, provide=provide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stages_of_tokens(dtype):
    check_stage(Stage((2, 7, 24), 3, 4, dtype, channels_last=True))


@pytest.mark.parametrize("through", ["out", "weights", "kl", "out kl", "weights kl"])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_stages_with_gradients_from_some_outputs(through, layout):
    check_stage(Stage((2, 12, 5, 3), 3, 4, torch.float32, layout, through=through))


def test_a_deep_stage(kernels):
    stage = Stage((1, 8, 2, 2), 2, 40, torch.float32)
    check_stage(stage)
    names = launched(kernels)
    for name, count in (("fwd", 40), ("bwd_dots", 40), ("bwd_tail", 40), ("bwd_gather", 40)):
        assert names.count(f"layer_attention_{name}") == count


def test_the_probe_of_a_skipped_layer(kernels):
    history, (q, k, *_), v = ek.LayerHistory(), torch.randn(6, 2, 12), torch.randn(2, 12, 3, 3)
    for _ in range(3):
        history.attend(torch.randn(2, 12), torch.randn(2, 12), v, heads=3)
    kernels.take_launches()
    probed = history.probe(q, k, heads=3)
    assert launched(kernels) == ["layer_attention_fwd_weights"]
    out_of_it = history.weights, history.kl
    history.attend(q, k, v, heads=3)
    assert out_of_it[0].shape[-1] == 3
    # The same sums, in blocks that are cut otherwise: a few ulps of a weight.
    torch.testing.assert_close(probed.weights, history.weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(probed.kl, history.kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["op", "layer", "block"])
def test_a_failed_pass_leaves_nothing(form, kernels):
    check_freed_after_a_failed_pass(form)
    assert launched(kernels)
