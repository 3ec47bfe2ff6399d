"""What the operators of a whole layer take, as their schemas name it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.layout import dense
from ela_kernels.backends.types import RESIDUAL, Epilogue, NormAct

# Counted up when the schemas, or what the backward works out, become others: PyTorch keeps compiled graphs on disk, by
# the forward that was traced, and would go on with a backward of before.
FORMULA = 2

CALL_SCHEMA = (
    "Tensor x, Tensor wq, Tensor wk, Tensor wv, Tensor[] keys, Tensor[] values, Tensor? prev_weights, Tensor? gamma, "
    "Tensor? beta, Tensor? norm_statistics, Tensor? mask, Tensor? token, Tensor? active, Tensor? kept, "
    "Tensor? kept_statistics, Tensor? kept_exists, int heads, float scale, float tolerance, "
    "str epilogue, float eps, bool relu, str backend, int formula"
)
LEFT_SCHEMA = (
    "Tensor query, Tensor mean, Tensor weights, Tensor? retrieved, Tensor? statistics, Tensor? dout, Tensor? dweights, "
    "Tensor? dkl, Tensor? dkey, Tensor? dvalue, Tensor? dretrieved, Tensor[] queries, Tensor[] weights_after, "
    "Tensor[] dscores_after, Tensor[] douts_after, Tensor[] active_after, "
    "float[] tolerances_after, bool[] needs, bool[] need_keys, bool[] need_values"
)


class Call(NamedTuple):
    """What both operators begin with.

    Attributes:
        keys, values: of the layers before; in the backward with the layer's own.
        norm_statistics: `[2, C]` to norm with, None for those of the batch.
        token: of the layer before, None for the first one that knows of no other.
        active: whether the layer retrieves, where that is data: a boolean of no dimension. Where it is false, the key
            and value are given all the same, and the block is that around `kept`, or `x` itself.
        kept: with `active`, what the last layer before this one retrieved; None where none has.
        kept_statistics: mean and variance `[2, C]` of it, where a norm has taken them.
        kept_exists: whether any layer has retrieved, where that is data.
        tolerance: retrievals of a smaller weight are left out.
        epilogue: "none", "residual" or "norm".
        backend: whose kernels, as it was found when the graph was traced.
        formula: :data:`FORMULA`, of this package.
    """

    x: Tensor
    wq: Tensor
    wk: Tensor
    wv: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    prev_weights: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    norm_statistics: Tensor | None
    mask: Tensor | None
    token: Tensor | None
    active: Tensor | None
    kept: Tensor | None
    kept_statistics: Tensor | None
    kept_exists: Tensor | None
    heads: int
    scale: float
    tolerance: float
    epilogue: str
    eps: float
    relu: bool
    backend: str
    formula: int = FORMULA

    def kernels(self) -> KernelBackend:
        """The backend that the graph was made for.

        Raises:
            RuntimeError: it cannot serve here: a graph that was stored, and runs where the extension is missing.
        """
        backend = KERNELS[self.backend]
        reason = backend.unavailable_reason()
        if reason is not None:
            raise RuntimeError(
                f"torch.ops.ela_kernels.layer: got a graph that was compiled for backend {self.backend!r}, which is "
                f"not available here ({reason}); compile it again here, or under use_backend('eager')"
            )
        return backend

    def ending(self) -> Epilogue | None:
        """What follows the retrieval."""
        if self.epilogue == "norm":
            return NormAct(
                self.gamma, self.beta, dense(self.norm_statistics), self.mask, self.eps, self.relu
            )
        return RESIDUAL if self.epilogue == "residual" else None

    def retrieves(self) -> bool:
        """Asked when the graph runs."""
        return self.active is None or bool(self.active)

    def takes_over(self) -> bool:
        """Whether a layer that does not retrieve has an earlier retrieval to take. Asked when the graph runs."""
        return self.kept is not None and (self.kept_exists is None or bool(self.kept_exists))


class Left(NamedTuple):
    """What the backward takes after a :class:`Call`: what the forward left, what arrives, and what is wanted.

    Attributes:
        queries, weights_after, dscores_after, douts_after, active_after, tolerances_after: of the layers that retrieved
            this one's pair, one each; an empty tensor where a layer's retrieval got no gradient, or always retrieves.
        needs: as of `LayerNeeds`, and of `kept`.
        need_keys, need_values: of the pairs before, which are gathered here; empty where others gather them.
    """

    query: Tensor
    mean: Tensor
    weights: Tensor
    retrieved: Tensor | None
    statistics: Tensor | None
    dout: Tensor | None
    dweights: Tensor | None
    dkl: Tensor | None
    dkey: Tensor | None
    dvalue: Tensor | None
    dretrieved: Tensor | None
    queries: list[Tensor]
    weights_after: list[Tensor]
    dscores_after: list[Tensor]
    douts_after: list[Tensor]
    active_after: list[Tensor]
    tolerances_after: list[float]
    needs: list[bool]
    need_keys: list[bool]
    need_values: list[bool]

    def is_reached(self) -> bool:
        """Whether a gradient arrives that goes on to the pairs that the layer retrieved from."""
        arrived = (self.dout, self.dweights, self.dkl, self.dretrieved)
        return any(gradient is not None for gradient in arrived)
