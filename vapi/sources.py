"""Where images come from: four ways in which people keep them, behind one face.

A source lists its entries (key, label, caption) without opening an image, reads the bytes of those
that were picked in whatever order suits its files, and names the files it consists of. A key says
where an image lies in the source and nothing about when or in which order it was found: all
randomness downstream hangs on it. Nothing in a source can make us read outside of it.

    folder      source/<class>/**/*.png       labels by sorted folder name, as torchvision's ImageFolder
    parquet     one file, or a folder of them; a column of bytes or Hugging Face's {bytes, path}
    table       .csv or .jsonl that names images, relative to itself
    webdataset  .tar, or a folder of them: 0001.jpg with 0001.cls, 0001.txt, 0001.json
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vapi.config import SubsetConfig
from vapi.data import require_column
from vapi.images import SUFFIXES

MAX_BYTES = 256 * 2**20
"""An encoded image larger than this is not read (a picture has a few megabytes)."""
MAX_SIDECAR = 2**20
"""Nor is the label or caption beside it, when larger than this."""


class Entry(NamedTuple):
    """One image that could be picked. ``place`` is where its source finds it."""

    key: str
    label: int  # -1: none
    caption: str
    place: Any


class Source(Protocol):
    """A source, opened."""

    def entries(self) -> list[Entry]:
        """All images, in any order. Raises ValueError for labels and tables that make no sense."""

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        """The encoded bytes of some entries, or in a few words why they cannot be had, in any order."""

    def files(self) -> list[tuple[str, Path]]:
        """Every file that belongs to the source, by relative name."""


def open_source(config: SubsetConfig) -> Source:
    """The reader for ``subset.source``. Raises ValueError if nothing lies there or it is not clear what."""
    path = Path(config.source)
    if not path.exists():
        hint = "the bundled data comes with: dvc pull data.dvc"
        raise ValueError(f"subset.source {config.source} is not here (looked in {Path.cwd()}); {hint}")
    name = _detect(path) if config.format == "auto" else config.format
    if name == "table" and path.is_dir():
        raise ValueError(f"subset.format is table, and {path} is a folder; name the .csv or .jsonl file")
    if name == "folder" and path.is_file():
        raise ValueError(f"subset.format is folder, and {path} is a file")
    readers: dict[str, Callable[[Path, SubsetConfig], Source]]
    readers = {"folder": Folder, "parquet": Parquet, "table": Table, "webdataset": Webdataset}
    return readers[name](path, config)


def _detect(path: Path) -> str:
    if path.is_file():
        suffixes = {".parquet": "parquet", ".csv": "table", ".jsonl": "table", ".tar": "webdataset"}
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"cannot tell what {path} is; a file may end in {', '.join(suffixes)}, or set subset.format")
        return suffixes[path.suffix.lower()]
    for pattern, name in (("*.parquet", "parquet"), ("*.tar", "webdataset")):
        if next(path.rglob(pattern), None) is not None:
            return name
    return "folder"


# --- labels and captions -----------------------------------------------------------------------


def _label(value: Any, key: str, config: SubsetConfig) -> int:
    """A class id from an int, a whole float or digits. With ``classes: 0``, every label is -1."""
    if config.classes == 0:
        return -1
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = 0.5
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(f"{key} has label {value!r}; labels are class ids from 0 to {config.classes - 1}")
    return int(number)


def _text(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def _columns(names: Iterable[str], where: Any, config: SubsetConfig) -> tuple[str, str]:
    """The columns of label and caption that are there ("" for none). Labels are owed when there are classes;
    captions when there are none, unless ``subset.caption_column`` is empty."""
    names = list(names)
    require_column(config.image_column, names, where)
    if config.classes:
        require_column(config.label_column, names, where)
        return config.label_column, config.caption_column if config.caption_column in names else ""
    if config.caption_column:
        require_column(config.caption_column, names, where)
    return "", config.caption_column


def _read_file(path: Path) -> bytes | str:
    if not path.is_file():  # nor a pipe or a device, which would never end
        return "no such file"
    if path.stat().st_size > MAX_BYTES:
        return f"{path.stat().st_size:,} bytes are no picture"
    return path.read_bytes()


# --- folder ------------------------------------------------------------------------------------


class Folder:
    """Class folders (their sorted names are the labels), or with ``classes: 0`` just images below a folder."""

    def __init__(self, path: Path, config: SubsetConfig) -> None:
        self.path, self.config = path, config

    def entries(self) -> list[Entry]:
        if self.config.classes == 0:
            return [Entry(key, -1, "", file) for key, file in self.files()]
        classes = sorted(p.name for p in self.path.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise ValueError(f"{self.path} holds no class folders; images without classes need subset.classes 0")
        if len(classes) != self.config.classes:
            shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
            raise ValueError(f"{self.path} holds {len(classes)} class folders ({shown}), and subset.classes is {self.config.classes}")
        labels = {name: label for label, name in enumerate(classes)}
        # files right under the source belong to no class: a README's picture, say
        found = [Entry(key, labels[key.split("/")[0]], "", file) for key, file in self.files() if "/" in key]
        for label in sorted(set(labels.values()) - {entry.label for entry in found}):
            raise ValueError(f"class {label} is empty: {self.path / classes[label]} holds no images")
        return found

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        for entry in entries:
            yield entry, _read_file(entry.place)

    def files(self) -> list[tuple[str, Path]]:
        paths = list(self.path.iterdir())
        for top in [path for path in paths if path.is_dir() and not path.name.startswith(".")]:  # may be a link
            for folder, below, names in os.walk(top):
                below[:] = [name for name in below if not name.startswith(".")]
                paths += [Path(folder, name) for name in names]
        images = (path for path in paths if path.name.lower().endswith(SUFFIXES) and not path.name.startswith("."))
        return sorted((path.relative_to(self.path).as_posix(), path) for path in images if not path.is_dir())


# --- parquet -----------------------------------------------------------------------------------


def _shards(path: Path, suffix: str) -> list[tuple[str, Path]]:
    """(relative name, file) of one file, or of all with that suffix below a folder, sorted."""
    if path.is_file():
        return [(path.name, path)]
    found = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob(f"*{suffix}") if p.is_file())
    if not found:
        raise ValueError(f"{path} holds no {suffix} files")
    return found


class Parquet:
    """Images inside Parquet. The key is file and row: an image's own name, where it has one, need not be unique."""

    def __init__(self, path: Path, config: SubsetConfig) -> None:
        self.path, self.config = path, config

    def entries(self) -> list[Entry]:
        return [entry for name, file in self.files() for entry in self._entries(name, file)]

    def _entries(self, name: str, file: Path) -> Iterator[Entry]:
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is not a Parquet file: {error}") from None
        label, caption = _columns(parquet.schema_arrow.names, file, self.config)
        self._check_images(parquet, file)
        row = 0
        for group in range(parquet.num_row_groups):
            columns = parquet.read_row_group(group, columns=[c for c in (label, caption) if c]).to_pydict()
            for i in range(parquet.metadata.row_group(group).num_rows):
                key = f"{name}:{row:07d}"
                number = _label(columns[label][i], key, self.config) if label else -1
                yield Entry(key, number, _text(columns[caption][i]) if caption else "", (file, group, i))
                row += 1

    def _check_images(self, parquet: pq.ParquetFile, file: Path) -> None:
        kind = parquet.schema_arrow.field(self.config.image_column).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise ValueError(f"{file}: column {self.config.image_column!r} holds {kind}, not image bytes or {{bytes, path}}")

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        groups: dict[tuple[Path, int], list[Entry]] = {}
        for entry in entries:
            groups.setdefault(entry.place[:2], []).append(entry)
        for (file, group), wanted in sorted(groups.items()):
            column = pq.ParquetFile(file).read_row_group(group, columns=[self.config.image_column])[self.config.image_column]
            for entry in wanted:
                value = column[entry.place[2]].as_py()
                data = value["bytes"] if isinstance(value, dict) else value
                yield entry, "no image bytes (null)" if data is None else data

    def files(self) -> list[tuple[str, Path]]:
        return _shards(self.path, ".parquet")


