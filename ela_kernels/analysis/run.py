"""Run a model on a few batches, and say what its layers retrieve and what EBQM would skip."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from torch import nn

from ela_kernels.analysis.batches import Forward, call, check_loader, device_of, moved
from ela_kernels.analysis.collect import Collector, Row
from ela_kernels.analysis.report import Analysis, LayerAnalysis
from ela_kernels.analysis.untouched import untouched
from ela_kernels.ebqm import EBQM, Candidate, Verdict, decide
from ela_kernels.ebqm.settings import REMOVED, Settings, checked_settings, refuse_removed
from ela_kernels.ebqm.stages import plain_name
from ela_kernels.ebqm.statistics import Moments, Statistics
from ela_kernels.modules import ELA, AttentionResidual, LayerAttention, LightLayerAttention
from ela_kernels.modules.published import ConcatLayerAttention
from ela_kernels.modules.watched import Watched
from ela_kernels.ops.layer_attention.observer import observed_by
from ela_kernels.torch_internals import is_lazy

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# They say when EBQM decides; here it decides once, after the batches.
_OF_STEPS = ("warmup", "interval", "probe_interval")
_LIGHT = "the light form: it lets the output before it decay, and has no weights over the layers"
_CONCATENATES = (
    "the concatenating form, which has no LayerHistory; ela_kernels.convert(model) fuses it"
)
_RESIDUAL = "it did not come by with a PositionHistory in these batches, or where it is not looked"
_UNSEEN = "it did not come by in these batches, or in a thread or a graph that is not looked into"


def analyze(
    model: nn.Module,
    loader: Iterable[Any],
    batches: int = 8,
    *,
    forward: Forward | None = None,
    training: bool | None = True,
    **settings: Any,
) -> Analysis:
    """Run a model on a few batches, and say for each layer what it retrieves and whether EBQM would skip it.

    Whatever retrieves from a :class:`ela_kernels.LayerHistory` that the model makes in its pass is seen:
    :class:`ela_kernels.LayerAttention` and its subclasses, :class:`ela_kernels.ELA`, and modules that call
    :meth:`ela_kernels.LayerHistory.attend` with themselves as `caller`. EBQM watches ELA layers; in a model without
    any, every layer is taken for one. So are :class:`ela_kernels.AttentionResidual` modules that are given a
    :class:`ela_kernels.PositionHistory`, each position of a sample in the place of a head.

    The batches run without gradients. Afterwards the model is what it was, also if one of them raises: attributes of
    its modules (modes, and what ELA layers have learnt), buffers, decisions, and what an EBQM has observed. So are the
    random numbers of PyTorch, Python and NumPy. What the loader has given is gone, if it can be read but once.

    Args:
        model: a model with such layers. One in `DistributedDataParallel` or `DataParallel` is run without that.
        loader: an iterable of batches. Of a tuple or list the first entry is the input; of a dict those entries that
            the model's `forward` has arguments for, or else one that is called inputs, images or the like. Tensors are
            moved to the model's device.
        batches: at most how many batches to run; at least 1.
        forward: calls the model, instead: `forward(model, batch)`, `batch` on the model's device.
        training: in training mode, as EBQM sees a model; False: in evaluation mode; None: as it is.
        **settings: of :class:`ela_kernels.EBQM`, for its decision after these batches, warm-up over: `low`, `high`,
            `quantile`, `max_share`, `max_row`, `smoothing`.

    Returns:
        An :class:`ela_kernels.analysis.Analysis`: data in `.layers` and `.to_dict()`, a table by `print`, a picture by
        `.plot(path)`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a batch that the model cannot be called with; no
            batch at all; a model none of whose layers can be seen.

    Source:
        Weights: MRLA (arXiv 2302.03985). Divergence: ELA (arXiv 2503.06473). Score and decision: as
        :class:`ela_kernels.EBQM`.

    Example:
        >>> import torch, ela_kernels as ek
        >>> model = ek.models.resnet20(attention="ela")
        >>> found = ek.analyze(model, [torch.randn(2, 3, 32, 32)])
        >>> found.layers[1].name, found.layers[1].place, len(found.layers[1].weights)
        ('attentions.0.1', 1, 2)
    """
    model = _checked_model(model)
    check_loader(loader)
    if isinstance(batches, bool) or not isinstance(batches, int):
        raise TypeError(f"batches: got {type(batches).__name__}; allowed is an int of at least 1")
    if batches < 1:
        raise ValueError(f"batches: got {batches}; allowed is an int of at least 1")
    if forward is not None and not callable(forward):
        raise TypeError(
            f"forward: got {type(forward).__name__}; allowed is a function of the model and a batch, or None"
        )
    if training is not None and not isinstance(training, bool):
        raise TypeError(f"training: got {type(training).__name__}; allowed is True, False or None")
    found_settings = _checked_settings(settings)
    collector, run = Collector(), call if forward is None else forward
    with untouched(model, training), observed_by(collector):
        for batch in islice(loader, batches):
            collector.begin()
            run(model, moved(batch, device_of(model)))
            if not collector.rows:
                raise ValueError(_nothing_seen(model))
        if not collector.batches:
            raise ValueError(
                "loader: got no batch; allowed is an iterable with at least one. An iterator is used up by the first "
                "reader: give the DataLoader or a list"
            )
        return _analysis(model, collector, found_settings)


def _checked_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module")
    inner: nn.Module = model
    while isinstance(inner, _WRAPPERS):
        inner = inner.module
    for name, parameter in inner.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(
                f"model: got the parameter {name} without numbers (lazy, or on the meta device); allowed are those "
                "with numbers. Load or initialise the model first"
            )
    return inner


def _checked_settings(given: dict[str, Any]) -> Settings:
    """EBQM's settings, its own where none are given."""
    allowed = [name for name in Settings._fields if name not in _OF_STEPS]
    refuse_removed({name: given[name] for name in given if name in REMOVED}, allowed)
    for name in given:
        if name not in allowed:
            raise TypeError(
                f"{name}: got an argument of this name; allowed are settings of EBQM that a decision depends on: "
                f"{', '.join(allowed)}"
            )
    defaults = inspect.signature(EBQM).parameters
    values = {name: given.get(name, defaults[name].default) for name in Settings._fields}
    return checked_settings(Settings(**values))


