"""Addresses and strides of tensors as the extension takes them.

These run several times for every layer and step, so they are written for few calls into PyTorch: usually all tensors of
a history lie alike, and then one set of strides stands for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ela_kernels.backends.layout import MapView, SameStrides, in_form, readable_view, view_in_form
from ela_kernels.backends.memory import address, addresses, with_memory

Table = tuple[list[int], list[int], list[Tensor]]
"""Addresses, strides (one set for all, or one for each), and copies that must live until the kernel has run."""

NO_TABLE: Table = ([], [], [])


def row(tensor: Tensor) -> tuple[int, int, Tensor]:
    """Address and batch stride of one query or key `[B, C]`, and the tensor that must live until the kernel has run."""
    batch, channel = tensor.stride()
    if channel != 1 and tensor.shape[1] != 1:
        tensor = with_memory(tensor, "q").contiguous()
        batch = tensor.stride(0)
    return address(tensor, "q"), batch, tensor


def rows(tensors: Sequence[Tensor]) -> Table:
    """Queries or keys `[B, C]`: the stride is that of the batch; channels must be contiguous, or are made so."""
    strides = tensors[0].stride()
    if strides[1] == 1 and _alike(tensors, strides):
        return addresses(tensors, "keys"), [strides[0]], []
    copies = [
        t if t.stride(1) == 1 or t.shape[1] == 1 else with_memory(t, "keys").contiguous()
        for t in tensors
    ]
    return addresses(copies, "keys"), [t.stride(0) for t in copies], copies


def one_map(
    tensor: Tensor, channels_last: bool, interleaved: bool, name: str = "a map"
) -> tuple[MapView, Tensor]:
    """The kernel's view of one map, and the tensor that must live until the kernel has run."""
    view = readable_view(tensor, channels_last, interleaved, name)
    if view is None:
        tensor = in_form(tensor, channels_last, interleaved)
        view = readable_view(tensor, channels_last, interleaved, name)
        assert view is not None  # in_form made it so
    return view, tensor


def maps(
    tensors: Sequence[Tensor], channels_last: bool, interleaved: bool, name: str = "values"
) -> Table:
    """Feature maps of one shape: strides are those of the batch, and of channel (planar) or position (interleaved)."""
    first = view_in_form(tensors[0], channels_last, interleaved)
    if first is not None and _alike(tensors, tensors[0].stride()):
        return addresses(tensors, name), [first[1], first[2]], []
    copies = [in_form(t, channels_last, interleaved) for t in tensors]
    table: list[int] = []
    for copy in copies:
        view = view_in_form(copy, channels_last, interleaved)
        assert view is not None  # in_form made it so
        table += view[1:]
    return addresses(copies, name), table, copies


def _alike(tensors: Sequence[Tensor], strides: tuple[int, ...]) -> bool:
    if type(tensors) is SameStrides:
        return True
    return [*map(Tensor.stride, tensors)].count(strides) == len(tensors)
