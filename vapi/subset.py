"""Pick images from a source, prove that they can be used, and keep their bytes as they came.

Which images are picked hangs on the seed and on each image's key, never on the order in which a
file system lists them: every entry gets the hash of (seed, key), each class queues up by it, and the
classes take turns. So any first n images of a subset are balanced too, and a larger subset with the
same seed begins with the smaller one. Images of a cluster (a row group on a hub) queue up together, by
the hash of (seed, cluster).

Only what is picked is opened. An image that cannot be decoded, that has no caption where there should be
one, or whose bytes were picked already under another key, is quarantined with the reason and the next in
its queue takes its place; nothing is ever replaced by a black image or an empty caption. Left out:
resizing and re-encoding. Pixels are the tokenizer's business, and other stages may want another size.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pandas as pd
from tqdm import tqdm

from vapi import data, images, listing, quality, sources
from vapi.config import SubsetConfig, write_text
from vapi.run import NO_RUN, Run
from vapi.sources import Entry, Source

SAMPLES = 48
"""Images on the quality page."""


def subset(subset: SubsetConfig, out: Path, run: Run = NO_RUN) -> None:
    """The stage. Writes images-*.parquet, manifest.parquet, quality.json, quality.html, quarantine.csv.

    Raises ValueError, with nothing written, if the source does not hold what was asked for, if too much
    of it is unreadable, or if what was picked does not pass validation (the rows are named).
    """
    started = time.perf_counter()
    with data.output_folder(out, "subset") as folder:
        with sources.still_there(subset):
            source = sources.open_source(subset)
            commit = sources.commit(source)
            digest = data.text_digest(listing.listing(source))
            queues = _queues(source.entries(), subset)
        with (folder / "spool").open("w+b") as spool:
            picked = _Picker(source, subset, spool).pick(queues)
            data.write_subset(folder, picked.rows(spool), subset.images_per_shard)
        (folder / "spool").unlink()
        summary = _report(folder, picked.rejected, subset)
        data.describe(folder, "subset", {"subset": subset}, {"source": digest}, time.perf_counter() - started, **commit)
    run.dataset(Path(subset.source).name, data.file_digest(Path(out) / "manifest.parquet"), subset.source)
    for name, value in commit.items():
        run.tag(f"subset.{name}", value)
    run.metrics({f"subset/{name}": float(summary[name]) for name in ("images", "quarantined", "unreadable")})
    run.artifact(Path(out) / "quality.html")
    print(f"{summary['images']:,} images, {summary['quarantined']:,} quarantined -> {out}")


# --- the order of picking ----------------------------------------------------------------------


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _turn(seed: int, entry: Entry) -> bytes:
    """What an image's place in its queue goes by."""
    return (_draw(seed, entry.cluster) if entry.cluster else b"") + _draw(seed, entry.key)


def _queues(entries: Sequence[Entry], config: SubsetConfig) -> list[list[Entry]]:
    """One queue per class, in the order in which the classes take turns; or a single queue.

    Raises ValueError if the source cannot hold what was asked for, before an image is opened.
    """
    if not entries:
        raise ValueError(f"{config.source} holds no images")
    if config.images > len(entries):
        raise ValueError(f"subset.images is {config.images}, and {config.source} holds {len(entries)}; ask for fewer, or 0 for all")
    _require_labels(entries, config)
    by_turn = sorted(entries, key=lambda entry: _turn(config.seed, entry))
    if config.classes == 0 or config.balance == "random":
        return [by_turn]
    queues: list[list[Entry]] = [[] for _ in range(config.classes)]
    for entry in by_turn:
        queues[entry.label].append(entry)
    turns = sorted(range(config.classes), key=lambda label: _draw(config.seed, f"class {label}"))
    _require_classes({label: len(queues[label]) for label in turns}, config)
    return [queues[label] for label in turns]


