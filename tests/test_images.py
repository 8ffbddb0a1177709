"""Pixels as upstream sees them, whatever kind of file they come from."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vapi import images


def picture(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(x * 7 + y * 3) % 256, (x * y) % 256, (x * x // 5 + y * 11) % 256], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a lot."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "size", "sha256", "first", "last"),
    [  # what LlamaGen's own center_crop_arr gives for picture(width, height)
        (40, 36, 32, "4e27a79fab1d6f8a", [16, 0, 1], [106, 92, 141]),
        (100, 37, 16, "1753cee37beaa32a", [233, 22, 222], [61, 74, 130]),
        (33, 200, 32, "43418c3c41741eb1", [245, 2, 151], [58, 111, 194]),
        (640, 480, 64, "04556fa2bde377d3", [43, 119, 125], [182, 134, 125]),
        (20, 20, 32, "d1346f481eabbec5", [0, 0, 0], [191, 107, 27]),
    ],
)
def test_center_crop_is_upstreams(width: int, height: int, size: int, sha256: str, first: list[int], last: list[int]) -> None:
    crop = images.center_crop(Image.fromarray(picture(width, height)), size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    assert crop[0, 0].tolist() == first and crop[-1, -1].tolist() == last
    assert hashlib.sha256(crop.tobytes()).hexdigest()[:16] == sha256


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (50, 1), (3, 149), (17, 16)])
def test_odd_sizes_crop_to_a_square(width: int, height: int) -> None:
    assert images.center_crop(images.decode(encoded(Image.fromarray(picture(width, height)))), 16).shape == (16, 16, 3)


def test_floats_are_torchvisions_and_come_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    floats = images.to_float(levels)
    assert floats.shape == (1, 3, 16, 16) and floats.min() == -1 and floats.max() == 1
    assert torch.equal(floats[0, 0].flatten(), (torch.arange(256) / 255 - 0.5) / 0.5)
    assert torch.equal(images.to_float(torch.from_numpy(levels).permute(0, 3, 1, 2)), floats)
    assert torch.equal(images.to_float(levels[0]), floats)
    back = images.to_uint8(floats)
    assert np.array_equal(back.permute(0, 2, 3, 1).numpy(), levels)
    assert images.to_uint8(torch.full((1, 3, 1, 1), 9.0)).max() == 255 and images.to_uint8(torch.full((1, 3, 1, 1), -9.0)).min() == 0


def test_modes_become_rgb() -> None:
    rgb = Image.fromarray(picture(24, 20))
    for mode in ("L", "1", "P", "RGBA", "LA"):
        made = images.decode(encoded(rgb.convert(mode)))
        assert made.mode == "RGB" and made.size == (24, 20)
        assert np.array_equal(np.asarray(made), np.asarray(rgb.convert(mode).convert("RGB"))), mode
    cmyk = images.decode(encoded(rgb.convert("CMYK"), "JPEG", quality=95))
    grey = images.decode(encoded(Image.new("L", (24, 20), 200).convert("CMYK"), "JPEG", quality=95))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(grey).astype(int) - 200).max() < 6


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_format_that_is_named_is_read(kind: str) -> None:
    rgb = Image.fromarray(picture(32, 32))
    data = encoded(rgb.quantize(16) if kind == "GIF" else rgb, kind)
    assert images.inspect(data).format == kind and images.decode(data).size == (32, 32)


def test_transparent_palettes_keep_their_colours() -> None:
    image = Image.fromarray(picture(24, 20)).quantize(8)
    data = encoded(image, transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    assert np.array_equal(np.asarray(images.decode(data)), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 24 * 20).astype(np.uint16).reshape(20, 24)
    for kind in ("PNG", "TIFF"):
        made = np.asarray(images.decode(encoded(Image.fromarray(ramp), kind)))
        assert np.abs(made[..., 0].astype(int) - np.round(ramp / 257)).max() <= 1 and made.max() == 255


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"just some words, in a file called cat.png", "not an image"),
        (b"", "not an image"),
        (encoded(Image.fromarray(picture(64, 64)), "JPEG")[:-300], "truncated"),
        (encoded(Image.fromarray(picture(64, 64)))[:900], "cannot be decoded"),
        (encoded(Image.fromarray(picture(64, 64)), "BMP")[:900], "truncated"),
        (bomb(12_000, 12_000), "would unpack to 144,000,000 pixels"),
        (bomb(60_000, 60_000), "decompression bomb"),
        (bomb(10, 501), "is a strip"),
        (encoded(Image.fromarray(np.ones((20, 24), np.float32)), "TIFF"), "no fixed range"),
    ],
    ids=["text", "empty", "jpeg", "png", "bmp", "large", "huge", "strip", "float"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_is_an_error_in_words(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        images.decode(data)


def test_sheet_places_images_row_by_row() -> None:
    colours = np.zeros((5, 4, 4, 3), np.uint8)
    colours[:, :, :, 0] = np.arange(5)[:, None, None] * 50
    sheet = np.asarray(images.sheet(colours, columns=3, scale=2, gap=1))
    assert sheet.shape == (2 * 9 + 1, 3 * 9 + 1, 3)
    assert [int(sheet[1 + 9 * (n // 3) + 4, 1 + 9 * (n % 3) + 4, 0]) for n in range(5)] == [0, 50, 100, 150, 200]
    assert sheet[0, 0].tolist() == [255, 255, 255]
    captioned = images.sheet(colours, columns=3, scale=2, gap=1, captions=["a very long caption\nof two lines"] * 5)
    assert captioned.height > sheet.shape[0]
    png = images.png_bytes(captioned)
    assert png == images.png_bytes(captioned) and images.data_uri(png).startswith("data:image/png;base64,iVBOR")
