"""Networks on the device: autocast, loss scaling, channels_last, torch.compile; kernels against eager PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases import evaluate, make_case
from support.layouts import channels_last, contiguous
from support.on_gpu import DEVICE, case_on, evaluate_on, serving
from support.oracle import assert_matches
from torch import nn

import ela_kernels as ek
from ela_kernels.models import CifarResNet, build_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend", "exact_convolutions")]


def make_network(attention="ela"):
    torch.manual_seed(5)
    return CifarResNet((3, 2), (16, 32), attention=attention, head_dim=8).to(DEVICE).train()


def make_batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    return images.to(DEVICE, dtype), torch.randint(0, 10, (8,), generator=generator).to(DEVICE)


def gradients(network, memory_format=torch.contiguous_format, dtype=torch.float32):
    """Loss and gradients of one step, in float64."""
    network = copy.deepcopy(network).to(dtype=dtype, memory_format=memory_format)
    images, labels = make_batch(dtype)
    loss = nn.functional.cross_entropy(
        network(images.contiguous(memory_format=memory_format)), labels
    )
    loss.backward()
    found = {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double()} | found


def largest_error(found, expected):
    """Largest difference of any gradient, of the largest gradient of a kind of parameter's norm."""
    assert found.keys() == expected.keys()
    size = {name: float(want.norm()) for name, want in expected.items()}
    # A gradient that is nothing but cancelled rounding (of a query with one key) has no size of its own.
    least = 1e-3 * max(size.values())
    return max(
        float((found[name] - want).norm()) / max(size[name], least)
        for name, want in expected.items()
    )


