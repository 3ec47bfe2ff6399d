"""What the GPU backends say of builds, drivers and devices that they cannot use. No GPU is needed to say it."""

from __future__ import annotations

import pytest
import torch

import ela_kernels as ek
from ela_kernels.backends import dispatch, extension
from ela_kernels.backends.contract import Request
from ela_kernels.backends.cuda import backend as cuda_backend
from ela_kernels.backends.cuda.backend import CudaBackend, architecture_reason
from ela_kernels.backends.triton.backend import TritonBackend

DEVICE = torch.device("cuda", 0)


class FakeExtension:
    """The part of the extension that the backend asks."""

    has_cuda = True

    def __init__(self, problem: str | None = None) -> None:
        self.problem = problem

    def cuda_devices(self) -> dict[str, object]:
        return {"devices": [], "problem": self.problem}

    def cuda_runtime_version(self) -> int:
        return 13000


@pytest.fixture
def gpu_machine(monkeypatch):
    """PyTorch for CUDA with one device of capability 9.0, and an extension built for it."""

    def change(
        module: object = None,
        capability: tuple[int, int] = (9, 0),
        available: bool = True,
        built: tuple[str, ...] = ("9.0",),
    ) -> None:
        cuda_backend._driver_reason.cache_clear()
        module = FakeExtension() if module is None else module
        monkeypatch.setattr(extension, "extension", lambda: module)
        monkeypatch.setattr(extension, "build_info", lambda: {"cuda_architectures": [*built]})
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    change()
    yield change
    cuda_backend._driver_reason.cache_clear()


def request(
    dtype: torch.dtype = torch.float32,
    depth: int = 3,
    device: torch.device = DEVICE,
    op: str = "layer_attention",
) -> Request:
    return Request(op, device, dtype, depth, False)


@pytest.mark.parametrize("backend", [CudaBackend(), TritonBackend()], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fitting_machine_is_served(gpu_machine, backend, dtype):
    if backend.name == "triton":
        pytest.importorskip("triton")
    assert backend.unavailable_reason() is None
    for op in ("layer_attention", "layer_attention_weights"):
        assert backend.reasons(request(dtype, op=op)) == []
        assert backend.automatic_reasons(request(dtype, op=op)) == []
    assert backend.reasons(request(dtype, depth=backend.max_depth)) == []


@pytest.mark.parametrize(
    ("setting", "served"),
    [("auto", "triton"), ("triton", "triton"), ("cuda", None), ("eager", None)],
)
def test_light_layers_are_triton_s_on_a_gpu(gpu_machine, setting, served):
    """CUDA has no kernel for them: `auto` goes on to the next, and forced it refuses."""
    pytest.importorskip("triton")
    dispatch._plan.cache_clear()
    with ek.use_backend(setting):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = dispatch.plan(request(dtype, 1, op="light_layer"))
            assert getattr(found, "name", None) == served
            if setting == "cuda":
                with pytest.raises(ValueError, match="it has no kernel for light_layer"):
                    dispatch.require(request(dtype, 1, op="light_layer"))
        double = request(torch.float64, 1, op="light_layer")
        assert isinstance(dispatch.plan(double), dispatch.Refusal)
    dispatch._plan.cache_clear()


@pytest.mark.parametrize("backend", [CudaBackend(), TritonBackend()], ids=lambda b: b.name)
def test_what_is_outside_of_the_envelope_is_refused(gpu_machine, backend):
    if backend.name == "triton":
        pytest.importorskip("triton")
    (reason,) = backend.reasons(request(torch.float64))
    assert reason == "it serves bfloat16, float16, float32, and the values are torch.float64"
    most = {"cuda": 256, "triton": 128}[backend.name]
    (reason,) = backend.reasons(request(depth=most + 1))
    assert reason == f"it serves up to {most} layers in one history, and these are {most + 1}"
    (reason,) = backend.reasons(request(op="light_layer_attention"))
    assert reason == "it has no kernel for light_layer_attention"
    (reason,) = backend.reasons(request(device=torch.device("cpu")))
    assert reason == "it serves tensors on cuda, and these are on cpu"
    needs_grad = request(op="layer_attention_weights")._replace(needs_grad=True)
    (reason,) = backend.reasons(needs_grad)
    assert "no backward" in reason


def test_a_build_without_cuda(gpu_machine, monkeypatch):
    without = FakeExtension()
    without.has_cuda = False
    gpu_machine(without)
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda_problem": "no nvcc was found"})
    reason = CudaBackend().unavailable_reason()
    assert reason is not None
    assert reason.startswith("the compiled extension was built without CUDA: no nvcc was found;")
    assert "ELA_KERNELS_BUILD=cuda" in reason


def test_a_driver_too_old_for_the_extension(gpu_machine):
    gpu_machine(FakeExtension("error 35 (cudaErrorInsufficientDriver): too old"))
    reason = CudaBackend().unavailable_reason()
    assert reason is not None
    assert (
        "the CUDA 13.0 runtime that the extension was built with finds no device: error 35"
        in reason
    )
    assert "update the driver" in reason


@pytest.mark.parametrize("backend", [CudaBackend(), TritonBackend()], ids=lambda b: b.name)
def test_no_device(gpu_machine, backend, monkeypatch):
    if backend.name == "triton":
        pytest.importorskip("triton")
    gpu_machine(available=False)
    reason = backend.unavailable_reason()
    assert reason is not None
    assert "PyTorch finds no GPU here" in reason
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = backend.unavailable_reason()
    assert reason is not None
    assert "built for the CPU alone" in reason


def test_a_device_too_old_for_triton(gpu_machine):
    pytest.importorskip("triton")
    gpu_machine(capability=(7, 5))
    (reason,) = TritonBackend().reasons(request())
    assert reason == "Triton compiles for compute capability 8.0 and later, and Test GPU has 7.5"


@pytest.mark.parametrize(
    ("built", "capability", "served"),
    [
        (("9.0",), (9, 0), True),
        (("8.0", "8.6"), (8, 9), True),  # binaries run on later minors of their generation
        (("8.6",), (8, 0), False),  # and never on earlier ones
        (("8.0",), (9, 0), False),
        (("8.0+PTX",), (9, 0), True),  # PTX compiles for any later generation
        (("9.0+PTX",), (8, 0), False),
        (("12.0+PTX",), (10, 0), False),
        (("9.0a",), (9, 0), True),
        (("10.0a",), (10, 3), False),
        (("10.0f",), (10, 3), True),
        ((), (9, 0), False),
    ],
)
def test_architectures(built, capability, served):
    reason = architecture_reason(built, capability, "Test GPU")
    assert (reason is None) == served
    if reason is not None:
        major, minor = capability
        assert f"Test GPU has compute capability {major}.{minor}" in reason
        assert f"TORCH_CUDA_ARCH_LIST={major}.{minor}" in reason


def test_a_call_on_the_cpu_asks_no_driver(gpu_machine, monkeypatch):
    """Waking a driver would keep the processes that a data loader forks from using the GPU."""

    def asked() -> bool:
        raise AssertionError("a call on the CPU asked for a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    for backend in (CudaBackend(), TritonBackend()):
        assert backend.automatic_reasons(request(device=torch.device("cpu")))


def test_triton_interprets_only_when_forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_cpu = request(device=torch.device("cpu"))
    assert TritonBackend().unavailable_reason() is None
    assert TritonBackend().reasons(on_cpu) == []
    assert TritonBackend().automatic_reasons(on_cpu)
    assert ek.backend_status()["triton"] == "available"