# --- table -------------------------------------------------------------------------------------


class Table:
    """CSV or JSON lines. An image is named relative to the table, and lies beside or below it."""

    def __init__(self, path: Path, config: SubsetConfig) -> None:
        self.path, self.config = path, config

    def entries(self) -> list[Entry]:
        found, seen = [], set()
        for line, row in self._rows():
            label, caption = _columns(row, f"{self.path}, line {line},", self.config)
            place = self._inside(row[self.config.image_column], line)
            key = place.as_posix() if place not in seen else f"{place.as_posix()}:{line}"
            seen.add(place)
            number = _label(row[label], f"{self.path}, line {line},", self.config) if label else -1
            found.append(Entry(key, number, _text(row[caption]) if caption else "", self.path.parent / place))
        return found

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                if self.path.suffix.lower() == ".csv":
                    for row in (reader := csv.DictReader(file)):
                        number = reader.line_num
                        if None in row:
                            raise ValueError(f"{self.path}, line {number} has more fields than the header; quote what holds a comma")
                        yield number, row
                    return
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, self._json(line, number)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path}, after line {number}: {error}; the file must be UTF-8 text") from None

    def _json(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {number} is not a JSON object")
        return row

    def _inside(self, name: Any, line: int) -> PurePosixPath:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{self.path}, line {line} names no image (column {self.config.image_column!r} is empty)")
        return _inside(name, f"{self.path}, line {line}:")

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        for entry in entries:
            yield entry, _read_file(entry.place)

    def files(self) -> list[tuple[str, Path]]:
        named = {entry.place for entry in self.entries() if entry.place.is_file()}
        return sorted((p.relative_to(self.path.parent).as_posix(), p) for p in {self.path, *named})


def _inside(name: str, where: str) -> PurePosixPath:
    """A relative path without detours. Raises ValueError if it climbs out of the folder it is relative to."""
    path = PurePosixPath(os.path.normpath(name))
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{where} {name!r} leads out of the data; paths are relative and stay inside")
    return path


# --- webdataset --------------------------------------------------------------------------------


class Webdataset:
    """Tar shards whose members belong together by name up to the first dot. Nothing is unpacked to disk, and an
    archive with paths that climb out, links or devices is refused all the same: it was not made for this."""

    def __init__(self, path: Path, config: SubsetConfig) -> None:
        self.path, self.config = path, config

    def entries(self) -> list[Entry]:
        return [entry for name, file in self.files() for entry in self._entries(name, file)]

    def _entries(self, shard: str, file: Path) -> Iterator[Entry]:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    self._require_plain(member, file)
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    if member.isfile() and stem and dot:
                        samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[f".{suffix.lower()}"] = member
                for stem, parts in samples.items():
                    images = [parts[suffix] for suffix in SUFFIXES if suffix in parts]
                    if images:
                        yield self._entry(f"{shard}/{stem}", archive, file, images[0], parts)
        except tarfile.TarError as error:
            raise ValueError(f"{file} is not a plain, whole tar archive ({error}); compressed ones have to be unpacked first") from None

    def _require_plain(self, member: tarfile.TarInfo, file: Path) -> None:
        _inside(member.name, f"{file}: member")
        if not (member.isfile() or member.isdir()) or member.issparse():
            raise ValueError(f"{file}: member {member.name!r} is a link, a device or a sparse file; a data set holds plain files")

    def _entry(self, key: str, archive: tarfile.TarFile, file: Path, image: tarfile.TarInfo, parts: dict[str, tarfile.TarInfo]) -> Entry:
        fields = _fields(key, archive, parts)
        label_column, caption_column = self.config.label_column, self.config.caption_column
        if ".cls" in parts:
            fields[label_column] = _sidecar(key, archive, parts[".cls"]).strip()
        if ".txt" in parts:
            fields[caption_column] = _sidecar(key, archive, parts[".txt"])
        if self.config.classes and label_column not in fields:
            raise ValueError(f"{key} has no label: neither a .cls member nor {label_column!r} in its .json")
        if not self.config.classes and caption_column and caption_column not in fields:
            raise ValueError(f"{key} has no caption: neither a .txt member nor {caption_column!r} in its .json")
        label = _label(fields.get(label_column), key, self.config)
        return Entry(key, label, _text(fields.get(caption_column)), (file, image.offset_data, image.size))

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        for entry in sorted(entries, key=lambda entry: entry.place):
            file, offset, size = entry.place
            if size > MAX_BYTES:
                yield entry, f"{size:,} bytes are no picture"
                continue
            with file.open("rb") as archive:
                archive.seek(offset)
                yield entry, archive.read(size)

    def files(self) -> list[tuple[str, Path]]:
        return _shards(self.path, ".tar")


def _fields(key: str, archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    if ".json" not in parts:
        return {}
    try:
        fields = json.loads(_sidecar(key, archive, parts[".json"]))
    except ValueError as error:
        raise ValueError(f"{key}.json is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{key}.json is not a JSON object")
    return fields


def _sidecar(key: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > MAX_SIDECAR:
        raise ValueError(f"{key}: {member.name!r} has {member.size:,} bytes; a label or caption has few")
    file = archive.extractfile(member)
    assert file is not None, member.name  # a plain file: checked when listed
    return file.read().decode("utf-8", errors="replace")
