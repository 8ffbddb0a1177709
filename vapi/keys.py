"""Names of results, after what they follow from: who finds a folder of that name need not make it again.

A name is a hash of the stage's sections of the configuration, of the files that these name, of the results that the stage
reads, and of the code. It does not know who asks, or when; a run that was stopped finds what it had made.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from vapi import config, data
from vapi.config import STAGES, Config


def of(stage: str, settings: Config, made: Mapping[str, str], code: str) -> str:
    """The name of a stage's result (16 hexadecimal digits). ``made``: what names each of its inputs; ``code``: a digest of the source.

    Raises ValueError when the source of images is not there.
    """
    sections = STAGES[stage].sections
    named = config.named_files(settings, sections)
    # a source may have a million files, which are listed many at a time
    marks = {field: _listed(settings) if field == "subset.source" else mark(name) for field, name in named.items()}
    values = {name: config.plain(getattr(settings, name)) for name in sections}
    depends = [stage, values, marks, dict(made), code, importlib.metadata.version("torch")]
    return data.short_digest(json.dumps(depends, sort_keys=True))


def _listed(settings: Config) -> str:
    from vapi import listing, sources  # with pandas' and torchvision's weight, which no other stage's name needs

    with sources.still_there(settings.subset):
        return data.text_digest(listing.listing(sources.open_source(settings.subset)))


def matches(path: Path) -> list[Path]:
    """The file or folder, or what a pattern leads to."""
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))


def mark(name: str) -> str:
    """What changes when a file, folder or pattern of files does: a file's sha256 (remembered), names, sizes and times in a folder."""
    marks = [data.known_digest(path) if path.is_file() else _stats(path) for path in matches(Path(name))]
    return data.short_digest("\n".join(marks)) if marks else name


def _stats(folder: Path) -> str:
    lines = []
    for path in sorted(folder.rglob("*")):
        stat = path.stat()
        lines.append(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return data.short_digest("\n".join(lines))
