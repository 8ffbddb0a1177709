"""Features of a stream of images (or whatever else is said about them), drawn only where they are not known yet.

What is kept are rows of numbers, never images: parts of one batch each, in a folder of
``.vapi/evaluate`` whose name is a digest of everything that made them. A killed run finds its parts
and goes on; a second run that wants the same images waits for the first and finds them all. Processes that
work together take batches in turn, and what each has found the others read: a batch is the same whoever
draws it, and so is the order in which batches are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vapi import data, images
from vapi.launch import ALONE, World
from vapi.metrics.features import Extractor
from vapi.metrics.fid import Features

Make = Callable[[Sequence[int]], tuple[Tensor, Tensor]]  # image numbers -> images as Judge.pixels gives them, labels (B,)
Look = Callable[[Tensor, Tensor, Sequence[int]], dict[str, Tensor]]  # these, and the numbers again -> a row for each image


@runtime_checkable
class Streaming(Protocol):
    """A ``Make`` that can work ahead."""

    def __call__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    def stream(self, ranges: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]: ...


KEEP_BYTES = 32 << 30  # 50,000 images in Inception's features are 1 GB
KEEP_SECONDS = 24 * 3600  # what was used more recently is never thrown away: somebody may be at it


@contextlib.contextmanager
def thread_per_batch(device: torch.device) -> Iterator[int]:
    """How many batches to work on at a time: on a CPU as many as it has cores, with one thread each.

    Small networks gain little from sharing one matrix product, and so the bits do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Judge:
    """The networks that look at images, and how images are brought before them."""

    extractor: Extractor
    key: dict[str, Any]  # what features depend on besides the images
    images_per_batch: int
    resize: int = 0  # side; 0: as they come
    workers: int = 1  # batches at a time
    world: World = ALONE

    def pixels(self, decoded: Tensor) -> Tensor:
        """Decoded images (B, 3, H, W) around [-1, 1] as the uint8 that is judged, by LlamaGen's rule."""
        if self.resize and decoded.shape[-1] != self.resize:
            decoded = F.interpolate(decoded, size=(self.resize, self.resize), mode="bicubic")
        return images.to_uint8(decoded)

    def features(self, made_from: dict[str, Any], count: int, make: Make, title: str) -> Features:
        """Features of images 0 .. count - 1 of a stream that ``made_from`` identifies. All processes must call it; all get them."""
        kept = self.kept(made_from, count, make, lambda pixels, labels, _: self.extractor(pixels, labels).tensors(), title)
        return Features.of(kept)

    def kept(self, made_from: dict[str, Any], count: int, make: Make, look: Look, title: str) -> dict[str, Tensor]:
        """What ``look`` says about images 0 .. count - 1 of that stream, a row for each. All processes must call it; all get it."""
        batch = min(self.images_per_batch, count)  # part of the name: the last bits of a matrix product depend on it
        folder = data.state_dir("evaluate", _digest({**self.key, **made_from, "batch": batch}))
        with self.world.first_enters(data.locked(folder / "lock")):
            paths = {start: folder / f"{start:09d}.safetensors" for start in range(0, count, batch)}
            missing = self.world.once(lambda: [start for start, path in paths.items() if not path.exists()])
            mine = missing[self.world.rank :: self.world.size]
            with self._bar(count, len(missing) * batch, title) as bar:
                for start, part in zip(mine, self._looks(make, look, mine, batch), strict=True):
                    _store(part, paths[start])
                    bar.update(min(batch * self.world.size, count - bar.n))
            self._require_all(folder, paths.values())
            parts = [load_file(path) for path in paths.values()]
            os.utime(folder)
        found = {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}
        if any(len(rows) < count for rows in found.values()):
            raise ValueError(f"{title}: fewer images than the {count} that were asked for; delete {folder} and run again")
        return found

    def _require_all(self, folder: Path, paths: Iterable[Path]) -> None:
        """Wait until all are written. Raises ValueError where some process does not see what the others wrote."""
        self.world.gather(None)
        os.listdir(folder)  # a network disk may remember that they were not there
        if self.world.any(not all(path.exists() for path in paths)):
            raise ValueError(f"processes do not see each other's files in {folder}; put DVC_ROOT on a disk that all machines share")

    def _bar(self, count: int, missing: int, title: str) -> tqdm[Any]:
        quiet = None if self.world.first else True
        return tqdm(total=count, initial=max(0, count - missing), desc=title, unit="image", leave=False, disable=quiet)

    def _looks(self, make: Make, look: Look, starts: Sequence[int], batch: int) -> Iterator[dict[str, Tensor]]:
        """Batches in order, several at a time, or one made while another is looked at, where that helps."""
        ranges = [range(start, start + batch) for start in starts]
        if self.workers > 1:
            return data.parallel(lambda numbers: look(*make(numbers), numbers), ranges, self.workers)
        made = make.stream(ranges) if isinstance(make, Streaming) else map(make, ranges)
        return (look(*images, numbers) for images, numbers in zip(made, ranges))


def stored(pixels: Tensor, labels: Tensor) -> Make:
    """A stream of images that are at hand."""
    return lambda numbers: (pixels[numbers[0] : numbers[-1] + 1], labels[numbers[0] : numbers[-1] + 1])


def _store(part: dict[str, Tensor], path: Path) -> None:
    tensors = {name: rows.contiguous() for name, rows in part.items()}
    temporary = path.with_suffix(".partial")
    try:
        save_file(tensors, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error}; the features before it are safe. {data.AGAIN}") from error


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def prune() -> None:
    """Throw away the features that went unused longest, down to ``KEEP_BYTES``."""
    folders = [path for path in data.state_dir("evaluate").iterdir() if path.is_dir()]
    # whole files only: what another evaluation is writing may be gone before it is measured
    sizes = {folder: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders}
    total = sum(sizes.values())
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        if total <= KEEP_BYTES or time.time() - folder.stat().st_mtime < KEEP_SECONDS:
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= sizes[folder]
