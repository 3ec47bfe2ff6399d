"""Images of files, of whatever kind Pillow reads: as 8 bits of red, green and blue, or refused by name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ela_kernels.optional import optional

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Modes of one channel with more than 8 bits: Pillow's own conversion would cut their values off at 255.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ALLOWED = (
    "allowed are 8 bits a channel in any of Pillow's modes that it can make RGB, greys of 16 bits, and greys of floats "
    "from 0 to 1"
)
# Colours that are stored multiplied by alpha, and what Pillow divides them to.
_MULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# Tags of TIFF files: bits of a value, whether 0 is white, and what kind of numbers the values are.
_BITS, _PHOTOMETRIC, _SAMPLES = 258, 262, 339
_ZERO_IS_WHITE, _SIGNED = 0, 2


class UnreadableImageError(OSError):
    """A file of the data that Pillow cannot decode, or whose values have no known range; the message says which."""


class Decoder:
    """Decodes image files with Pillow, to 8 bits of red, green and blue.

    Greys of 16 bits, and of floats from 0 to 1, are rounded to 8 bits; other greys of more than 8 bits have no
    range that can be known, and are refused. Of an image with an alpha channel, or with transparent entries of its
    palette, the colours are taken as they are stored, whatever shines through. Orientations in EXIF data are not
    applied, and of several frames the first is taken.
    """

    def __init__(self) -> None:
        self._pillow = optional("PIL.Image", "reading image files")
        self._numpy = optional("numpy", "reading image files")

    def __reduce__(self) -> tuple[type[Decoder], tuple[()]]:
        # The libraries are modules, which cannot be sent to a worker process.
        return Decoder, ()

    def open(self, path: Path | str) -> Any:
        """The image as Pillow has it, of mode RGB.

        Raises:
            UnreadableImageError: the file is not there, damaged, or of a kind whose values have no known range.
        """
        try:
            with self._pillow.open(path) as opened:
                return self._rgb(opened)
        except (
            # Pillow raises all of these for damaged files, depending on the format.
            *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError),
            *(struct.error, zlib.error, self._pillow.DecompressionBombError),
        ) as error:
            raise UnreadableImageError(
                f"data-dir: {path} cannot be read as an image: {error}. Remove it, or save it anew"
            ) from error

    def as_tensor(self, image: Any) -> Tensor:
        """`[3, H, W]`, uint8, of one that :meth:`open` gave."""
        return torch.from_numpy(self._numpy.array(image)).permute(2, 0, 1)

    def _rgb(self, image: Any) -> Any:
        image.load()
        mode = image.mode
        if getattr(image, "tag_v2", {}).get(_SAMPLES, (1,))[0] == _SIGNED:
            raise ValueError(f"it has signed integers, whose range is not known; {_ALLOWED}")
        if mode in ("I", "F", *_SIXTEEN_BITS):
            return self._pillow.fromarray(self._eight_bits(image)).convert("RGB")
        # Pillow would warn of what it leaves out.
        image.info.pop("transparency", None)
        try:
            if mode in _MULTIPLIED:
                image = image.convert(_MULTIPLIED[mode])
            return image.convert("RGB")
        except ValueError as error:
            raise ValueError(
                f"Pillow's mode {mode} has no conversion to RGB; {_ALLOWED}"
            ) from error

    def _eight_bits(self, image: Any) -> Any:
        """Greys of more bits as an array of 8."""
        numpy, tags = self._numpy, getattr(image, "tag_v2", {})
        values = numpy.asarray(image)
        if image.mode == "F":
            least, most = 0.0, 1.0
        elif image.mode == "I" and image.format not in ("PNG", "PPM"):
            # Those two have 16 bits, which some releases of Pillow hold in 32.
            raise ValueError(f"it has integers of 32 bits, whose range is not known; {_ALLOWED}")
        else:
            bits = tags.get(_BITS, 16)
            least, most = 0.0, float(2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1)
        low, high = float(values.min()), float(values.max())
        # NaN is in no order, so that it is refused too.
        if not (least <= low and high <= most):
            raise ValueError(
                f"its values are from {low:g} to {high:g}; allowed are {least:g} to {most:g}"
            )
        scaled = values.astype(numpy.float64) * (255.0 / most)
        if tags.get(_PHOTOMETRIC) == _ZERO_IS_WHITE:
            # Pillow turns these over by itself with 8 bits only.
            scaled = 255.0 - scaled
        return numpy.rint(scaled).astype(numpy.uint8)
