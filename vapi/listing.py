"""What a source of images consists of, as text that changes when it does.

It stands for the source wherever the bytes are too many to hash: DVC depends on it, and a step on a cluster
names its result after it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from vapi import data, hub, sources
from vapi.config import SubsetConfig, write_text
from vapi.sources import Source, Where

HASHED_BELOW = 256 * 2**20
"""A source of fewer bytes is listed with the hash of each file, a larger one with the time of its last change."""
STATS = 500
"""Files whose size and time a thread asks for at one go."""


def listing(source: Source) -> str:
    """The files of a source as JSON, a line each: name, bytes, and sha256, or for a large source (hashing 150 GB
    takes longer than tuning) the time of the last change in nanoseconds. Of one on a hub: what the hub says of its files."""
    lines: list[str] = []
    total = 0
    with tqdm(desc="listing", unit="file", delay=1, disable=None) as bar:
        for some, size in data.parallel(_described, _chunks(source.files(), STATS), sources.LISTERS):
            lines += some
            total += size
            bar.update(len(some))
    if total < HASHED_BELOW:
        lines, _ = _described(source.files(), hashed=True)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _described(files: Iterable[tuple[str, Where]], hashed: bool = False) -> tuple[list[str], int]:
    """Lines of some files, and their bytes together."""
    lines, total = [], 0
    for name, file in files:
        size, mark = _mark(file, hashed)
        lines.append(_line(name, size, **mark))
        total += size
    return lines, total


def _mark(file: Where, hashed: bool) -> tuple[int, dict[str, str | int]]:
    """A file's bytes, and what changes when it does."""
    if isinstance(file, hub.File):
        return file.size, {"digest": file.digest}
    stat = file.stat()
    return stat.st_size, {"sha256": data.file_digest(file)} if hashed else {"changed": stat.st_mtime_ns}


def _line(name: str, size: int, **mark: str | int) -> str:
    return json.dumps({"name": name, "bytes": size, **mark}, ensure_ascii=False)


def _chunks(files: Iterable[tuple[str, Where]], size: int) -> Iterator[list[tuple[str, Where]]]:
    left = iter(files)
    while some := list(itertools.islice(left, size)):
        yield some


def write_listing(subset: SubsetConfig, out: Path) -> None:
    """Write what DVC depends on in place of the source: ``artifacts/listing.json``."""
    with sources.still_there(subset):
        text = listing(sources.open_source(subset))
    write_text(Path(out), text)
