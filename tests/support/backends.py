"""The backends as the conformance tests see them: what each serves, where it runs, how exact it is, how it is reached.

Nothing else under tests/conformance knows the insides of a backend. Those that run on a GPU are tested with the marker
`gpu`, which `make gpu-test` selects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from support import interpreted
from support.cases import HALF_TYPES, Case, evaluate
from support.on_gpu import case_on, moved, synchronize
from support.sizes import BEYOND_CHUNKS, BEYOND_GRIDS, DEPTHS, LAYER_SIZES, SIZES, TOKEN_SIZES, Size
from torch import Tensor

import ela_kernels as ek
from ela_kernels.backends.dispatch import BACKENDS, KERNELS
from ela_kernels.backends.extension import extension
from ela_kernels.backends.layout import in_form, is_interleaved


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions and products in float32 proper, by the same algorithm every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        patch.setattr(torch.backends.cudnn, "benchmark", False)
        yield


METHODS = (
    "attend",
    "weights",
    "attend_backward",
    "gather",
    "layer",
    "layer_backward",
    "norm_forward",
    "norm_backward",
    "light_layer",
    "light_layer_backward",
    "mix",
    "mix_backward",
    "position_attend",
    "position_attend_backward",
    "position_gather",
)


class Backend:
    """One backend, in one way to run it."""

    id: str
    name: str
    """As `use_backend` takes it."""
    device = torch.device("cpu")
    marks: tuple[pytest.MarkDecorator, ...] = ()
    is_quick = False
    """Whether `make quick` runs it."""
    is_slow = False
    """Whether a case takes so long that fewer have to do."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF_TYPES)
    sizes: ClassVar[list[Size]] = SIZES
    token_sizes: ClassVar[list[Size]] = TOKEN_SIZES
    depths: ClassVar[list[int]] = DEPTHS
    layer_sizes: ClassVar[list[Size]] = LAYER_SIZES
    is_as_exact_as_eager = False
    """Whether a whole layer in float32 is as near to float64 as eager PyTorch in float32, by a few times."""
    beyond: ClassVar[list[Any]] = []
    """Shape, heads and layout of maps beyond any piece that is worked on at a time."""

    def __str__(self) -> str:
        return self.id

    @property
    def has_kernels(self) -> bool:
        return self.name != "eager"

    @property
    def exact(self) -> torch.dtype:
        """The widest dtype that it serves."""
        return self.dtypes[0]

    @property
    def max_depth(self) -> int | None:
        return BACKENDS[self.name].max_depth

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """The test runs on it; skips where it is not available, with the reason."""
        status = ek.backend_status()[self.name]
        if status != "available":
            pytest.skip(f"{self.name}: {status}")
        with ek.use_backend(self.name):
            yield

    @property
    def tolerance(self) -> dict[str, float]:
        """Of a stage of layers in the widest dtype, against eager PyTorch in the same.

        Both add the same numbers in another order: sums of a few hundred products of order one and their gradients
        through a few layers. In float64 that leaves three digits over its 2.2e-16 times the terms of a sum.
        """
        if self.exact == torch.float64:
            return {"rtol": 1e-12, "atol": 1e-12}
        return {"rtol": 2e-4, "atol": 2e-5}

    def some(self, values: Iterable[Any]) -> list[Any]:
        """All of some values; the first and the last where a case takes long."""
        values = list(values)
        return [values[0], values[-1]] if self.is_slow and len(values) > 2 else values

    # Inputs and results

    def put(self, tensor: Tensor) -> Tensor:
        """`tensor` where the backend runs, laid out as it is; a leaf if it is one that requires grad."""
        return tensor if self.device.type == "cpu" else moved(tensor, self.device)

    def case(self, case: Case) -> Case:
        return case if self.device.type == "cpu" else case_on(case, self.device)

    def evaluate(self, case: Case) -> dict[str, Tensor]:
        """Outputs and wanted gradients of a case, on the CPU."""
        return {name: x.cpu() for name, x in evaluate(self.case(case)).items()}

    # Its kernels

    def keeps_subnormals(self, dtype: torch.dtype) -> bool:
        """Whether numbers of `dtype` below the smallest normal one stay what they are."""
        return True

    def rounding(self, dtype: torch.dtype) -> float:
        """The largest relative error of a result that is rounded to `dtype`: half an ulp."""
        return torch.finfo(dtype).eps / 2

    def contribution(self, *left: Any) -> Any:
        """What one layer leaves to :meth:`gather`; arguments as of `KernelBackend.contribution`."""
        return KERNELS[self.name].contribution(*left)

    def gather(
        self,
        left: Sequence[Any],
        index: int,
        heads: int,
        channels_last: bool,
        need_key: bool,
        need_value: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        return KERNELS[self.name].gather(left, index, heads, channels_last, need_key, need_value)

    @property
    def has_light_layers(self) -> bool:
        return "light_layer" in (BACKENDS[self.name].ops or ())

    def spied(self, patch: pytest.MonkeyPatch) -> list[str]:
        """What operations call its kernels for from now on, in order; not what these call of each other."""
        made: list[str] = []
        inside: list[str] = []

        def spy(owner: Any, method: str) -> None:
            real: Callable[..., Any] = getattr(owner, method)

            def recorded(*args: Any, **kwargs: Any) -> Any:
                if not inside:
                    made.append(method)
                inside.append(method)
                try:
                    return real(*args, **kwargs)
                finally:
                    inside.pop()

            # Not setattr(): of an instance it would leave a bound method behind.
            patch.setitem(vars(owner), method, recorded)

        if self.has_kernels:
            for method in METHODS:
                spy(KERNELS[self.name], method)
        return made


class Eager(Backend):
    id = name = "eager"
    dtypes = (torch.float64, torch.float32, *HALF_TYPES)
    is_quick = True
    beyond: ClassVar[list[Any]] = BEYOND_CHUNKS


class Cpp(Eager):
    id = name = "cpp"
    is_as_exact_as_eager = True

    def keeps_subnormals(self, dtype: torch.dtype) -> bool:
        # Processors that convert to bfloat16 themselves take them for zero.
        return (dtype, extension().simd_level()) != (torch.bfloat16, "avx512_bf16")

    def contribution(
        self,
        q: Tensor,
        weights: Tensor,
        dscores: Tensor,
        dout: Tensor | None,
        channels_last: bool,
        *options: Any,
    ) -> Any:
        if dout is not None:  # its caller sees to it that the kernels can read it
            dout = in_form(dout, channels_last, is_interleaved(dout, channels_last))
        return super().contribution(q, weights, dscores, dout, channels_last, *options)


class CudaOnCpu(Backend):
    """The CUDA kernels, built by the host compiler against a stand-in for their runtime."""

    id = "cuda_on_cpu"
    name = "cuda"
    # Positions that are less than a vector and several tiles.
    layer_sizes: ClassVar[list[Size]] = [
        *LAYER_SIZES[:-1],
        ((2, 70, 2, 9), 14),
        ((1, 4, 56, 56), 2),
        ((1, 3, 39, 130), 1),
    ]

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        from support.cuda_on_cpu import kernels_on_cpu

        with kernels_on_cpu():
            yield


class Interpreted(Backend):
    """The Triton kernels in Triton's interpreter."""

    id = "triton_interpreted"
    name = "triton"
    is_slow = True
    sizes: ClassVar[list[Size]] = [
        ((1, 1, 1, 1), 1),
        ((2, 1, 3, 5), 1),
        ((1, 37, 7, 7), 1),
        ((1, 37, 7, 7), 37),
        ((3, 8, 1, 1), 8),
        ((1, 24, 9, 33), 3),
        ((2, 24, 4, 4), 4),  # strips that cut heads
        ((1, 4, 123), 2),
        ((2, 6, 2, 3, 5), 3),
        ((1, 66, 1, 3), 2),
        ((1, 160, 3, 3), 1),  # wide heads: scores in a launch of their own
        ((1, 288, 3, 4), 3),
        ((1, 8, 40, 40), 2),  # more than one segment or tile to a head
        ((3, 8), 2),
        ((0, 6, 3, 5), 2),
        ((2, 6, 0, 5), 2),
    ]
    token_sizes: ClassVar[list[Size]] = [((2, 1, 6), 1), ((2, 123, 1), 1), ((2, 3, 5, 8), 1)]
    depths: ClassVar[list[int]] = [1, 2, 3, 4, 5, 31, 33, 65]
    layer_sizes: ClassVar[list[Size]] = [
        ((1, 1, 1, 1), 1),
        ((2, 1, 3, 5), 1),
        ((2, 6, 1, 1), 2),
        ((3, 6, 3, 5), 6),
        ((2, 21, 5, 7), 1),  # channel-wise heads
        ((1, 37, 5, 7), 37),
        ((1, 3, 9, 33), 3),
        ((1, 6, 16, 16), 6),
        ((1, 70, 2, 5), 14),
        ((1, 136, 2, 3), 8),  # query and key across the edges of programs
    ]

    def keeps_subnormals(self, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16  # cut to size step by step

    def rounding(self, dtype: torch.dtype) -> float:
        # It cuts float32 to bfloat16 where a GPU rounds: an ulp.
        return super().rounding(dtype) * (2 if dtype == torch.bfloat16 else 1)

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        with interpreted.interpreting(), interpreted.few_programs(), ek.use_backend(self.name):
            yield


class OnDevice(Backend):
    """A backend on a GPU."""

    device = torch.device("cuda")
    marks = (pytest.mark.gpu,)
    beyond: ClassVar[list[Any]] = BEYOND_GRIDS
    # One position, one channel, odd lengths, several patches, more programs than a dimension of a grid holds.
    layer_sizes: ClassVar[list[Size]] = [
        *LAYER_SIZES,
        ((3, 24, 9, 33), 8),
        ((2, 12, 14, 14), 1),
        ((2, 64, 56, 56), 16),
        ((66000, 2, 1, 3), 2),
        ((700, 100, 1, 2), 1),
        ((1, 2, 149, 131), 2),
        ((1, 2100, 5, 3), 700),
    ]

    def __init__(self, name: str) -> None:
        self.id = self.name = name

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and PyTorch finds none")
        torch.cuda.manual_seed_all(20230203)
        with super().forced(), exact_convolutions():
            try:
                yield
            finally:
                synchronize()


ALL: list[Backend] = [
    Eager(),
    Cpp(),
    CudaOnCpu(),
    Interpreted(),
    OnDevice("cuda"),
    OnDevice("triton"),
]
WITH_KERNELS = [b for b in ALL if b.has_kernels]
WITH_LIGHT_LAYERS = [b for b in WITH_KERNELS if b.has_light_layers]
WITH_POSITIONS = [
    b for b in ALL if not b.has_kernels or "position_attention" in (BACKENDS[b.name].ops or ())
]
WITH_FLOAT64 = [b for b in ALL if torch.float64 in b.dtypes]

QUICK_CASES = 12
"""So many of a list of cases are run by `make quick`; the first ones hold the most pairs."""


def parameter(backend: Backend, *values: Any, id: str | None = None, is_quick: bool = True) -> Any:  # noqa: A002
    """One test of a backend; with the marker `full` where `make quick` leaves it out."""
    marks = list(backend.marks)
    if not (is_quick and backend.is_quick):
        marks.append(pytest.mark.full)
    return pytest.param(backend, *values, marks=marks, id=id or backend.id)


def on(backends: Iterable[Backend]) -> pytest.MarkDecorator:
    """The test runs on each of these backends, in place of all."""
    return pytest.mark.parametrize("backend", [parameter(b) for b in backends], indirect=True)


def over(
    name: str,
    cases: Callable[[Backend], Iterable[Any]],
    backends: Iterable[Backend] = ALL,
    ids: Callable[[Any], str] = str,
) -> pytest.MarkDecorator:
    """The test runs on each backend with each of the cases that `cases` has for it, as the argument `name`."""
    found = []
    for backend in backends:
        for i, case in enumerate(cases(backend)):
            found.append(
                parameter(backend, case, id=f"{backend.id}-{ids(case)}", is_quick=i < QUICK_CASES)
            )
    return pytest.mark.parametrize(("backend", name), found, indirect=["backend"])


def words(case: Any) -> str:
    """A case of :func:`support.pairs.pairs` as a name of a test."""
    if isinstance(case, dict):
        return "-".join(words(value) for value in case.values())
    if isinstance(case, tuple | list):
        return "x".join(words(value) for value in case)
    name = getattr(case, "__name__", str(case))
    return str(name).removeprefix("torch.").replace(" ", "+") or "none"