def _nothing_seen(model: nn.Module) -> str:
    why = "none of its modules retrieved from a LayerHistory or PositionHistory that it made in its pass"
    left = list(dict.fromkeys(_left_out(model, set()).values()))
    if left:
        why = "; ".join(left)
    advice = ""
    if any(_is_published(module) for module in model.modules()):
        advice = ". ela_kernels.convert(model) puts them in the place of those that it knows"
    elif not left:
        advice = (
            ". This one has no layer attention: ela_kernels.integrations.attach puts layers after the blocks of a "
            "network"
        )
    return (
        f"model: got {type(model).__name__}, in which no layer can be looked at ({why}); allowed is a model with "
        f"LayerAttention, ELA or AttentionResidual layers{advice}"
    )


def _is_published(module: nn.Module) -> bool:
    """Whether a module may be one that `ela_kernels.convert` knows, and is none of ours."""
    if isinstance(module, (LayerAttention, LightLayerAttention)):
        return False
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("Wq", "Wk", "Wv"))


def _names(model: nn.Module) -> dict[Any, str]:
    """Each module's name, without what wrappers add unless two would then be called the same."""
    names: dict[Any, str] = {}
    taken = set()
    for name, module in model.named_modules():
        plain = plain_name(name)
        names[module] = name if plain in taken else plain
        taken.add(names[module])
    return names


def _left_out(model: nn.Module, seen: set[Any]) -> dict[str, str]:
    """Layers of this package that were not seen, by name, and why."""
    left = {}
    layers = {m for m in model.modules() if isinstance(m, ELA)}
    inside = {part for m in layers for part in m.modules()} - layers
    # Those of a converted block stand beside it.
    inside |= {part for m in layers if m.lent and m.attn is not None for part in m.attn.modules()}
    for module, name in _names(model).items():
        if module in seen or module in inside:
            continue
        if isinstance(module, LightLayerAttention):
            left[name] = _LIGHT
        elif isinstance(module, ConcatLayerAttention):
            left[name] = _CONCATENATES
        elif isinstance(module, AttentionResidual):
            left[name] = _RESIDUAL
        elif isinstance(module, (LayerAttention, ELA)):
            left[name] = _UNSEEN
    return left


def _analysis(model: nn.Module, collector: Collector, settings: Settings) -> Analysis:
    rows = collector.rows
    watched = _watched(rows)
    statistics = Statistics(len(watched), settings.smoothing)
    for divergences in collector.batches:
        statistics.update([divergences.get(layer, ()) for layer in watched])
    seen = statistics.read()
    scores = [None if m is None else m.score(settings.quantile) for m in seen]
    verdicts = _verdicts(rows, watched, scores, settings)
    numbers = {layer: i for i, layer in enumerate(watched)}
    names = _names(model)
    found, unseen = [], Moments(math.nan, math.nan)
    for row in rows:
        i = numbers.get(row.layer)
        moments = unseen if i is None else seen[i] or unseen
        found.append(
            LayerAnalysis(
                name=names.get(row.layer, ""),
                layer=row.kind,
                stage=row.stage,
                place=row.place,
                retrieves=row.retrieves,
                weights=row.weights,
                samples=row.samples,
                kl=row.kl,
                divergence=moments.mean,
                deviation=moments.deviation,
                score=moments.score(settings.quantile),
                skipped=False if i is None else verdicts[i].skipped,
                reason=None if i is None else verdicts[i].reason,
            )
        )
    left = _left_out(model, {row.layer for row in rows})
    return Analysis(tuple(found), left, len(collector.batches), _used(settings))


def _used(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in settings.as_dict().items() if name not in _OF_STEPS}


def _watched(rows: Sequence[Row]) -> list[Any]:
    """The layers that EBQM decides about, in the order of the run: all where it watches none."""
    layers = list(dict.fromkeys(row.layer for row in rows if row.layer is not None))
    return [layer for layer in layers if isinstance(layer, Watched)] or layers


def _verdicts(
    rows: Sequence[Row],
    watched: Sequence[Any],
    scores: Sequence[float | None],
    settings: Settings,
) -> list[Verdict]:
    stages: dict[Any, int] = {}
    first = set()
    for row in rows:
        stages.setdefault(row.layer, row.stage)
        if row.place == 0:
            first.add(row.layer)
    return decide(
        [
            Candidate(
                stages[layer],
                layer in first,
                isinstance(layer, Watched) and layer.skipped,
                isinstance(layer, Watched) and layer.pruned,
                score,
            )
            for layer, score in zip(watched, scores, strict=True)
        ],
        settings.rules,
    )
