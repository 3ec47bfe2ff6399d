"""A copy of a stranger's module to run: in float64 on the CPU, with parameters drawn anew.

Nothing of the original is called or changed; zeros or repeated numbers in its parameters hide no difference.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ela_kernels.backends.setting import use_backend
from ela_kernels.torch_internals import remove_hooks

# Relative to the largest element. The numbers are float64, and the sums short.
CLOSE = 1e-9
# Of gradients, in which more is added up, and cancels.
GRADIENT = 1e-7


class DisagreementError(Exception):
    """Why a module is left as it is."""


class RaisedError(DisagreementError):
    """It raised something of its own."""


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that the forward of `module` needs, in their order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


class Copy:
    """A copy of a module to run: float64 on the CPU, with parameters drawn anew and no hooks.

    Raises:
        DisagreementError: it has no numbers to copy, or cannot be copied.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        if any(t.is_meta for t in tensors):
            raise DisagreementError(
                "its parameters are on the meta device; convert after to_empty() or after loading"
            )
        if any(hasattr(t, "full_tensor") for t in tensors):
            raise DisagreementError("its parameters are sharded; convert before fully_shard()")
        self.generator = torch.Generator().manual_seed(0)
        with failure("a copy of it"):
            self.module = copy.deepcopy(module)
            self.module.to(device="cpu", dtype=torch.float64)
            remove_hooks(self.module)
            for part in list(self.module.modules()):
                if is_parametrized(part):
                    _make_plain(part)
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.copy_(self.random(*parameter.shape))
                for buffer in self.module.buffers():
                    if buffer.is_floating_point():  # near one, as a variance has to be positive
                        buffer.copy_(0.5 + self.random(*buffer.shape).sigmoid())
            for parameter in self.module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())

    def random(self, *shape: int) -> Tensor:
        """Numbers of a normal distribution, the same in every run."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def evaluated(self, *inputs: Any, training: bool = False) -> Any:
        """What the module gives, in evaluation mode unless `training`.

        Raises:
            DisagreementError: it raises.
        """
        self.module.train(training)
        # It may change them.
        own = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
        with failure(f"forward({', '.join(parameter_names(self.module))})"):
            return self.module(*own)

    def run(self, *inputs: Any) -> Any:
        """What the module gives, in both modes.

        Raises:
            DisagreementError: it raises, gives something else in training mode, draws random numbers, or keeps
                something.
        """
        before, drawn = kept_by(self.module), torch.get_rng_state()
        found = self.evaluated(*inputs)
        if not _equal(found, self.evaluated(*inputs, training=True)):
            raise DisagreementError("its results in training differ from those in evaluation mode")
        if not torch.equal(torch.get_rng_state(), drawn):
            raise DisagreementError("it draws random numbers")
        if kept_by(self.module) != before:
            raise DisagreementError(
                "its forward keeps something in the module, which ours would not"
            )
        return found

    def gradients(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Tensor | None]:
        """Gradients of one random sum over `outputs`, of the tensors among `inputs` and of all parameters."""
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros((), device="cpu")
        for out in outputs:
            if isinstance(out, Tensor) and out.is_floating_point():
                weights = torch.randn(out.shape, generator=generator, dtype=out.dtype, device="cpu")
                total = total + (weights * out).sum()
        wanted = [t for t in inputs if isinstance(t, Tensor)]
        wanted += [p for p in self.module.parameters() if p.requires_grad]
        if not total.requires_grad:
            return [None] * len(wanted)
        with failure("its backward"):
            return list(torch.autograd.grad(total, wanted, allow_unused=True))


def same_gradients(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    """None counts as zeros."""
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            rest = a if b is None else b
            if rest is not None and bool(rest.any()):
                return False
        elif not close(a, b, GRADIENT):
            return False
    return True


_OF_MODULES = frozenset(vars(nn.Module()))


def kept_by(module: nn.Module, numbers: bool = True) -> list[object]:
    """What a module and those in it hold beside parameters, to compare: objects, what containers hold, and buffers."""
    found: list[object] = []
    for part in module.modules():
        for name, value in vars(part).items():
            # Those with an underscore are PyTorch's own, hooks among them.
            if name == "training" or (name.startswith("_") and name in _OF_MODULES):
                continue
            found.append((name, id(value)))
            if isinstance(value, (list, tuple, set, dict)):
                found.append(
                    [id(v) for v in (value.values() if isinstance(value, dict) else value)]
                )
        if numbers:
            found += [(name, b.tolist()) for name, b in part.named_buffers(recurse=False)]
    return found


def _make_plain(part: Any) -> None:
    """Take a parametrization away: both read it alike, and one that changes in training would look like a difference.

    By hand, since PyTorch's own way changes the class, which the original shares.
    """
    tensors = {name: getattr(part, name).detach().clone() for name in part.parametrizations}
    part.__class__ = type(part).__bases__[0]
    del part.parametrizations
    for name, tensor in tensors.items():
        part.register_parameter(name, nn.Parameter(tensor))


@contextmanager
def isolated() -> Iterator[None]:
    """Around handshakes: gradients, no autocast, the default device and dtype, and random numbers as before."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    drawn, numpy = random.getstate(), sys.modules.get("numpy")
    drawn_by_numpy = None if numpy is None else numpy.random.get_state()
    # A copy may make tensors of the default dtype, and on maps as small as these threads wait for each other.
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            use_backend("eager"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        random.setstate(drawn)
        if numpy is not None:
            numpy.random.set_state(drawn_by_numpy)


@contextmanager
def failure(what: str) -> Iterator[None]:
    """Whatever a stranger's code raises is a reason to leave it alone."""
    try:
        yield
    except Exception as error:
        words = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {words[0][:120]}" if words else type(error).__name__
        raise RaisedError(f"{what} raised {said}") from error


def close(a: object, b: Tensor, tolerance: float = CLOSE) -> bool:
    """Whether `a` is `b` up to rounding."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and close(a, b)
    return type(a) is type(b)
