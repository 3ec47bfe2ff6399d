"""What the layers of a model retrieve on some batches, and which of them EBQM would skip."""

from ela_kernels.analysis.report import Analysis, LayerAnalysis
from ela_kernels.analysis.run import analyze

__all__ = ["Analysis", "LayerAnalysis", "analyze"]


def __dir__() -> list[str]:
    return sorted(__all__)
