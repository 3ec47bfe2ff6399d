"""The parameters that make query, key and value from a feature map; both forms of layer attention have them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ela_kernels.backends.memory import PLAIN_TENSORS, check_not_freed
from ela_kernels.backends.types import Filters
from ela_kernels.modules.tokens import TakesTokens
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import (
    fits_layer_dtype,
    is_autocast_on,
    layer_dtype,
    may_be_cast,
)
from ela_kernels.torch_internals import (
    has_hooks,
    is_plain_convolution,
    own_child,
    own_weight,
    tracing_state,
)

_NO_LEAF = (
    "this layer is no leaf of its trace (tracer_kwargs={'leaf_modules': [...]} of torchvision)"
)
# Added to the mean square of a head: far below what queries and keys are, and no number of half precision is less.
QK_NORM_EPS = 1e-6
_EXPORT = "use torch.export.export, or torch.jit.trace of the whole model"


def default_kernel_size(dim: int) -> int:
    """Kernel size of the convolutions over the channel axis: `int(|log2(dim) + 1| / 2)`, the next odd number if even.

    Source: MRLA (arXiv 2302.03985), which takes the rule from ECA-Net (arXiv 1910.03151).
    """
    size = int(abs(math.log2(dim) + 1) / 2)
    return size if size % 2 else size + 1


def check_count(name: str, value: object) -> int:
    """A positive int, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed is a positive int")
    if value < 1:
        raise ValueError(f"{name}: got {value}; allowed is a positive int")
    return value


def passed_on(x: Tensor, copy: bool) -> Tensor:
    """What a layer that adds nothing gives: a copy, or a view of `x`; in the dtype of the sum with a retrieval."""
    dtype = layer_dtype(x)
    if dtype == x.dtype and not copy:
        return x.view_as(x)
    return x.to(x.dtype if dtype == x.dtype else torch.promote_types(x.dtype, dtype), copy=True)


def as_before_wrappers(passed: Tensor, x: Tensor) -> Tensor:
    """What a layer passed on of `x`; `x` where a wrapper (mixed precision of FSDP, say) cast what went in.

    Not `x` alone: backward hooks are on what was passed on.
    """
    if passed.dtype == x.dtype or passed.dtype == torch.promote_types(passed.dtype, x.dtype):
        return passed
    return torch.where(x.new_zeros((), dtype=torch.bool), passed, x)


def pooled(x: Tensor) -> Tensor:
    """Mean over space, `[B, C]`: `x.mean((2, 3))`.

    Where a sum cannot overflow it is divided afterwards: the backward of a mean writes a whole map of quotients, that
    of a sum only a view of `[B, C]` numbers.
    """
    if x.dtype in (torch.float32, torch.float64):
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return x.mean((2, 3))


