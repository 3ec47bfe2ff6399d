"""From what was seen of the layers to their scores: the Beta map, with layers in it of which nothing was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ela_kernels.ebqm.beta import BetaFit, fit_beta, retention
from ela_kernels.ebqm.settings import Settings


class Mapped(NamedTuple):
    """The fit (None where nothing was seen), and of each layer its place in it and its retention score, or NaN."""

    fit: BetaFit | None
    fitted: list[float]
    scores: list[float]


def map_scores(seen: Sequence[float | None], settings: Settings) -> Mapped:
    """Fit the layers' divergences, and map each; those of None or NaN are left out of the fit."""
    known = {i: x for i, x in enumerate(seen) if x is not None and math.isfinite(x)}
    fitted, scores = [math.nan] * len(seen), [math.nan] * len(seen)
    if not known:
        return Mapped(None, fitted, scores)
    values = list(known.values())
    fit = fit_beta(values, settings.prior_count, settings.prior_concentration)
    for i, (u, r) in zip(known, retention(values, fit, settings.reference), strict=True):
        fitted[i], scores[i] = u, r
    return Mapped(fit, fitted, scores)
