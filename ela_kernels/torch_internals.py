"""What this package uses of PyTorch that is private; no other file uses such names.

Of each name: why no public one would do, since which version PyTorch has it, and what happens without it. "Always" is
2.10, the oldest version admitted; a later PyTorch without such a name fails where this file is imported, not somewhere
in a training run, unless it says otherwise. Most are bound here to another name, which costs a caller nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# --- What PyTorch does around a call. Asked at every layer: a public way takes longer, where there is one.

are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of `torch.func` is under way. No public name. Always."""

tracing_state: Callable[[], object] = torch._C._get_tracing_state
"""What `torch.jit.trace` records into, or None; `torch.jit.is_tracing` asks it by way of two more calls. Always."""

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many `TorchDispatchMode`s are active, that is whether somebody wants to see every operation. Always."""

tracing_context: Callable[[], object] = torch._guards.TracingContext.try_get
"""The compiler's own context while it traces, or None: it tells compiled autograd from a graph that runs. Always."""


def is_transformed() -> bool:
    """Whether PyTorch has to see every operation: `torch.func`, forward-mode derivatives, `torch.jit.trace`.

    A kernel reads the memory of its tensors, and would leave out what belongs to them beside it. The level of
    forward-mode derivatives has no public name. Always.
    """
    return are_transforms_active() or forward_ad._current_level >= 0 or tracing_state() is not None


# --- What `torch.func` wraps tensors in: numbers that are read past a wrapper would be those of another computation.

is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a transform of `torch.func` has wrapped a tensor. No public name. Always."""

is_grad_tracking: Callable[[Tensor], bool] = torch._C._functorch.is_gradtrackingtensor
"""Whether the outermost wrapper is that of `torch.func.grad` or its like, not of `vmap`. No public name. Always."""

unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
"""A tensor without its outermost wrapper. No public name. Always."""

is_batched_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether a gradient is one of `is_grads_batched=True`, which has no memory to read. No public name. Always."""

# --- Tensors.

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was changed in place; autograd's own check covers only what it saved itself. Always."""

is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor
"""Whether a tensor stands for zeros without memory, as autograd makes them for complex numbers. Always."""


