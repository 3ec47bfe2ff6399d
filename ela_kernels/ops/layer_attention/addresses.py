"""Addresses and strides of tensors as the extension takes them.

These run several times for every layer and step, so they are written for few calls into PyTorch: usually all tensors of
a history lie alike, and then one set of strides stands for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ela_kernels.ops.layer_attention.layout import in_form, view_in_form
from ela_kernels.ops.layer_attention.prefix import Alike

Table = tuple[list[int], list[int], list[Tensor]]
"""Addresses, strides (one set for all, or one for each), and copies that must live until the kernel has run."""

NO_TABLE: Table = ([], [], [])


def row(tensor: Tensor) -> tuple[int, int, Tensor]:
    """Address and batch stride of one query or key `[B, C]`, and the tensor that must live until the kernel has run."""
    batch, channel = tensor.stride()
    if channel != 1 and tensor.shape[1] != 1:
        tensor = tensor.contiguous()
        batch = tensor.stride(0)
    where = tensor.data_ptr()
    return where if where else addresses((tensor,))[0], batch, tensor


def rows(tensors: Sequence[Tensor]) -> Table:
    """Queries or keys `[B, C]`: the stride is that of the batch; channels must be contiguous, or are made so."""
    strides = tensors[0].stride()
    if strides[1] == 1 and _alike(tensors, strides):
        return addresses(tensors), [strides[0]], []
    copies = [t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in tensors]
    return addresses(copies), [t.stride(0) for t in copies], copies


def one_map(
    tensor: Tensor, channels_last: bool, interleaved: bool
) -> tuple[tuple[int, int, int], Tensor]:
    """The kernel's view of one map, and the tensor that must live until the kernel has run."""
    view = view_in_form(tensor, channels_last, interleaved)
    if view is None or view[0] == 0:
        (where,), strides, copies = maps((tensor,), channels_last, interleaved)
        return (where, strides[0], strides[1]), copies[0] if copies else tensor
    return view, tensor


def maps(tensors: Sequence[Tensor], channels_last: bool, interleaved: bool) -> Table:
    """Feature maps of one shape: strides are those of the batch, and of channel (planar) or position (interleaved)."""
    first = view_in_form(tensors[0], channels_last, interleaved)
    if first is not None and _alike(tensors, tensors[0].stride()):
        return addresses(tensors), [first[1], first[2]], []
    copies = [in_form(t, channels_last, interleaved) for t in tensors]
    table: list[int] = []
    for copy in copies:
        view = view_in_form(copy, channels_last, interleaved)
        assert view is not None  # in_form made it so
        table += view[1:]
    return addresses(copies), table, copies


def _alike(tensors: Sequence[Tensor], strides: tuple[int, ...]) -> bool:
    if type(tensors) is Alike:
        return True
    return [*map(Tensor.stride, tensors)].count(strides) == len(tensors)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    found = [*map(Tensor.data_ptr, tensors)]
    if 0 in found and any(t.numel() and t.data_ptr() == 0 for t in tensors):
        raise ValueError(
            "got a tensor without memory of its own (fake, wrapped by torch.func, or a symbolic zero); the compiled "
            "kernels read memory. Use ela_kernels.use_backend('eager') there"
        )
    return found