def _require_labels(entries: Sequence[Entry], config: SubsetConfig) -> None:
    wrong = [entry for entry in entries if config.classes and not 0 <= entry.label < config.classes]
    if wrong:
        named = "; ".join(f"{entry.key}: {entry.label}" for entry in wrong[: quality.SHOWN])
        raise ValueError(f"{len(wrong)} labels lie outside of 0 .. {config.classes - 1} (subset.classes is {config.classes}): {named}")


def _require_classes(counts: dict[int, int], config: SubsetConfig) -> None:
    empty = [label for label, count in sorted(counts.items()) if count == 0]
    if empty:
        named = ", ".join(map(str, empty[: quality.SHOWN]))
        raise ValueError(f"{config.source} holds no images of class {named}; subset.balance random does without")
    each, over = divmod(config.images, config.classes)
    for turn, (label, count) in enumerate(counts.items()):
        need = each + (turn < over)
        if count < need:
            enough = min(counts.values()) * config.classes
            raise ValueError(
                f"subset.images is {config.images}, that is {need} of class {label}, which has {count}; "
                f"ask for at most {enough}, or set subset.balance random"
            )


# --- picking -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A readable image, its bytes waiting in the spool."""

    width: int
    height: int
    mode: str
    sha256: str
    size: int
    caption: str | None  # None: there should be one
    offset: int = 0


@dataclass
class Picked:
    """The images in the order they were picked in, and what was passed over: (key, reason, readable)."""

    images: list[tuple[Entry, Found]] = field(default_factory=list)
    rejected: list[tuple[str, str, bool]] = field(default_factory=list)
    unknown: list[Entry] = field(default_factory=list)  # picked, but not looked at yet

    def rows(self, spool: BinaryIO) -> Iterator[data.Row]:
        for entry, found in self.images:
            spool.seek(found.offset)
            yield data.Row(
                key=entry.key,
                label=entry.label,
                caption=cast(str, found.caption),
                width=found.width,
                height=found.height,
                mode=found.mode,
                data=spool.read(found.size),
                sha256=found.sha256,
            )


