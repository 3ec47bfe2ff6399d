"""Published networks on the kernels of this package, with their weights: `convert`, and back."""

from ela_kernels.conversion.convert import convert, unconvert
from ela_kernels.conversion.report import ConversionReport

__all__ = ["ConversionReport", "convert", "unconvert"]
