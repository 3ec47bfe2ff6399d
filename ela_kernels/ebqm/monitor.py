"""EBQM: watch the layers' divergence in training, and skip those that retrieve what the layer before did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ela_kernels.ebqm.decision import Candidate, Reason, Verdict, decide
from ela_kernels.ebqm.diagnostics import Diagnostics, diagnosed, mean_weights, take_weights
from ela_kernels.ebqm.history import thinned
from ela_kernels.ebqm.prune import prune
from ela_kernels.ebqm.report import DecisionRecord, LayerReport, Report
from ela_kernels.ebqm.settings import Settings, checked_settings, refuse_removed
from ela_kernels.ebqm.stages import device_of, run_order, stage_numbers
from ela_kernels.ebqm.state import State, loaded, rearranged, saved
from ela_kernels.ebqm.statistics import Moments, Statistics
from ela_kernels.ebqm.watch import Watch
from ela_kernels.modules.observations import STATIC_GRAPH
from ela_kernels.modules.skipping import SkipMode, mode_number
from ela_kernels.modules.watched import Watched


class EBQM:
    """Enhanced Beta Quantile Mapping: find redundant layers while the model trains, skip them, and let them come back.

    The published abstract names the method and what it is for, and gives no formula; this is our definition. For every
    :class:`ela_kernels.ELA` layer or :class:`ela_kernels.AttentionResidual` t, by itself:

    1. `z = 1 - exp(-kl_t)` for every image and head (or position) of a training pass, in [0, 1): near zero exactly when
       layer t retrieves with the weights of the layer before it, and bounded, so that no head outweighs all others;
    2. the mean of z and of its square are smoothed by an exponential moving average over steps, bias-corrected: two
       numbers a layer, which need no list of what was seen;
    3. Beta(a, b), the usual distribution on [0, 1], is fitted to them by the method of moments
       (:func:`ela_kernels.ebqm.fit_beta`);
    4. the score is its quantile at `quantile`. At 0.9: nine of ten retrievals differ from the one before by less. A
       mean would let a layer go that repeats most of the time and is needed for the rest;
    5. a layer is dropped at `score < low` and comes back at `score > high`, both absolute, so that neither how many
       other layers there are nor what they do changes anything; the distance between the two keeps noise from dropping
       a layer and taking it back in turn;
    6. within the guards `max_share`, `max_row`, `warmup`, `interval`; the first layer of a stage is never skipped, nor
       one whose divergence was never seen or not finite. Where the first two bind, the smallest scores go first
       (:func:`ela_kernels.ebqm.decide`);
    7. a skipped layer is probed every `probe_interval` steps: its weights are worked out from query and key alone, or
       by a retrieval that is dropped where the values are the keys, as those of an `AttentionResidual` are.

    What it does not say: a small divergence says that a layer retrieves what the layer before did, not that its block
    can be left out, and no claim is made that these layers are better ones to skip than as many drawn by chance. The
    score grows when all divergences of a layer grow by as much (up to a score of 0.59 at the default quantile: computed
    over all moments), and, for divergences of usual shape, when all are multiplied. It falls when the smallest of them
    alone grow, which makes the distribution narrower; and the fit is one of two moments, no count: a layer of which
    less than a tenth of the retrievals are wholly new, and the rest exact repeats, has a score of 0.

    Only training passes count: in train mode and with gradients. Statistics stay on the device and come to the host
    at a decision only. Under `torch.distributed` they are averaged there over the processes, so that all decide alike;
    every process must then call :meth:`step` as often. `DistributedDataParallel` needs no option for it
    (`static_graph=True` is refused). A skipped layer's query, say, gets no gradient, or one of zeros: under that
    wrapper, in compiled graphs, and with `zero_grad(set_to_none=False)`. An optimizer goes on moving it then by
    momentum and weight decay, unless :func:`ela_kernels.ebqm.spare_skipped` tells it not to.

    Decisions are in the layers' buffers `decision`, so that moving averages, broadcasts and checkpoints of the model
    carry them. In a compiled graph (`torch.compile`) they are data: none costs a compilation, and a skipped retrieval
    is worked out, seen at every step, and discarded, its parameters with gradients of zero; it saves time only once
    :func:`ela_kernels.prune` has made it permanent.

    Layers that are exchanged, added or removed are noticed at the next :meth:`step`; new ones start without statistics.
    Two EBQM on one model both see all of it, and both decide: a warning says so.

    :meth:`report` also has the entropy of each layer's weights and the first-order importance of its block, both taken
    at decision points only (:class:`ela_kernels.ebqm.LayerReport`).

    The default thresholds are for a model with some tens of layers and thousands of steps.

    Args:
        model: a model with such layers, wrapped or not.
        low: a layer in use is dropped at a score below it; in [0, 1].
        high: a skipped layer comes back at a score above it; in [0, 1], larger than `low`.
        quantile: share of a layer's divergences that its score is above; between 0 and 1. The larger, the more of them
            have to be small.
        max_share: largest share of these layers that may be skipped, in [0, 1].
        max_row: how many skipped layers may stand in a row in a stage; at least 1.
        warmup: steps before the first decision.
        interval: steps between decisions.
        probe_interval: steps between probes of a skipped layer.
        smoothing: factor by which a step's weight in the average falls with every step after it; in [0, 1).
        skip: how skipped layers are skipped, `"retrieval"`, `"layer"` or `"reuse"`; None leaves it to each layer. An
            `AttentionResidual` knows `"reuse"` alone: it gives what was retrieved last before it in its history.
        provides: whether layers skipped with `"reuse"` still give their key and value; only with `skip`. None leaves it
            to each layer.
        process_group: processes to average over; the default group if None. Not kept in a pickle.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; one that EBQM had before, with what stands in its
            place.

    Source:
        The use of the adjacent layers' divergence and the method's name: ELA (arXiv 2503.06473). The formulas: ours.

    Example:
        >>> import torch, ela_kernels as ek
        >>> layers = torch.nn.ModuleList(ek.ELA(32) for _ in range(4))
        >>> ebqm = ek.EBQM(layers, warmup=1, interval=1)
        >>> x, history = torch.randn(2, 32, 8, 8), ek.LayerHistory()
        >>> for layer in layers:
        ...     x = layer(x, history)
        >>> x.sum().backward()
        >>> ebqm.step()  # after optimizer.step()
        >>> len(ebqm.report().layers)
        4
    """

    prune = staticmethod(prune)

    def __init__(
        self,
        model: nn.Module,
        *,
        low: float = 0.2,
        high: float = 0.3,
        quantile: float = 0.9,
        max_share: float = 0.5,
        max_row: int = 3,
        warmup: int = 1000,
        interval: int = 100,
        probe_interval: int = 20,
        smoothing: float = 0.98,
        skip: SkipMode | None = None,
        provides: bool | None = None,
        process_group: Any = None,
        **removed: NoReturn,
    ) -> None:
        refuse_removed(removed, Settings._fields)
        self.settings = checked_settings(
            Settings(
                low=low,
                high=high,
                quantile=quantile,
                max_share=max_share,
                max_row=max_row,
                warmup=warmup,
                interval=interval,
                probe_interval=probe_interval,
                smoothing=smoothing,
            )
        )
        if skip is not None:
            mode_number(skip, provides)
        elif provides is not None:
            raise ValueError(
                f"provides: got {provides} without skip; allowed is None, which leaves both to each layer"
            )
        self._watch = Watch(model)
        if skip is not None:
            for layer in self._layers:
                layer.number_of(skip, provides)
        wrappers = (
            m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)
        )
        if any(wrapper.static_graph for wrapper in wrappers):
            raise ValueError(STATIC_GRAPH)
        self.process_group = process_group
        self.steps = 0
        count, device = len(self._layers), device_of(self._layers)
        self._statistics = Statistics(count, self.settings.smoothing, device)
        self._reasons = [Reason.UNDECIDED] * count
        self._since = [0] * count
        self._decisions: list[DecisionRecord] = []
        self._diagnostics = Diagnostics.none(count)
        self._weights: list[tuple[float, ...]] = [()] * count
        for layer in self._layers:
            if skip is not None:
                layer.skip = skip
                if provides is not None:
                    layer.provides = provides
        self._watch.attach()
        self._mark_weights()

    @property
    def model(self) -> nn.Module:
        """The model that is watched."""
        return self._watch.model

    @property
    def _layers(self) -> list[Watched]:
        return self._watch.layers

    def step(self, applied: bool = True) -> None:
        """Take in the step that was trained; decide when a decision is due. Call it once after `optimizer.step()`.

        Args:
            applied: False for a step that the optimizer did not take, as `torch.amp.GradScaler` leaves out one whose
                gradients are not finite: what was seen in it is dropped. With `scale = scaler.get_scale()` before
                `scaler.update()` it is `scaler.get_scale() >= scale`.
        """
        self._follow_model()
        self.steps += 1
        seen = self._watch.take()
        divergences: list[list[Tensor]] = [[] for _ in seen]
        totals: dict[int, Tensor] = {}
        if applied:
            divergences = [s.divergences for s in seen]
            totals = {i: t for i, s in enumerate(seen) for t in s.totals}
        self._statistics.update(divergences, totals)
        if self.settings.decides_at(self.steps):
            self.synchronize()
            self._diagnose(applied)
            self._decide()
        self._mark_next()

    def synchronize(self) -> None:
        """Average the statistics over the processes, on all of them. Decisions do it by themselves.

        Call it on every process before the first one saves :meth:`state_dict`, so that what is saved stands for all.
        """
        self._statistics.average_over_processes(self.process_group, device_of(self._layers))

    def report(self) -> Report:
        """What is known and decided now, layer by layer, and the decisions so far. Waits for the device."""
        stages = stage_numbers(self._layers)
        seen, unseen = self._statistics.read(), Moments(math.nan, math.nan)
        rows = []
        for i, (name, layer) in enumerate(zip(self._watch.names, self._layers, strict=True)):
            now = seen[i] or unseen
            rows.append(
                LayerReport(
                    name=name,
                    stage=None if layer.place is None else stages[i],
                    place=layer.place,
                    divergence=now.mean,
                    deviation=now.deviation,
                    score=now.score(self.settings.quantile),
                    entropy=self._diagnostics.entropy[i],
                    importance=self._diagnostics.importance[i],
                    left_out=self._diagnostics.left_out[i],
                    skipped=layer.skipped,
                    reason=Reason.PRUNED if layer.pruned else self._reasons[i],
                    since=self._since[i],
                    over_time=[(d.step, d.divergence[i]) for d in self._decisions],
                    weights=self._weights[i],
                )
            )
        return Report(self.steps, rows, list(self._decisions), self.settings.as_dict())

    def state_dict(self) -> dict[str, Any]:
        """Statistics, decisions and settings, in tensors and plain Python; a run resumed from it decides the same.

        Save it with the model's state after :meth:`step`. With several processes call :meth:`synchronize` before.
        """
        state = State(
            self.steps,
            self._statistics.state.cpu().clone(),
            [layer.skipped for layer in self._layers],
            list(self._reasons),
            list(self._since),
            self._decisions,
            self._diagnostics,
        )
        return saved(state, self.settings, self._watch.names)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Go on where :meth:`state_dict` was taken. The layers' decisions are set too.

        The state of a version that compared the layers with each other is taken over in part, with a warning: steps and
        decisions are kept, so that the model goes on as it was; statistics start anew, since they lack the squares, and
        settings are the present ones. From the next decision point on the present rule holds.

        Args:
            state: what :meth:`state_dict` gave.
            strict: the settings must be those of the saved run; otherwise the present ones hold.

        Raises:
            TypeError, ValueError: not such a state, other layers, or (strict) other settings; nothing is changed then.
        """
        self._follow_model()
        found = loaded(state, self.settings, self._watch.names, self._layers, strict)
        self.steps = found.steps
        self._statistics.load(found.statistics, device_of(self._layers))
        self._reasons, self._since, self._decisions = found.reasons, found.since, found.decisions
        self._diagnostics = found.diagnostics
        self._weights = [()] * len(self._layers)
        for layer, skipped in zip(self._layers, found.skipped, strict=True):
            layer.skipped = skipped
        self._watch.take()
        take_weights(self._layers)
        self._mark_next()
        if found.is_partial:  # so that the next decision knows something of those that are skipped
            for layer in self._layers:
                layer.probe_next = not layer.pruned

    def detach(self) -> None:
        """Stop watching the model: its layers keep no divergences any more; decisions stay as they are."""
        self._watch.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch.attach()
        self._mark_next()

    def _follow_model(self) -> None:
        """Take note of layers that were exchanged, added or removed."""
        numbers = self._watch.follow_model()
        if numbers is None:
            return
        self._statistics.keep(numbers)
        self._reasons = [Reason.UNDECIDED if i is None else self._reasons[i] for i in numbers]
        self._since = [0 if i is None else self._since[i] for i in numbers]
        self._decisions = [rearranged(record, numbers) for record in self._decisions]
        self._diagnostics = self._diagnostics.keep(numbers)
        self._weights = [() if i is None else self._weights[i] for i in numbers]

    def _mark_next(self) -> None:
        """Have skipped layers looked at again in the next training pass, when it is time."""
        is_due = self.steps % self.settings.probe_interval == 0
        for layer in self._layers:
            due = is_due and not layer.pruned
            if layer.probe_next != due:
                # Past nn.Module, which looks for parameters and modules first.
                object.__setattr__(layer, "probe_next", due)
        self._mark_weights()

    def _mark_weights(self) -> None:
        """Have the layers keep their weights in the pass before a decision point."""
        due = self.settings.decides_at(self.steps + 1)
        for layer in self._layers:
            if layer.weights_next != due:
                object.__setattr__(layer, "weights_next", due)

    def _diagnose(self, applied: bool) -> None:
        weights = take_weights(self._layers)
        found = diagnosed(self._layers, weights) if applied else self._diagnostics
        if applied:
            self._weights = mean_weights(weights)
        # On every process, whatever it has seen: all have to meet.
        mine = torch.tensor(found, dtype=torch.float64, device="cpu")
        means = self._statistics.mean_over_processes(
            mine, self.process_group, device_of(self._layers)
        )
        self._diagnostics = Diagnostics(*means.tolist())

    def _decide(self) -> None:
        seen = self._statistics.read()
        self._statistics.forget_bad()
        scores = [None if m is None else m.score(self.settings.quantile) for m in seen]
        verdicts = self._verdicts(scores)
        for i, (layer, verdict) in enumerate(zip(self._layers, verdicts, strict=True)):
            if layer.skipped != verdict.skipped:
                layer.skipped = verdict.skipped
                self._since[i] = self.steps
        self._reasons = [verdict.reason for verdict in verdicts]
        record = DecisionRecord(
            self.steps,
            [math.nan if m is None else m.mean for m in seen],
            [math.nan if score is None else score for score in scores],
            [verdict.skipped for verdict in verdicts],
            list(self._reasons),
            list(self._diagnostics.left_out),
        )
        self._decisions = thinned([*self._decisions, record])

    def _verdicts(self, scores: list[float | None]) -> list[Verdict]:
        if self.steps < self.settings.warmup:
            return [Verdict(layer.skipped, Reason.WARMUP) for layer in self._layers]
        stages = stage_numbers(self._layers)
        order = run_order(self._layers, stages)
        candidates = [
            Candidate(
                stages[i],
                self._layers[i].is_first,
                self._layers[i].skipped,
                self._layers[i].pruned,
                scores[i],
            )
            for i in order
        ]
        verdicts = dict(zip(order, decide(candidates, self.settings.rules), strict=True))
        return [verdicts[i] for i in range(len(order))]
