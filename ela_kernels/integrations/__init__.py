"""Layer attention in networks of other libraries: `attach` for any of them, `timm` and `torchvision` for those."""

from ela_kernels.integrations.attach import attach, detach

__all__ = ["attach", "detach"]


def __dir__() -> list[str]:
    return sorted(__all__)
