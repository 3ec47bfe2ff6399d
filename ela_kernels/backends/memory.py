"""Where tensors become addresses: every kernel takes them from here, and what has no data to read is refused here.

A kernel that is given the address of nothing ends the process. PyTorch's own copies do as well, so what is copied or
cast on the way to a kernel is looked at before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ela_kernels.torch_internals import is_zero_tensor

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

# A view of a storage that was freed has its offset for an address, and what is only described (on the meta device, or
# fake) has none. No such offset is as large as this, and hardly any data lie lower; those that do are looked at twice.
_LOWEST = 1 << 36

_SAY = "allowed is a tensor with its data in memory"
_FREED = (
    f"{_SAY}. Its storage was freed or cut: FSDP frees parameters outside of the forward and backward of the module "
    "that it wraps, so wrap the module whose forward is called; a tensor of your own must keep its storage until the "
    "backward is done"
)
_NO_DATA = (
    f"{_SAY}. This one is only described (on the meta device, fake, a symbolic zero, or wrapped by torch.func or a "
    "class of its own); ela_kernels.use_backend('eager') takes those"
)


def address(tensor: Tensor | None, name: str = "a tensor") -> int:
    """Where the data of `tensor` begin; 0 for none, and for an empty one.

    Raises:
        ValueError: it has elements, and no memory.
    """
    if tensor is None:
        return 0
    try:
        where = tensor.data_ptr()
    except RuntimeError:
        _refuse(tensor, name)
    if where < _LOWEST:
        with_memory(tensor, name)
    return where


def addresses(tensors: Sequence[Tensor], name: str = "a tensor") -> list[int]:
    """:func:`address` of each."""
    try:
        found = [*map(Tensor.data_ptr, tensors)]
    except RuntimeError:
        return [address(t, name) for t in tensors]
    if found and min(found) < _LOWEST:
        for tensor in tensors:
            with_memory(tensor, name)
    return found


def with_memory(tensor: Tensor, name: str = "a tensor") -> Tensor:
    """`tensor`, after a look whether all of it can be read.

    Raises:
        ValueError: it cannot.
    """
    try:
        where = tensor.data_ptr()
        is_cut = needed_bytes(tensor) > tensor.untyped_storage().nbytes()
    except RuntimeError:
        _refuse(tensor, name)
    if is_cut or (where == 0 and tensor.numel()) or tensor.is_meta or is_zero_tensor(tensor):
        _refuse(tensor, name)
    return tensor


def check_readable(device: int, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Refuse a tensor that kernels cannot read; for what comes from outside, before anything is copied.

    Args:
        device: of the kernels, as :meth:`Tensor.get_device` counts them.
        names: of `tensors`, which may be None.

    Raises:
        ValueError: one has no memory, or is on another device.
    """
    try:
        for tensor in tensors:
            if tensor is not None and (
                tensor.get_device() != device or tensor.data_ptr() < _LOWEST
            ):
                break
        else:
            return
    except RuntimeError:  # of what has no storage at all
        pass
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None:
            _check_device(device, name, tensor)
            with_memory(tensor, name)


def check_list_readable(device: int, name: str, tensors: Sequence[Tensor]) -> None:
    """As :func:`check_readable`, of keys or values."""
    if [*map(Tensor.get_device, tensors)].count(device) != len(tensors):
        for tensor in tensors:
            _check_device(device, name, tensor)
    addresses(tensors, name)


def _check_device(device: int, name: str, tensor: Tensor) -> None:
    if tensor.get_device() != device:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}; allowed is the device of the "
            f"call's other tensors, {'cpu' if device < 0 else f'number {device}'}"
        )


def check_not_freed(name: str, *tensors: Tensor | None) -> None:
    """Refuse plain tensors whose storage was freed, for what is left to PyTorch: it does not look either.

    Others pass: fake and wrapped ones are for eager PyTorch.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and type(tensor) in PLAIN_TENSORS:
            _check_not_freed(name, tensor)


def _check_not_freed(name: str, tensor: Tensor) -> None:
    try:
        if tensor.nbytes <= tensor.untyped_storage().nbytes():
            return
        is_cut = needed_bytes(tensor) > tensor.untyped_storage().nbytes()
    except RuntimeError:  # wrapped by torch.func: it has no storage of its own
        return
    if is_cut:
        _refuse(tensor, name)


def cast(tensor: Tensor, dtype: torch.dtype, name: str = "a tensor") -> Tensor:
    """`tensor.to(dtype)` of one that has memory to read."""
    if tensor.dtype == dtype:
        return tensor
    # A graph that is being compiled has no memory yet, and its own rules about it.
    return (tensor if torch.compiler.is_compiling() else with_memory(tensor, name)).to(dtype)


def needed_bytes(tensor: Tensor) -> int:
    """How far into its storage a tensor reaches."""
    if not tensor.numel():
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _refuse(tensor: Tensor, name: str) -> NoReturn:
    described = f"{name}: got shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{described}, of layout {tensor.layout}; allowed is torch.strided. Call .to_dense() first"
        )
    is_freed = False
    if type(tensor) in PLAIN_TENSORS and not tensor.is_meta:
        try:
            is_freed = needed_bytes(tensor) > tensor.untyped_storage().nbytes()
        except RuntimeError:  # wrapped by torch.func
            is_freed = False
    raise ValueError(f"{described}, which has no memory; {_FREED if is_freed else _NO_DATA}")
