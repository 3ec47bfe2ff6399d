"""Make a model's own layer attention run on the kernels, in place, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, TypeGuard, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ela_kernels.conversion.blocks import BlockELA, FusedBlock, FusedELABlock, path_of
from ela_kernels.conversion.fused import (
    Fused,
    FusedDecay,
    FusedGate,
    FusedLayer,
    fuse,
    unfuse,
)
from ela_kernels.conversion.handshake import base_form, check_class, check_names
from ela_kernels.conversion.light_handshake import light_form
from ela_kernels.conversion.report import ConversionReport
from ela_kernels.conversion.tails import find_tail
from ela_kernels.conversion.trial import DisagreementError, isolated, parameter_names
from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.published import ConcatLayerAttention
from ela_kernels.modules.query_key_value import QueryKeyValue
from ela_kernels.modules.skipping import SkipMode, check_skip

M = TypeVar("M", bound=nn.Module)

_MARK = "_converted"


def convert(
    model: nn.Module,
    *,
    to: Literal["ela"] | None = None,
    skip: SkipMode = "reuse",
    strict: bool = False,
) -> ConversionReport:
    """Make the layer attention of a published network run on the kernels, in place; results stay what they were.

    A module with convolutions `Wq`, `Wk` and `Wv` is a candidate, whatever its class. A copy of it and our layer are
    run on small random maps in float64, and it is converted only where they agree; any other is left as it is, with
    the reason in the report. The very instances are rebound: parameters and their names, buffers, hooks, state_dict,
    mode, devices and dtypes stay, and so does what `isinstance` says of them. :func:`unconvert` undoes it.

    Known are the base form, `forward(x, keys, values) -> (out, keys, values)`, which begins a stage anew by itself or
    where it is given None; the light form, `forward(x)` within a module with `lambda_t` that is called with the output
    before, on maps or on tokens with a class token; and `ela_kernels.modules.ConcatLayerAttention`. What a converted
    layer hands on as keys and values are stand-ins for the stacked tensors: as soon as other code than the layers uses
    them they become those tensors, and the next layer goes on from what it is given. In compiled graphs and under
    `torch.func` the original code runs.

    Args:
        model: a model, or a layer.
        to: `"ela"` makes the retrieval of every converted residual block of the base form one that can be skipped: an
            :class:`ela_kernels.ELA`, its child `ela`, which :class:`ela_kernels.EBQM` watches and
            :func:`ela_kernels.prune` makes permanent. Its parts stay where they are, and what is added to the state
            dict is its decision.
        skip: skip mode of these.
        strict: raise where a candidate would be left; nothing is changed then.

    Returns:
        What was converted and what was left.

    Raises:
        TypeError: `model` is no module.
        ValueError: another `to` or `skip`; `strict`, and a candidate cannot be converted.

    Warns:
        UserWarning: the model has no candidate, or none that can be converted.

    Example:
        >>> import torch, ela_kernels as ek
        >>> model = torch.nn.ModuleList(ek.modules.ConcatLayerAttention(32) for _ in range(3))
        >>> print(ek.convert(model))
        3 converted, 0 left
        converted, 3: LayerAttention
            0, 1, 2
    """
    _check_module(model)
    if to not in (None, "ela"):
        raise ValueError(f"to: got {to!r}; allowed are 'ela' and None")
    check_skip(skip)
    # Of the other goal, to be converted anew; what can be skipped already keeps its decision.
    others = [m for m in model.modules() if to == "ela" and _cannot_be_skipped(m)]
    for module in others:
        unfuse(module)
    report = ConversionReport()
    plans: list[_Plan] = []
    names = dict(model.named_modules())
    with isolated():
        for name, module in names.items():
            if not _is_candidate(module):
                continue
            try:
                plan = _plan(name, module, names, skip if to == "ela" else None)
            except DisagreementError as why:
                report.left[name] = str(why)
            else:
                plans.append(plan)
                report.converted[name] = plan.what
    if strict and report.left:
        if others:
            convert(model)  # as it was
        raise ValueError(
            "model: got layers that cannot be converted; allowed with strict=True are none. Nothing was changed:\n"
            + str(ConversionReport({}, report.left))
        )
    for plan in plans:
        plan.carry_out()
    if not report.converted:
        warnings.warn(f"ela_kernels.convert changed nothing: {report}", stacklevel=2)
    return report


def unconvert(model: M) -> M:
    """Undo :func:`convert`: the modules that it changed, and no others, are again what they were.

    Args:
        model: a converted model.

    Returns:
        `model`.
    """
    _check_module(model)
    for module in model.modules():
        if isinstance(module, Fused):
            unfuse(module)
        elif type(module) is LayerAttention and getattr(module, _MARK, False):
            delattr(module, _MARK)
            module.__class__ = ConcatLayerAttention  # type: ignore[assignment]
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module")


def _is_candidate(module: nn.Module) -> bool:
    """Whether a module has the parameters of layer attention, and is not one of ours already."""
    if isinstance(module, QueryKeyValue):
        return isinstance(module, (ConcatLayerAttention, Fused)) or getattr(module, _MARK, False)
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("Wq", "Wk", "Wv"))


def _cannot_be_skipped(module: nn.Module) -> TypeGuard[Fused]:
    """Whether a module is of the base form, and was converted without `to="ela"`."""
    if isinstance(module, FusedBlock) and not isinstance(module, FusedELABlock):
        path = path_of(module)
        module = module if path is None else path[-1]
    return isinstance(module, FusedLayer) and not module.fused_form.carries


class _Plan:
    """What will be done to one candidate."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.steps: list[tuple[nn.Module, type[Fused], dict[str, object]]] = []
        self.own: nn.Module | None = None
        self.skip: SkipMode | None = None
        self.elas: list[BlockELA] = []  # that are there already

    def add_block(
        self,
        attention: str,
        dim: int,
        holds: bool,
        names: dict[str, nn.Module],
        fuse_copy: Callable[[nn.Module], None],
    ) -> None:
        """Convert the residual block around `attention` too, where it is one.

        `fuse_copy`: converts the attention, given a copy of it.
        """
        parts = attention.split(".")
        why = "no residual block is around it"
        for i in range(len(parts) - 1, -1, -1):
            name, inside = ".".join(parts[:i]), ".".join(parts[i:])
            block = names[name]
            if isinstance(block, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                break
            norms = (m for m in block.children() if isinstance(m, nn.BatchNorm2d))
            if isinstance(block, Fused) or not any(m.num_features == dim for m in norms):
                continue
            try:
                if is_parametrized(block):
                    raise DisagreementError("the block has a parametrization of its own")
                mixin = FusedBlock if self.skip is None else FusedELABlock
                check_names(block, mixin)
                check_class(block, mixin)
                if self.skip is not None and hasattr(block, "ela"):
                    raise DisagreementError("it has ela of its own, a name that ours needs")
                tail = find_tail(block, inside, dim, holds, fuse_copy)
            except DisagreementError as error:
                why = str(error)
            else:
                self.steps.append((block, mixin, {"fused_tail": tail}))
                self.what += ", with the residual block"
                if self.skip is not None:
                    self.what += ", as ELA"
                return
        self.what += f"; not the block: {why}"

    def carry_out(self) -> None:
        for ela in self.elas:
            if self.skip is not None:
                ela.skip = self.skip
        for module, mixin, kept in self.steps:
            fuse(module, mixin, **kept, what=self.what)
            if isinstance(module, FusedELABlock):
                assert self.skip is not None
                module.ela = BlockELA(module, self.skip)
                module.ela.to(next(module.parameters()).device)
                module.ela.train(module.training)
        if self.own is not None:
            self.own.__class__ = LayerAttention
            setattr(self.own, _MARK, True)


def _plan(
    name: str, module: nn.Module, names: dict[str, nn.Module], skip: SkipMode | None
) -> _Plan:
    """How a candidate is converted; `skip`: the skip mode of an ELA, or None for none.

    Raises:
        DisagreementError: it is not.
    """
    if isinstance(module, QueryKeyValue):
        if isinstance(module, Fused):
            plan = _Plan(module.fused_what)
            elas = (m for m in names.values() if isinstance(m, BlockELA))
            plan.elas = [ela for ela in elas if ela.is_around(module)]
            plan.skip = skip
            return plan
        plan = _Plan("LayerAttention")
        if type(module) is ConcatLayerAttention:
            plan.own = module
        elif isinstance(module, ConcatLayerAttention):
            raise DisagreementError("it has a forward of its own around ConcatLayerAttention's")
        return plan
    if is_parametrized(module):
        raise DisagreementError(
            "it has a parametrization of its own; those of Wq, Wk and Wv may stay"
        )
    if len(parameter_names(module)) == 1:
        return _light_plan(name, module, names)
    form = base_form(module)._replace(carries=skip is not None)
    plan = _Plan(f"base form, {form.dim // form.head_dim} heads of {form.head_dim}")
    plan.steps.append((module, FusedLayer, {"fused_form": form}))
    plan.skip = skip
    plan.add_block(
        name, form.dim, True, names, lambda copy: fuse(copy, FusedLayer, fused_form=form)
    )
    return plan


def _light_plan(name: str, module: nn.Module, names: dict[str, nn.Module]) -> _Plan:
    around, _, child = name.rpartition(".")
    if not name:
        raise DisagreementError("it gives the gated value alone, and nothing is around it")
    parent = names[around]
    if is_parametrized(parent):
        raise DisagreementError("the module around it has a parametrization of its own")
    found = light_form(parent, child)
    plan = _Plan(found.what)
    plan.steps.append((module, FusedGate, {"fused_form": found.form}))
    plan.steps.append((parent, found.around, found.kept))
    if found.around is FusedDecay:  # a block around tokens ends in a sum alone
        plan.add_block(around, found.form.dim, False, names, found.carry_out)
    return plan
