"""What evaluation compares with, and what it asks for: real images, with what each of them shows.

A reference is a Parquet file, a folder as ``subset`` reads it, or what OpenAI published for ADM's evaluation. A model
of classes is asked for classes in turn; a model of captions for the captions of the very images that its samples are
compared with, so that nothing but the model makes a difference.

N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vapi import data, images, metrics, sources
from vapi.config import EvaluateConfig, SubsetConfig
from vapi.metrics import fid, published
from vapi.models import Policy
from vapi.models.sampler import image_seed

VALIDATION_IMAGES = 5000  # of a larger folder: as many as the papers' recipes sweep with, 2 GB at 384 pixels


@dataclass(frozen=True)
class RealImages:
    """Images and what they show."""

    pixels: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # (N,) class ids; of captions: the place of the image's own
    captions: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Subjects:
    """What image n of a seed is to show, as a label: a class, or the place of a caption."""

    classes: int
    captions: Sequence[str] = ()
    how: str = "balanced"

    def label(self, seed: int, number: int) -> int:
        """In turn, or (random) a draw that hangs on the image alone and on none of its codes' draws."""
        count = len(self.captions) or self.classes
        if self.how == "balanced":
            return number % count
        return int(np.random.default_rng([image_seed(seed, 0), number]).integers(count))

    def condition(self, policy: Policy, labels: Tensor) -> Tensor:
        """What ``policy.generate`` takes."""
        return policy.condition([self.captions[n] for n in labels.tolist()] if self.captions else labels)

    @property
    def key(self) -> str:
        """Names them, for what is kept of their samples."""
        digest = data.short_digest("\0".join(self.captions)) if self.captions else ""
        return f"{self.how} {digest}".strip()


def real_images(path: str, what: str, size: int, classes: int) -> RealImages:
    """A set of real images with labels in 0 .. classes - 1, or (``classes`` 0) captions. Raises ValueError where they do not
    fit the model."""
    pixels, labels, captions = _folder(path, what, size, classes) if Path(path).is_dir() else _file(path)
    require_fit(pixels, path, what, size)
    if classes == 0:
        _require_captions(captions, path, what)
        labels = np.arange(len(captions))
    elif labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.min()} .. {labels.max()}"
        raise ValueError(f"evaluate.{what} {path} has labels {found}, but the model draws classes 0 .. {classes - 1}")
    return RealImages(_channels_first(pixels), torch.from_numpy(labels), captions if classes == 0 else ())


def reference(evaluate: EvaluateConfig, size: int, classes: int) -> tuple[RealImages, dict[str, fid.Moments]]:
    """What samples are compared with, and moments that somebody published of more images."""
    path = Path(evaluate.reference)
    if path.suffix != published.SUFFIX:
        return real_images(evaluate.reference, "reference", size, classes), {}
    if evaluate.extractor != "inception":
        raise ValueError(f"evaluate.reference {path} holds moments of Inception's features; set evaluate.extractor to inception")
    if classes == 0:
        raise ValueError(f"evaluate.reference {path} holds no captions to draw from; give Parquet or a folder of images with captions")
    pixels = published.images(path)
    require_fit(pixels, path, "reference", size)
    return RealImages(_channels_first(pixels), torch.full((len(pixels),), -1)), published.moments(path)


def require_fit(pixels: np.ndarray, path: str | Path, what: str, size: int) -> None:
    """Raises ValueError for images (N, H, W, 3) of another size, and for too few."""
    height, width = pixels.shape[1:3]
    if (height, width) != (size, size):
        raise ValueError(f"evaluate.{what} {path} holds images of {width} x {height} pixels, but {size} x {size} are compared")
    if len(pixels) < metrics.MIN_IMAGES:
        raise ValueError(f"evaluate.{what} {path} holds {len(pixels)} images; precision and recall need at least {metrics.MIN_IMAGES}")


def _require_captions(captions: Sequence[str], path: str, what: str) -> None:
    without = sum(not caption.strip() for caption in captions)
    if without:
        raise ValueError(
            f"evaluate.{what} {path}: {without} of {len(captions)} images have no caption (column caption), which the model draws from"
        )


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _file(path: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    pixels, labels, captions = data.read_images(Path(path))
    # files are often ordered by class: shuffled once, any first n of them are a fair draw
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels[order], labels[order], [captions[n] for n in order]


def _folder(path: str, what: str, size: int, classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    try:
        return cropped(path, size, classes, VALIDATION_IMAGES if what == "validation" else 0)
    except ValueError as error:
        raise ValueError(f"evaluate.{what}: {error}") from error


def cropped(path: str, size: int, classes: int, limit: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images of a folder that ``subset`` could read (class folders, Parquet files, tars), cropped as the model's training
    images were; at most ``limit`` of them (0: all), shuffled, so that any first n are a fair draw."""
    source = sources.open_source(SubsetConfig(source=path, classes=classes))
    entries = sorted(source.entries(), key=lambda entry: entry.key)
    chosen = [entries[n] for n in np.random.default_rng(0).permutation(len(entries))[: limit or None]]
    places = {entry.key: n for n, entry in enumerate(chosen)}
    pixels = np.empty((len(chosen), size, size, 3), np.uint8)

    def crop(item: tuple[sources.Entry, bytes | str]) -> None:
        entry, read = item
        if isinstance(read, str):
            raise ValueError(f"{path}: {entry.key}: {read}")
        try:
            pixels[places[entry.key]] = images.center_crop(images.decode(read), size)
        except ValueError as error:
            raise ValueError(f"{path}: {entry.key} {error}") from None

    for _ in data.parallel(crop, source.read(chosen), data.cores()):
        pass
    return pixels, np.array([entry.label for entry in chosen], dtype=np.int64), [entry.caption or "" for entry in chosen]
