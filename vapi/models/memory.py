"""How much memory sampling takes, by arithmetic, and so how many images go together.

Left out: trying sizes until one breaks. It takes minutes, leaves fragments, and finds another number every time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from vapi.models.vq import VQConfig

MOST_IMAGES = 256  # beyond, a step's time grows with the batch: nothing is gained
SHARE = 0.8  # of what is free: libraries' workspaces and fragments take the rest
DECODE_SHARE = 0.1
CPU_BYTES = 4 << 30  # on a CPU, whatever the machine: results are to be the same on the next one
CPU_DECODE_BYTES = 2 << 30
FULL_SIZE_MAPS = 6  # feature maps at full resolution that the decoder holds at a time: input, norm, activation, output, workspace


@dataclass(frozen=True)
class Footprint:
    """Bytes that sampling takes."""

    weights: int  # once
    image: int  # for every image of a batch: cache, logits and what choosing from them takes
    decoded: int  # for every image being decoded


class Sizes(Protocol):
    """Of a generator."""

    @property
    def dim(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def codes(self) -> int: ...
    @property
    def prefix(self) -> int:
        """Positions of a condition; of one that varies, how many are reckoned with."""


def footprint(generator: Sizes, weights: int, tokenizer: VQConfig, dtype: torch.dtype, guided: bool) -> Footprint:
    """Of a generator with that many ``weights`` (copied if they are to be of another type than float32)."""
    size = dtype.itemsize
    row = 2 * generator.layers * generator.dim * (generator.prefix + generator.codes - 1) * size + generator.vocab * 4
    choosing = generator.vocab * 8 * 4  # float64: probabilities, their sums, and room to order them
    pixels = generator.codes * tokenizer.factor**2
    decoded = FULL_SIZE_MAPS * tokenizer.channels * tokenizer.multipliers[0] * pixels * 4
    return Footprint(weights * size if dtype != torch.float32 else 0, row * (2 if guided else 1) + choosing, decoded)


def free_bytes(device: torch.device) -> int:
    """What may be taken on ``device``: on a GPU what no one has, and what torch keeps for later use."""
    if device.type != "cuda":
        return CPU_BYTES
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def images_per_batch(need: Footprint, device: torch.device) -> int:
    """How many images to sample at a time: a power of two, so that a little memory more or less does not change results'
    last bits. Raises ValueError where not even one fits."""
    free = free_bytes(device)
    room = (SHARE - DECODE_SHARE) * free - (need.weights if device.type == "cuda" else 0)
    if room < need.image:
        raise ValueError(
            f"{free / 2**30:.1f} GiB are free on {device}, too few to sample: weights take {need.weights / 2**30:.1f} GiB, one image "
            f"{need.image / 2**30:.2f}; free the device, or use model.precision bfloat16"
        )
    return min(MOST_IMAGES, 1 << (int(room // need.image).bit_length() - 1))


def images_per_decode(need: Footprint, device: torch.device) -> int:
    """How many images to decode at a time: of a fixed share of the device, since results' last bits depend on it."""
    share = DECODE_SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else CPU_DECODE_BYTES
    return max(1, int(share // need.decoded))


@contextlib.contextmanager
def advice(images: int, need: Footprint, device: torch.device) -> Iterator[None]:
    """Turn an allocator's error while sampling ``images`` at a time into words: which knob, and what would probably fit."""
    free = free_bytes(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(images, need, free)) from error


def out_of_memory(images: int, need: Footprint, free: int) -> str:
    """The words. ``free`` is what there was before the batch that failed."""
    fits = int(max(0, SHARE * free - need.weights) // need.image)
    fits = max(1, min(fits, images // 2))
    return (
        f"out of memory while sampling {images} images at a time, {need.image / 2**20:.0f} MiB each; evaluate.images_per_batch {fits} "
        "would probably fit, and 0 chooses from what is free. Guidance 1 halves what an image takes, and so does model.precision bfloat16"
    )
