"""One picture in whatever kind of file Pillow reads gives one image, or is refused by name."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ela_kernels.training.images import Decoder, UnreadableImageError

Image = pytest.importorskip("PIL.Image")
ImageCms = pytest.importorskip("PIL.ImageCms")

SIDE = 40
RAMP = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
EIGHT = np.rint(RAMP * 255).astype(np.uint8)
SIXTEEN = np.rint(RAMP * 65535).astype(np.uint16)


def read(path: Path) -> torch.Tensor:
    """Red, green and blue from 0 to 1."""
    decoder = Decoder()
    return decoder.as_tensor(decoder.open(path)).float() / 255


def grey(array: np.ndarray = EIGHT) -> Any:
    return Image.fromarray(array)


def transparent(mode: str) -> Any:
    image = grey().convert(mode)
    image.putalpha(Image.new("L", image.size, 10))
    return image


def lab() -> Any:
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.profileToProfile(grey().convert("RGB"), *profiles, outputMode="LAB")


def png16(channels: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write but for greys."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    pixels = np.stack([SIXTEEN] * channels, -1).astype(">u2")
    rows = b"".join(b"\x00" + row.tobytes() for row in pixels)

    def chunk(name: bytes, content: bytes) -> bytes:
        length, check = (
            struct.pack(">I", len(content)),
            struct.pack(">I", zlib.crc32(name + content)),
        )
        return length + name + content + check

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(pixels: bytes, bits: int, zero_is_white: bool = False, kind: int = 1) -> bytes:
    """A grey TIFF; `kind` is 1 for unsigned, 2 for signed integers and 3 for floats."""
    entries = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: 0 if zero_is_white else 1, 273: 0}
    entries |= {277: 1, 278: SIDE, 279: len(pixels), 339: kind}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    content = b"II*\x00" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries.items():
        content += struct.pack("<HHII", tag, 4, 1, value)
    return content + struct.pack("<I", 0) + pixels


def twelve_bits() -> bytes:
    pairs = np.rint(RAMP * 4095).astype(np.uint16).reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    return packed.astype(np.uint8).tobytes()


READ: dict[str, Any] = {
    "16.png": lambda: grey(SIXTEEN),
    "16.tif": lambda: grey(SIXTEEN),
    "16-big-endian.tif": lambda: grey(SIXTEEN.astype(">u2")),
    "16.ppm": lambda: grey(SIXTEEN.astype(np.int32)),
    "10-bits.ppm": lambda: b"P5\n40 40\n1023\n" + np.rint(RAMP * 1023).astype(">u2").tobytes(),
    "float.tif": lambda: grey(RAMP),
    "12-bits.tif": lambda: tiff(twelve_bits(), 12),
    "16-white.tif": lambda: tiff((65535 - SIXTEEN).astype("<u2").tobytes(), 16, zero_is_white=True),
    "8-white.tif": lambda: tiff((255 - EIGHT).tobytes(), 8, zero_is_white=True),
    "float-white.tif": lambda: tiff((1 - RAMP).tobytes(), 32, zero_is_white=True, kind=3),
    "rgb-16.png": lambda: png16(3),
    "la-16.png": lambda: png16(2),
    "rgba-16.png": lambda: png16(4),
    "rgb.png": lambda: grey().convert("RGB"),
    "la.png": lambda: transparent("LA"),
    "rgba.png": lambda: transparent("RGBA"),
    "rgba.tif": lambda: transparent("RGBA"),
    "pa.tif": lambda: transparent("RGBA").convert("PA"),
    "p.png": lambda: grey().convert("P"),
    "cmyk.tif": lambda: grey().convert("CMYK"),
    "cmyk.jpg": lambda: grey().convert("CMYK"),
    "ycbcr.tif": lambda: grey().convert("YCbCr"),
    "lab.tif": lab,
}


@pytest.mark.parametrize("name", READ)
def test_a_picture_is_read_alike(tmp_path: Path, name: str) -> None:
    content = READ[name]()
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    image = read(path)
    expected = torch.from_numpy(EIGHT).float() / 255
    # Rounded to 8 bits twice at most; a palette has fewer greys, and JPEG and other colour spaces round more coarsely.
    tolerance = 0.03 if name in ("pa.tif", "cmyk.jpg", "lab.tif", "ycbcr.tif") else 1.01 / 255
    assert (image - expected).abs().max() < tolerance
    assert (image.mean() - expected.mean()).abs() < 0.005


def test_black_and_white(tmp_path: Path) -> None:
    grey(np.where(RAMP > 0.25, 255, 0).astype(np.uint8)).convert("1").save(tmp_path / "1.png")
    image = read(tmp_path / "1.png")
    torch.testing.assert_close(image[0], (torch.from_numpy(RAMP) > 0.25).float())


def test_what_is_transparent_has_its_stored_colour_without_a_warning(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.png", "bytes.png", "grey.png", "rgb.png")]
    palette = grey().convert("P")
    palette.save(paths[0], transparency=3)
    palette.save(paths[1], transparency=bytes(range(200)))
    grey().save(paths[2], transparency=0)
    grey().convert("RGB").save(paths[3], transparency=(0, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = [read(path) for path in paths]
    for image in images:
        torch.testing.assert_close(image[0], torch.from_numpy(EIGHT) / 255, atol=1e-6, rtol=0)


NAN_RAMP = np.where(RAMP == 1, np.float32("nan"), RAMP)
REFUSED: dict[str, tuple[Any, str]] = {
    "bytes-as-floats.tif": (
        lambda: grey(RAMP * 255),
        "its values are from 0 to 255; allowed are 0 to 1",
    ),
    "negative.tif": (
        lambda: grey(RAMP - 0.5),
        "its values are from -0.5 to 0.5; allowed are 0 to 1",
    ),
    "nan.tif": (lambda: grey(NAN_RAMP), "its values are from nan to nan; allowed are 0 to 1"),
    "infinite.tif": (lambda: grey(RAMP * np.float32("inf")), "allowed are 0 to 1"),
    "32-signed.tif": (
        lambda: grey(SIXTEEN.astype(np.int32)),
        "signed integers, whose range is not known",
    ),
    "32.tif": (
        lambda: tiff(SIXTEEN.astype("<u4").tobytes(), 32),
        "32 bits, whose range is not known",
    ),
    "16-signed.tif": (lambda: tiff((SIXTEEN // 2).tobytes(), 16, kind=2), "signed integers"),
    "8-signed.tif": (lambda: tiff(EIGHT.tobytes(), 8, kind=2), "signed integers"),
    "64-floats.tif": (lambda: tiff(RAMP.astype("<f8").tobytes(), 64, kind=3), "cannot identify"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_values_without_a_known_range_are_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    path, content = tmp_path / name, make()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    with pytest.raises(
        UnreadableImageError, match=rf"^data-dir: .*{name} cannot be read .*{message}"
    ):
        read(path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_an_image_or_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    refused = 0
    for name in ("16.png", "float.tif", "p.png", "cmyk.jpg", "10-bits.ppm", "lab.tif"):
        path, content = tmp_path / name, READ[name]()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)
        whole = path.read_bytes()
        for _ in range(30):
            damaged = bytearray(whole)
            for _ in range(random.integers(1, 6)):
                damaged[random.integers(min(len(whole), 300))] = random.integers(256)
            path.write_bytes(damaged[: random.integers(len(whole) // 2, len(whole) + 1)])
            try:
                assert read(path).isfinite().all()
            except UnreadableImageError:
                refused += 1
    assert refused > 60
