"""EBQM, Enhanced Beta Quantile Mapping: which layers retrieve something new, and which can be skipped."""

from ela_kernels.ebqm.beta import BetaFit, fit_beta, score
from ela_kernels.ebqm.decision import Candidate, Reason, Rules, Verdict, decide
from ela_kernels.ebqm.monitor import EBQM
from ela_kernels.ebqm.optimizers import idle_parameters, spare_skipped
from ela_kernels.ebqm.prune import prune
from ela_kernels.ebqm.report import DecisionRecord, LayerReport, Report

__all__ = [
    "EBQM",
    "BetaFit",
    "Candidate",
    "DecisionRecord",
    "LayerReport",
    "Reason",
    "Report",
    "Rules",
    "Verdict",
    "decide",
    "fit_beta",
    "idle_parameters",
    "prune",
    "score",
    "spare_skipped",
]


def __dir__() -> list[str]:
    return sorted(__all__)