@pytest.mark.parametrize("attention", ["ela", "mrla"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_training_step_is_as_exact_as_eager(attention, memory_format, kernels_ran, backend):
    """Both round in float32 at every operation, and a network magnifies that: what counts is the distance from
    float64. Ours may be four times as far as eager PyTorch's own, since either is one draw of random roundings."""
    network = make_network(attention)
    with ek.use_backend("eager"):
        exact = gradients(network, dtype=torch.float64)
        eager = gradients(network, memory_format)
    assert kernels_ran == []
    with ek.use_backend(backend):
        ours = gradients(network, memory_format)
    assert kernels_ran.count("forward") == kernels_ran.count("backward") == 5
    eager_error = largest_error(eager, exact)
    assert 0 < eager_error < 1e-3
    assert largest_error(ours, exact) <= 4 * eager_error


def test_a_stage_in_channels_last_stays_in_it(backend):
    layers = nn.ModuleList(ek.LayerAttention(16, head_dim=8) for _ in range(3)).to(DEVICE)
    layers = layers.to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 6, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    history = ek.LayerHistory()
    for layer in layers:
        x = layer(x, history)
        assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(dtype):
    case = case_on(make_case(depth=3))
    inputs = {n: x.detach().requires_grad_() for n, x in case.inputs().items()}
    keys, values = ([inputs[f"{kind}[{j}]"] for j in range(3)] for kind in ("keys", "values"))
    with torch.autocast(DEVICE.type, dtype=dtype):
        r = ek.layer_attention(inputs["q"], keys, values, 3, prev_weights=inputs["prev_weights"])
        only = ek.layer_attention_weights(inputs["q"].detach(), [k.detach() for k in keys], 3)
    assert r.out.dtype == dtype
    assert r.weights.dtype == r.kl.dtype == only.weights.dtype == torch.float32
    assert torch.equal(only.weights, r.weights)
    half = case_on(make_case(depth=3, dtype=dtype))
    half.q, half.prev_weights = case.q.to(dtype), case.prev_weights
    half.keys, half.values = ([x.to(dtype) for x in xs] for xs in (case.keys, case.values))
    half.dout, half.dweights, half.dkl = case.dout.to(dtype), case.dweights, case.dkl
    expected = evaluate(half)
    assert torch.equal(r.out, expected["out"])
    grads = torch.autograd.grad(
        list(r), list(inputs.values()), [half.dout, half.dweights, half.dkl]
    )
    for (name, x), g in zip(inputs.items(), grads, strict=True):
        assert g.dtype == x.dtype == torch.float32
        assert torch.equal(g, expected["d " + name].float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_under_autocast_runs_the_kernels(dtype, kernels_ran, backend):
    network = make_network()
    images, labels = make_batch()
    with torch.autocast(DEVICE.type, dtype=dtype):
        loss = nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    assert kernels_ran.count("forward") == kernels_ran.count("backward") == 5
    with ek.use_backend("eager"):
        exact = gradients(network, dtype=torch.float64)
    # Activations of unit size with a relative error of eps at each of some ten layers, damped by the norms.
    assert abs(loss.item() - exact["loss"].item()) < 20 * torch.finfo(dtype).eps
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("attention", ["ela", "mrla", "mrla_light"])
def test_a_bottleneck_network_in_channels_last_and_autocast(attention, backend):
    """As ImageNet networks are trained; every map stays in channels_last and in bfloat16."""
    ek.use_backend(serving(backend, attention))
    torch.manual_seed(5)
    network = build_model("resnet50", attention=attention, num_classes=10)
    network = network.to(DEVICE, memory_format=torch.channels_last).train()
    if attention == "ela":
        for stage in network.attentions:
            for i, layer in enumerate(stage):
                layer.skipped = i % 3 == 2
    images = torch.randn(4, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (4,), device=DEVICE)
    seen = []
    for stage in network.attentions:
        for layer in stage:
            layer.register_forward_hook(lambda module, args, out: seen.append(out))

    def loss(network):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return nn.functional.cross_entropy(network(images).float(), labels)

    twin = copy.deepcopy(network)
    found = loss(network)
    found.backward()
    assert len(seen) == 16
    for out in seen:
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=torch.channels_last)
    for name, p in network.named_parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()), name
    with ek.use_backend("eager"):
        expected = loss(twin)
    # Fifty layers of bfloat16 with batch norms of a few images: within some roundings of each other.
    assert abs(found.item() - expected.item()) <= 0.05 * abs(expected.item())


def test_a_bottleneck_network_runs_the_kernels_of_whole_layers(layers_ran):
    network = build_model("resnet50", attention="ela", num_classes=10).to(DEVICE).train()
    for stage in network.attentions:
        stage[2].skipped = True
    with torch.autocast(DEVICE.type, torch.bfloat16):
        scores = network(torch.randn(2, 3, 32, 32, device=DEVICE))
    scores.float().logsumexp(1).sum().backward()
    # The pair of a stage's last layer is nobody's: where that only provides, nothing comes back to it.
    assert layers_ran == ["layer"] * 16 + ["layer_backward"] * 14


@pytest.mark.usefixtures("cuda_only")
def test_loss_scaling_in_float16(kernels_ran):
    network = make_network()
    images, labels = make_batch()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert scaler.get_scale() == 2.0**10  # no step was skipped
    assert losses[-1] < 0.9 * losses[0]
    assert kernels_ran.count("backward") == 8 * 5


@pytest.mark.usefixtures("cuda_only")
def test_an_overflow_is_seen_and_the_step_skipped():
    network = make_network()
    images, labels = make_batch()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = nn.functional.cross_entropy(network(images), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    for p, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(p, old)


def compiled(compiler):
    def function(q, keys, values, **arguments):
        r = ek.layer_attention(q * 1.0, keys, [v * 1.0 for v in values], **arguments)
        return ek.LayerAttentionOutput(r.out * 1.0, r.weights, r.kl)

    return torch.compile(function, fullgraph=True, backend=compiler)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_traced_without_a_break(layout, kernels_ran):
    torch.compiler.reset()
    case = make_case(makers=layout)
    assert_matches(evaluate_on(case, op=compiled("aot_eager")), case)
    assert kernels_ran == ["forward", "backward"]


@pytest.mark.usefixtures("cuda_only")
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_compiled_by_inductor(layout, kernels_ran):
    torch.compiler.reset()
    case = make_case(makers=layout)
    assert_matches(evaluate_on(case, op=compiled("inductor")), case)
    assert kernels_ran == ["forward", "backward"]


@pytest.mark.usefixtures("cuda_only")
def test_a_compiled_stage_of_modules(kernels_ran, backend):
    torch.compiler.reset()
    layers = nn.ModuleList(ek.LayerAttention(16, head_dim=8) for _ in range(3)).to(DEVICE)
    x = torch.randn(2, 16, 6, 5, device=DEVICE)

    def stage(x):
        history = ek.LayerHistory()
        for layer in layers:
            x = x + layer(x, history)
        return x

    expected = stage(x)
    found = torch.compile(stage, fullgraph=True)(x)
    assert kernels_ran == ["forward"] * 6
    # The convolutions are compiled to other sums of nine products in float32, three layers deep.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cuda_only")
def test_compiled_blocks_train(kernels_ran, backend):
    torch.compiler.reset()
    torch.manual_seed(3)
    blocks = nn.ModuleList(ek.ELA(16, head_dim=8) for _ in range(3)).to(DEVICE).eval()
    x = torch.randn(2, 16, 6, 5, device=DEVICE, requires_grad=True)

    def stage(x):
        history = ek.LayerHistory()
        for block in blocks:
            x = block(x, history)
        return x

    def step(forward):
        out = forward(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *blocks.parameters()])]

    expected = step(stage)
    kernels_ran.clear()
    found = step(torch.compile(stage, fullgraph=True))
    assert kernels_ran.count("forward") == kernels_ran.count("backward") == 3
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5
