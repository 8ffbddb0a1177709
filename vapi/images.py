"""Images: bytes to pixels, the crop, [-1, 1] and back, contact sheets, the seed of a drawn one.

Pixels are what a model is tuned on, so this file does what LlamaGen's own loader does and nothing
beside it: ``convert("RGB")``, ADM's centre crop, ``(x / 255 - 0.5) / 0.5``. Left out on purpose:
EXIF rotation and compositing of transparency, which upstream does not do either. What differs is
the care for files nobody has looked at: the header is checked before anything is unpacked, 16-bit
grey is scaled where Pillow would clip it to white, and whatever is wrong with a file is one
ValueError in words. torch is imported by the two functions that need it.

Shapes: B or N images, H height, W width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

# Pillow would also try EPS (through Ghostscript), PSD, FITS ...; these are what image sets hold.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
MAX_PIXELS = 100_000_000
MAX_ASPECT = 50
"""Long side over short side, at most: scaled to a 256-pixel short side, a strip would fill the memory."""


# --- bytes -> pixels ---------------------------------------------------------------------------


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in ``data`` as 8-bit RGB; of an animation, the first frame.

    Raises ValueError that says why for anything that is no complete image of a usable shape. The
    size in the header is checked before pixels are unpacked. (Pillow's own guard stays on as well:
    it refuses images over 179 million pixels whatever ``max_pixels`` says.)
    """
    return unpack(inspect(data, max_pixels))


def unpack(image: Image.Image) -> Image.Image:
    """The pixels of an inspected image, as 8-bit RGB."""
    try:
        image.load()
        return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a decoder fed with foreign bytes raises anything: zlib.error, struct.error, IndexError ...
        raise ValueError(f"cannot be decoded: {_words(error)}") from error


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read (``.size``, ``.mode``, ``.format``) and no pixel unpacked."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not an image (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000 are read)") from None
    except Exception as error:  # as above
        raise ValueError(f"cannot be opened: {_words(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} would unpack to {width * height:,} pixels; at most {max_pixels:,} are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} is a strip, not a picture; sides may differ {MAX_ASPECT}-fold at most")
    return image


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_TO_8_BITS = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)  # 65535 -> 255, rounded


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(_TO_8_BITS[np.asarray(image)]).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32 bits per pixel) has no fixed range; store 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as the direct way, without Pillow's warning
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest centred square of an RGB image at ``size`` pixels: uint8 (size, size, 3).

    ADM's crop, as LlamaGen was trained with: halve by box averages while the short side is at least
    twice ``size``, bicubic to a short side of ``size``, cut out the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


# --- uint8 <-> [-1, 1] -------------------------------------------------------------------------


def to_float(images: np.ndarray | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """uint8 (H, W, 3) or (B, H, W, 3) array, or (B, 3, H, W) tensor -> float32 (B, 3, H, W) in [-1, 1].

    In torchvision's order of operations (ToTensor, Normalize), so that the floats are upstream's to the bit: on any
    ``device``, which gets the bytes (a quarter of the floats) and the 256 values that a CPU has computed.
    """
    import torch

    if isinstance(images, np.ndarray):
        batch = torch.from_numpy(np.ascontiguousarray(images if images.ndim == 4 else images[None]))
        images = _sent(batch, device).permute(0, 3, 1, 2).contiguous()
    else:
        images = _sent(images, device)
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3, (images.dtype, images.shape)
    levels = torch.arange(256, dtype=torch.float32).div(255).sub_(0.5).div_(0.5)
    return _sent(levels, images.device)[images.int()]


def _sent(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """On the device; to a GPU through pinned memory, so that the copy waits neither for us nor for the work before it."""
    import torch

    if device is None or torch.device(device).type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float (B, 3, H, W) around [-1, 1] -> uint8 (B, 3, H, W), by LlamaGen's rule: 127.5 x + 128, clamped, truncated."""
    import torch

    return images.float().mul(127.5).add_(128).clamp_(0, 255).to(torch.uint8)


# --- randomness ----------------------------------------------------------------------------------


# --- sheets ------------------------------------------------------------------------------------


TILE = 96  # about the side of a picture on a sheet, in pixels
CAPTION = 14  # the height of a caption


def tile_scale(side: int) -> int:
    """By how much a picture of ``side`` pixels is drawn larger on a sheet: small ones by a whole factor, large ones not at all."""
    return max(1, TILE // side)


def sheet(images: np.ndarray, columns: int, scale: int = 1, captions: Sequence[str] | None = None, gap: int = 2) -> Image.Image:
    """A contact sheet, row by row: uint8 (N, H, W, 3), each pixel drawn ``scale`` times as large,
    each caption (as much of it as fits) under its image."""
    assert images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0, (images.dtype, images.shape)
    count, height, width = images.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    text = CAPTION if captions is not None else 0
    step_x, step_y = width * scale + gap, height * scale + gap + text
    canvas = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for n, pixels in enumerate(images):
        x, y = gap + n % columns * step_x, gap + n // columns * step_y
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(tile, (x, y))
        if captions is not None:
            draw.text((x, y + height * scale + 1), _fit(captions[n], font, width * scale), fill="#333333", font=font)
    return canvas


def sheet_height(count: int, columns: int, side: int, captions: bool = False, gap: int = 2) -> int:
    """Pixels from top to bottom of a contact sheet of square images at that scale."""
    return -(-count // min(columns, count)) * (side * tile_scale(side) + gap + CAPTION * captions) + gap


def cut(sheet: np.ndarray, count: int, columns: int, side: int, captions: bool = False, gap: int = 2) -> np.ndarray:
    """The square images, uint8 (N, side, side, 3), that a contact sheet, uint8 (H, W, 3), of that scale was made of, pixel for pixel.

    Raises ValueError for a sheet of another shape.
    """
    scale, columns = tile_scale(side), min(columns, count)
    step_x, step_y = side * scale + gap, side * scale + gap + CAPTION * captions
    height, width = sheet_height(count, columns, side, captions, gap), columns * step_x + gap
    if sheet.shape[0] != height or sheet.shape[1] < width:
        raise ValueError(f"a sheet of {count} pictures has {width} x {height} pixels, and this {sheet.shape[1]} x {sheet.shape[0]}")
    corners = [(gap + n // columns * step_y, gap + n % columns * step_x) for n in range(count)]
    return np.stack([sheet[y : y + side * scale : scale, x : x + side * scale : scale] for y, x in corners])


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = " ".join(text.split())[:200]
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG file as text for ``<img src=...>``, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