def tensor_without_memory(
    kind: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of a class of its own that has shape, dtype and device and nothing else. No public name. Always."""
    made: Tensor = Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)
    return made


plain_functions: Callable[[], Any] = torch._C.DisableTorchFunctionSubclass
"""A context in which a class of tensors does not see PyTorch's functions, so that it can ask them itself. Always."""


def made_by(tensor: Tensor) -> Any:
    """The `grad_fn` of a tensor of a class of its own, past that class. Always."""
    with plain_functions():
        return tensor.grad_fn


# --- Autograd.

graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that runs in this thread, -1 outside of one.

The pull form keeps what layers leave by it, and a history knows by it that a checkpoint recomputes. No public name.
Always.
"""

call_after_backward: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback
)
"""Has a function called when the backward pass under way ends, and held until then, also by one that raises.

FSDP and DDP rely on it. No public name. Always.
"""

top_saved_tensors_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)
"""The hooks on saved tensors that are in force, or None. No public name. Always.

Without it hooks may always be there: all is saved through autograd and checked, which takes longer in deep stages, and
a checkpointed history stays in memory longer.
"""

keeps_graph: Callable[[], bool] | None = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", None
)
"""Whether the backward pass under way retains its graph. No public name. Always.

Without it, all that a layer needs is saved through autograd, one tensor at a time.
"""

saved_by: Callable[[Any], Any] = vars(torch._C._FunctionBase)["saved_tensors"].__get__
"""`ctx.saved_tensors` of any autograd function, where a class has put something in its place. Always."""


def node_class(function: type[torch.autograd.Function]) -> Any:
    """The class of a function's nodes in a graph, which are what its backward gets as `ctx`. Always.

    Without it, compiled autograd would trace the kernels' backward, and refuse it.
    """
    return getattr(function, "_backward_cls", None)


def zeros_like_input(node: Any, i: int) -> Tensor:
    """Zeros for the gradient that a node takes in place `i`; only the node itself knows its shape. Always."""
    like = node._input_metadata[i]
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def is_exporting() -> bool:
    """Whether `torch.export` is under way. Always; without it an exported graph counts as one that trains.

    What `torch.compiler.is_exporting` says, which the compiler of 2.10 takes for true in every graph: EBQM would see
    nothing of a compiled model.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export(..., dynamo=True)` is under way.

    The public name loads the exporter, which takes seconds, and is needless where nobody has loaded it. Always.
    """
    return is_exporting() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def without_compiling() -> Any:
    """A context in which compiled functions and modules run as they are written.

    The public name loads the compiler, which takes seconds, and is needless where nobody has loaded it. Always.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def is_of_compiler(error: BaseException) -> bool:
    """Whether an error is one of the compiler's own, by the modules of its class.

    The public names are those of a few of its errors, and load the compiler. Without such modules an error is told as
    it is. Always.
    """
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


# --- Modules: what may be passed by, because calling it would run no more than its parameters say.


def own_weight(module: nn.Module) -> Any:
    """The parameter `weight` itself, or None: reading a parametrized one works it out anew. Always."""
    return module._parameters.get("weight")


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name, to look at and to put back: objects, not what they hold. Always."""
    return module._buffers


def tensors_of_norm(norm: Any) -> tuple[Any, Any, Any, Any]:
    """Weight, bias, running mean and running variance of a batch norm, in a tenth of the time that its names take.

    Where a parametrization or a wrapper has put something in their places, by the names after all. Always.
    """
    parameters, buffers = norm._parameters, norm._buffers
    try:
        return (
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
        )
    except KeyError:
        return norm.weight, norm.bias, norm.running_mean, norm.running_var


def is_lazy(tensor: Tensor) -> bool:
    """Whether a parameter or buffer waits for its shape. Always."""
    return torch.nn.parameter.is_lazy(tensor)


def own_buffer(module: nn.Module, name: str) -> Tensor | None:
    """A buffer of a module that may not be complete, or None. Always."""
    return module._buffers.get(name)


def own_child(module: nn.Module, name: str) -> nn.Module | None:
    """A child of a module, or None. Always."""
    return module._modules.get(name)


def part_of(module: nn.Module, path: str) -> nn.Module:
    """What `module.get_submodule(path)` gives, in a third of the time. Always."""
    found: Any = module
    for name in path.split("."):
        found = found._modules[name]
    assert isinstance(found, nn.Module)
    return found


_Constant = TypeVar("_Constant", bound=Callable[..., object])


def constant_in_graphs(function: _Constant) -> _Constant:
    """A function of constants that the compiler calls when it traces, and takes the result for a constant.

    As `torch.compiler.assume_constant_result`, which imports the compiler, a second's work, where it is applied.
    Without the mark the function is traced. Always.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010 - mypy
    return function


def runs_as_written(function: _Constant) -> _Constant:
    """A function that the compiler leaves alone, and what it calls, where it comes upon it in a call that it skipped.

    It skips a compiled model while a dispatch mode looks on, and goes on skipping what ran then; what did not, it takes
    for functions to compile by themselves. `torch.compiler.disable` imports the compiler where it is applied. Always;
    without it such a model fails in the compiler.
    """
    frames = torch._C._dynamo.eval_frame
    skips, strategy = (
        getattr(frames, "_FrameAction", None),
        getattr(frames, "_FrameExecStrategy", None),
    )
    if skips is not None and strategy is not None:
        frames.set_code_exec_strategy(function.__code__, strategy(skips.SKIP, skips.SKIP))
    return function


def all_modules(module: nn.Module) -> list[nn.Module]:
    """What `module.modules()` gives, in a third of the time. Always."""
    found: dict[nn.Module, None] = {}

    def walk(part: nn.Module) -> None:
        found[part] = None
        for child in part._modules.values():
            if child is not None and child not in found:
                walk(child)

    walk(module)
    return list(found)


# `torch.compile`, FSDP1 and checkpoint_wrapper; the same names stand in the keys of state dicts.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(module: nn.Module) -> nn.Module:
    """What stands inside PyTorch's own wrappers, whose forward is that of it. Always."""
    found: nn.Module | None = module
    while found is not None:
        module, children = found, found._modules
        found = next((children[name] for name in _WRAPPED if children.get(name) is not None), None)
    return module


def remove_hooks(module: nn.Module) -> None:
    """Remove all hooks of a module and of those in it, of which only who made them has the handles. Always."""
    for part in module.modules():
        for hooks in (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        ):
            hooks.clear()


_any_global_hook: Callable[[], object] = nn.modules.module._has_any_global_hook


def has_hooks(*modules: nn.Module) -> bool:
    """Whether calling any of `modules` runs more than its forward. No public name. Always."""
    return has_own_hooks(*modules) or bool(_any_global_hook())


def has_own_hooks(*modules: nn.Module) -> bool:
    """Whether any of `modules` itself has hooks. Always."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return False


def is_plain_convolution(module: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether a convolution has no bias, and a subclass has left what its forward calls as it is. Always."""
    kind = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    return (
        type(module)._conv_forward is kind._conv_forward
        and module._parameters.get("bias", module) is None
    )


BATCH_NORM: type[nn.Module] = nn.modules.batchnorm._BatchNorm
"""What all batch norms are a class of. No public name. Always."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What `torch.compile`, checkpoint wrappers and FSDP call the module that they hold, in names of parameters too."""


def active_ddp() -> Any:
    """The `DistributedDataParallel` whose forward is under way, or None. No public name. Always.

    Without it `static_graph=True` is not refused by name, and PyTorch stops the run at EBQM's first decision.
    """
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


# --- Devices.

cuda_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The handle of a CUDA device's current stream; `torch.cuda.current_stream` makes an object, at every launch.

Always, where PyTorch was built for CUDA.
"""