class ChannelFilter(nn.Conv1d):
    """A convolution over the channel axis: `nn.Conv1d(1, 1, size, padding=size // 2, bias=False)` on `[B, 1, C]`.

    As a product with the windows instead: on vectors this small a CPU convolution takes several times as long, and
    query and key share the windows.
    """

    def __init__(self, size: int) -> None:
        super().__init__(1, 1, size, padding=size // 2, bias=False)

    @staticmethod
    def windows(y: Tensor, size: int) -> Tensor:
        """The `size` neighbours of each channel, `[B, C, size]`, of `[B, C]` padded with zeros."""
        padded = F.pad(y, (size // 2, size // 2))
        if tracing_state() is not None:
            # ONNX has no word for the other, which is a view.
            return torch.stack([padded[:, i : i + y.shape[1]] for i in range(size)], -1)
        return padded.unfold(1, size, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """`[B, C]` from :meth:`windows`."""
        return windows @ self.weight.view(-1)


def runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the forward of `module` is that of `kind`: not of a subclass, and none of its own; hooks aside."""
    return type(module).forward is kind.forward and "forward" not in module.__dict__


class QueryKeyValue(nn.Module):
    """The parameters that make query, key and value from a feature map; both forms of layer attention have them.

    Args:
        dim: number of channels C.
        head_dim: channels of a head D; a divisor of `dim`.
        kernel_size: odd size of the filters over the channel axis; by :func:`default_kernel_size` if None.
        qk_norm: queries and keys are normalised, head by head, by `nn.RMSNorm(head_dim)` of their own.
    """

    def __init__(
        self, dim: int, head_dim: int, kernel_size: int | None = None, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.head_dim = check_count("head_dim", head_dim)
        if dim % head_dim:
            raise ValueError(
                f"head_dim: got {head_dim} for dim={dim}; allowed is a divisor of dim, so that heads are of one size"
            )
        size = default_kernel_size(dim) if kernel_size is None else kernel_size
        if check_count("kernel_size", size) % 2 == 0:
            raise ValueError(
                f"kernel_size: got {size}; allowed is an odd int, so that channels keep their place"
            )
        self.kernel_size = size
        self.Wq = ChannelFilter(size)
        self.Wk = ChannelFilter(size)
        self.Wv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        if type(qk_norm) is not bool:
            raise TypeError(f"qk_norm: got {type(qk_norm).__name__}; allowed is True or False")
        if qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=QK_NORM_EPS)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=QK_NORM_EPS)

    @property
    def heads(self) -> int:
        """Number of heads G."""
        return self.dim // self.head_dim

    def check_input(self, x: object) -> None:
        """Refuse what is no dense `[B, dim, H, W]` tensor."""
        if not isinstance(x, Tensor):
            tracing = isinstance(x, torch.fx.Proxy)
            raise TypeError(
                f"x: got {type(x).__name__}; allowed is a torch.Tensor {self._inputs('C')}"
                + (f". torch.fx hands over none, and {_NO_LEAF}: {_EXPORT}" if tracing else "")
            )
        if x.is_nested or x.layout != torch.strided:
            checks.check_tensor("x", x)
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(
                f"x: got shape {list(x.shape)}; allowed is {self._inputs(str(self.dim))}, as this layer was made with "
                f"dim={self.dim}"
            )

    def _inputs(self, dim: str) -> str:
        """What the layer takes, for a message."""
        tokens = f" or [B, N, {dim}] (tokens)" if isinstance(self, TakesTokens) else ""
        return f"[B, {dim}, H, W]{tokens}"

    def check_beside_parameters(self, x: Tensor) -> None:
        """Refuse `x` of another dtype or on another device than the parameters: what no kernel of a whole layer serves.

        One parameter stands for all, and only where it can be told what its convolution will read: not where it is
        parametrized or sharded, or where a hook may exchange it.
        """
        checks.check_tensor("x", x)
        convolution: Any = self._modules["Wv"]
        weight = own_weight(convolution)
        if (
            type(weight) not in PLAIN_TENSORS
            or not runs_as(convolution, nn.Conv2d)
            or has_hooks(convolution)
        ):
            return
        check_not_freed("Wv.weight", weight)
        if x.device != weight.device:
            raise ValueError(
                f"x: got a tensor on {x.device}; allowed is {weight.device}, where the layer's parameters are. Move "
                "one of them"
            )
        if not fits_layer_dtype(weight, x):
            raise TypeError(
                f"x: got dtype {x.dtype}; allowed is {weight.dtype}, as the layer's parameters have. Convert one of "
                "them, or use torch.autocast, which casts all but float64"
            )

    def obstacles(self) -> tuple[str, ...]:
        """Why kernels may not do the work of the modules without calling them; empty where they may.

        A module with hooks or a forward of its own, or another convolution than the published one.
        """
        children: dict[str, Any] = (
            self._modules
        )  # not self.Wq and so on, which take ten times as long
        wq, wk, wv = children["Wq"], children["Wk"], children["Wv"]
        kind, found = type(self), []
        modules = (wk, wv) if wq is None else (wq, wk, wv)
        if not runs_as(wv, nn.Conv2d):
            found.append(f"Wv is a {type(wv).__name__} with a forward of its own")
        elif not is_plain_convolution(wv):
            found.append("Wv has a bias, or a convolution of its own")
        elif not (
            wv.kernel_size == (3, 3)
            and wv.stride == wv.dilation == (1, 1)
            and wv.padding == (1, 1)
            and wv.padding_mode == "zeros"
            and wv.groups == wv.in_channels == wv.out_channels
        ):
            found.append(
                "Wv is another convolution than a depthwise 3x3 with stride 1 and zeros for padding"
            )
        if not (self.is_filter(wk) and (wq is None or self.is_filter(wq))):
            found.append("Wq or Wk has a forward of its own, or is another convolution")
        if not (
            kind.query_key is QueryKeyValue.query_key
            and kind.key_value is QueryKeyValue.key_value
            and kind.query_key_value is QueryKeyValue.query_key_value
        ):
            found.append(f"{kind.__name__} makes query, key or value in a way of its own")
        if has_hooks(*modules):
            found.append("Wq, Wk or Wv has hooks, or all modules have")
        if "k_norm" in children:
            found.append("queries and keys are normalised (qk_norm), which the kernels do not know")
        return tuple(found)

    def own_filters(self) -> Filters | None:
        """The parameters as they are; None where reading one works it out anew, as a parametrization does.

        That may change state (a spectral norm's vectors) or draw random numbers: :meth:`filters` does it.
        """
        children: dict[str, Any] = self._modules
        query = children["Wq"]
        wq = None if query is None else own_weight(query)
        wk, wv = own_weight(children["Wk"]), own_weight(children["Wv"])
        if wk is None or wv is None or (wq is None and query is not None):
            return None
        return Filters(wq, wk, wv)

    def filters(self) -> Filters:
        """The parameters of query, key and value; `wq` is None where the layer has none."""
        query: Any = self._modules["Wq"]
        return Filters(None if query is None else query.weight, self.Wk.weight, self.Wv.weight)

    def shape_obstacles(self, filters: Filters) -> tuple[str, ...]:
        """A weight of another shape than the layer's is PyTorch's to serve or to refuse."""
        sizes = (1, 1, self.kernel_size)
        if (
            filters.wv.shape == (self.dim, 1, 3, 3)
            and filters.wk.shape == sizes
            and (filters.wq is None or filters.wq.shape == sizes)
        ):
            return ()
        return ("a weight has another shape than the layer was made with",)

    def __prepare_scriptable__(self) -> QueryKeyValue:
        raise NotImplementedError(
            f"torch.jit.script: got a {type(self).__name__} layer, which it cannot compile: {_EXPORT}"
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key `[B, C]`, from the spatial mean of `x`."""
        self.check_beside_parameters(x)
        q, k = self.filtered(pooled(x), self.Wq, self.Wk)
        return self._normed("q_norm", q), self._normed("k_norm", k)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Key `[B, C]` and value `[B, C, H, W]`."""
        self.check_beside_parameters(x)
        (k,) = self.filtered(pooled(x), self.Wk)
        return self._normed("k_norm", k), self.Wv(x)

    def _normed(self, name: str, row: Tensor) -> Tensor:
        """A query or key `[B, C]` by the norm of that name, head by head; as it is where there is none."""
        norm = own_child(self, name)
        if norm is None:
            return row
        # Autocast has cast the row, and not the norm's weight.
        wide = row.float() if may_be_cast(row) and is_autocast_on(row) else row
        normed: Tensor = norm(wide.unflatten(1, (self.heads, self.head_dim)))
        return normed.flatten(1).to(row.dtype)

    @staticmethod
    def is_filter(module: nn.Module) -> bool:
        """Whether a module is a filter over the channels that kernels know, and no more."""
        return runs_as(module, ChannelFilter)

    def filtered(self, y: Tensor, *filters: nn.Module) -> list[Tensor]:
        """What each filter makes of `[B, C]`, `[B, C]`."""
        windows = ChannelFilter.windows(y, self.kernel_size)
        return [w(windows) for w in filters]

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key `[B, C]`, value `[B, C, H, W]`."""
        return *self.query_key(x), self.Wv(x)

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, head_dim={self.head_dim}, kernel_size={self.kernel_size}"
        return sizes if own_child(self, "k_norm") is None else f"{sizes}, qk_norm=True"