class _Picker:
    """Sources are fast in their own order and slow at random, so images are not read one by one as the
    turns come: assume that all are fine, read what the turns would take, and go through the turns again
    with what was learnt until nothing new is needed. The result is the one-by-one result."""

    def __init__(self, source: Source, config: SubsetConfig, spool: BinaryIO) -> None:
        self.source, self.config, self.spool = source, config, spool
        self.known: dict[str, Found | str] = {}  # key -> what was found, or why not

    def pick(self, queues: Sequence[Sequence[Entry]]) -> Picked:
        while True:
            picked = self._turns(queues)
            if not picked.unknown:
                return picked
            self._examine(picked.unknown)
            self._require_readable()

    def _turns(self, queues: Sequence[Sequence[Entry]]) -> Picked:
        """Let the queues take turns until enough is picked, or all is (images: 0)."""
        picked, seen = Picked(), dict[str, Entry]()
        waiting = [iter(queue) for queue in queues]
        wanted, count = self.config.images or None, 0
        while waiting and count != wanted:
            for queue in list(waiting):
                entry = self._next(queue, picked, seen)
                if entry is not None:
                    count += 1
                elif wanted is None:
                    waiting.remove(queue)
                else:
                    raise ValueError(self._too_few(queues, picked))
                if count == wanted:
                    break
        if not picked.images and not picked.unknown:
            raise ValueError(f"no image of {self.config.source} can be used: {_named(picked.rejected)}")
        return picked

    def _next(self, queue: Iterator[Entry], picked: Picked, seen: dict[str, Entry]) -> Entry | None:
        for entry in queue:
            found = self.known.get(entry.key)
            if (found.caption if isinstance(found, Found) else entry.caption) is None:
                picked.rejected.append((entry.key, f"no caption (no text under {self.config.caption_column!r})", True))
                continue
            if found is None:
                picked.unknown.append(entry)
                return entry
            if isinstance(found, str):
                picked.rejected.append((entry.key, found, False))
                continue
            first = seen.setdefault(found.sha256, entry)
            if first is entry:
                picked.images.append((entry, found))
                return entry
            differs = "" if first.label == entry.label else f", which has label {first.label} instead of {entry.label}"
            picked.rejected.append((entry.key, f"duplicate of {first.key}{differs}", True))
        return None

    def _too_few(self, queues: Sequence[Sequence[Entry]], picked: Picked) -> str:
        of = "of every class " if len(queues) > 1 else ""
        return (
            f"subset.images is {self.config.images}, and {self.config.source} does not hold that many {of}which can be used; "
            f"ask for fewer. Passed over: {_named(picked.rejected)}"
        )

    def _examine(self, entries: Sequence[Entry]) -> None:
        groups, cores = self.source.groups(entries), len(os.sched_getaffinity(0))
        self.spool.seek(0, os.SEEK_END)
        with tqdm(desc="subset", total=len(entries), unit="image", disable=None) as bar:
            for looked in data.parallel(self._look, groups, cores, 2 * cores):
                for entry, payload, found in looked:
                    if isinstance(found, Found):
                        found = dataclasses.replace(found, offset=self.spool.tell())
                        self.spool.write(payload)
                    self.known[entry.key] = found
                bar.update(len(looked))

    def _look(self, group: list[Entry]) -> list[tuple[Entry, bytes, Found | str]]:
        """Read and decode a group, in a thread of its own."""
        looked: list[tuple[Entry, bytes, Found | str]] = []
        with sources.still_there(self.config):
            for entry, payload in self.source.read(group):
                found = payload if isinstance(payload, str) else self._inspect(payload, entry.caption)
                looked.append((entry, b"" if isinstance(found, str) else cast(bytes, payload), found))
        return looked

    def _inspect(self, payload: bytes, caption: str | None) -> Found | str:
        """What an image is, decoded to the last pixel, or why it is none."""
        try:
            image = images.inspect(payload, self.config.max_pixels)
            images.unpack(image)
        except ValueError as error:
            return str(error)
        return Found(*image.size, image.mode, hashlib.sha256(payload).hexdigest(), len(payload), caption)

    def _require_readable(self) -> None:
        bad = [(key, found, False) for key, found in sorted(self.known.items()) if isinstance(found, str)]
        if len(bad) > self.config.max_unreadable * len(self.known):
            raise ValueError(
                f"{len(bad)} of {len(self.known)} examined images are unreadable, more than subset.max_unreadable "
                f"{self.config.max_unreadable:g} allows: {_named(bad)}"
            )


def _named(rejected: Sequence[tuple[str, str, bool]]) -> str:
    named = "; ".join(f"{key}: {reason}" for key, reason, _ in rejected[: quality.SHOWN])
    return named + (f"; and {len(rejected) - quality.SHOWN} more" if len(rejected) > quality.SHOWN else "")


# --- what is said about them -------------------------------------------------------------------


def _report(folder: Path, rejected: Sequence[tuple[str, str, bool]], config: SubsetConfig) -> dict[str, int]:
    manifest = pd.read_parquet(folder / "manifest.parquet")
    checks = quality.validate(manifest, rejected, config)
    quality.require(checks)
    summary = quality.report(manifest, rejected, checks, config)
    data.write_json(folder / "quality.json", summary)
    title = f"{Path(config.source).name}: {len(manifest):,} images"
    write_text(folder / "quality.html", quality.page(title, summary, rejected, _samples(folder, config)))
    with (folder / "quarantine.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("key", "reason"), *((key, reason) for key, reason, _ in rejected)])
    return summary


def _samples(folder: Path, config: SubsetConfig) -> list[tuple[str, np.ndarray]]:
    picked = data.read_subset(folder)
    samples = []
    for i in range(min(SAMPLES, len(picked))):
        image = images.decode(picked.image(i), config.max_pixels)
        words = picked.captions[i] or (f"class {picked.labels[i]}" if config.classes else picked.keys[i])
        samples.append((words, images.center_crop(image, min(96, *image.size))))
    return samples
