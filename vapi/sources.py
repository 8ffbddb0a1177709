"""Where images come from: four ways in which people keep them, behind one face.

A source lists its entries (key, label, caption) without opening an image, reads the bytes of those
that were picked in groups that suit its files (from any thread), and names the files it consists of. A
key says where an image lies in the source and nothing about when or in which order it was found: all
randomness downstream hangs on it. Nothing in a source can make us read outside of it. Rows and samples
without a field for the label or the caption are refused; a caption that is there and says nothing (null,
blank, no text) is that image's loss alone.

    folder      source/<class>/**/*.png       labels by sorted folder name, as torchvision's ImageFolder
    parquet     one file, a folder or a pattern of them; a column of bytes or Hugging Face's {bytes, path}; also on a hub
    table       .csv or .jsonl that names images, relative to itself
    webdataset  .tar, a folder or a pattern of them: 0001.jpg with 0001.cls, 0001.txt, 0001.json

ImageNet has 1.28 million images, so a list of them holds no more than their names, a folder is listed by
many threads (on a network they wait, they do not compute), and what is half there is refused by name: a
class too many or too few, a missing shard, an archive without an end. A list of ImageNet's thousand class
names is left out: their number and their look tell what went wrong.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import fnmatch
import functools
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vapi import hub
from vapi.config import SubsetConfig
from vapi.data import parallel, require_column
from vapi.images import SUFFIXES

MAX_BYTES = 256 * 2**20
"""An encoded image larger than this is not read (a picture has a few megabytes)."""
MAX_SIDECAR = 2**20
"""Nor is the label or caption beside it, when larger than this."""
LISTERS = 16
"""Threads that list folders and ask for files' sizes: they wait for a disk or a network, not for a processor."""
SPLITS = re.compile(r"(?:^|[-_./])(train|validation|valid|val|test)(?=[-_./]|\d)")
PART = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)")
WNID = "a00000000"
"""ImageNet's class folders look like this: a letter and eight digits."""


Where = Path | hub.File
"""A file of a source."""
F = TypeVar("F")


class Entry(NamedTuple):
    """One image that could be picked. ``place`` is where its source finds it."""

    key: str
    label: int  # -1: none
    caption: str | None  # "": none is asked for, or it comes with the image; None: there should be one
    place: Any
    cluster: str = ""  # those of a cluster are drawn together; "": each by itself


class Source(Protocol):
    """A source, opened."""

    def entries(self) -> list[Entry]:
        """All images, in any order. Raises ValueError for labels and tables that make no sense."""

    def groups(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        """Some entries in groups, each of which is read at one go."""

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        """The encoded bytes of some entries, or in a few words why they cannot be had, in any order; entries with their captions,
        if these come with the images. From any thread. Raises OSError when a file is gone that was there when it was listed."""

    def files(self) -> Iterable[tuple[str, Where]]:
        """Every file that belongs to the source, by relative name, sorted."""


def open_source(config: SubsetConfig) -> Source:
    """The reader for ``subset.source``. Raises ValueError if nothing lies there or it is not clear what."""
    if hub.is_address(config.source):
        return HubParquet(config)
    path = Path(config.source)
    if not path.exists() and not _is_pattern(path):
        hint = "the bundled data comes with: dvc pull data.dvc"
        raise ValueError(f"subset.source {config.source} is not here (looked in {Path.cwd()}); {hint}")
    name = _detect(path) if config.format == "auto" else config.format
    if name == "table" and not path.is_file():
        raise ValueError(f"subset.format is table, and {path} is a folder or a pattern; name the .csv or .jsonl file")
    if name == "folder" and not path.is_dir():
        raise ValueError(f"subset.format is folder, and {path} is none")
    readers: dict[str, Callable[[Path, SubsetConfig], Source]]
    readers = {"folder": Folder, "parquet": Parquet, "table": Table, "webdataset": Webdataset}
    return readers[name](path, config)


def _detect(path: Path) -> str:
    if not path.is_dir():
        suffixes = {".parquet": "parquet", ".csv": "table", ".jsonl": "table", ".tar": "webdataset"}
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"cannot tell what {path} is; a file may end in {', '.join(suffixes)}, or set subset.format")
        return suffixes[path.suffix.lower()]
    for suffix, name in ((".parquet", "parquet"), (".tar", "webdataset")):
        if _holds(path, suffix):
            return name
    return "folder"


def _holds(folder: Path, suffix: str, levels: int = 3) -> bool:
    """Whether there is such a file here or a little below. To look everywhere would be to list ImageNet once more."""
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    if any(entry.name.endswith(suffix) and entry.is_file() for entry in entries):
        return True
    below = sorted(entry.name for entry in entries if entry.is_dir())[:8] if levels else []
    return any(_holds(folder / name, suffix, levels - 1) for name in below)


def _is_pattern(path: Path) -> bool:
    """Whether a path that does not exist names files of one folder, as in ``data/train-*.parquet``."""
    return any(sign in path.name for sign in "*?[") and path.parent.is_dir()


@contextlib.contextmanager
def still_there(config: SubsetConfig) -> Iterator[None]:
    """What was listed can be read: raises ValueError when the source has been taken away since."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{config.source} was there and cannot be read any more ({error}); put it back and run the same command again"
        ) from error


def _singly(entries: Iterable[Entry]) -> list[list[Entry]]:
    return [[entry] for entry in entries]


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


def _caption(value: Any, config: SubsetConfig) -> str | None:
    """A caption on one line. What is no text, or blank, is no caption: nothing beside a label, and None where the caption is all
    that is known of an image."""
    text = " ".join(value.encode(errors="ignore").decode().split()) if isinstance(value, str) else ""  # JSON may hold half characters
    return text or (None if config.classes == 0 and config.caption_column else "")


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
            return [Entry(key, -1, "", None) for key in self._keys]
        classes = self._classes()
        labels = {name: label for label, name in enumerate(classes)}
        # files right under the source belong to no class: a README's picture, say
        found = [Entry(key, labels[key.partition("/")[0]], "", None) for key in self._keys if "/" in key]
        for label in sorted(set(labels.values()) - {entry.label for entry in found}):
            raise ValueError(f"class {label} is empty: {self.path / classes[label]} holds no images")
        return found

    def groups(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        return _singly(entries)

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        for entry in entries:
            path = self.path / entry.key
            if not os.path.lexists(path):  # a link that leads nowhere is there
                raise FileNotFoundError(f"{path} is gone")
            yield entry, _read_file(path)

    def files(self) -> Iterable[tuple[str, Path]]:
        return ((key, self.path / key) for key in self._keys)  # a million paths are a gigabyte

    @functools.cached_property
    def _keys(self) -> list[str]:
        """Relative names of all images, sorted."""
        tops = self._tops()
        found = _images_in(self.path, "")[0]
        with tqdm(total=len(tops), desc="listing", unit="folder", delay=1, disable=None) as bar:
            for keys in parallel(lambda name: _images_below(self.path, name), tops, LISTERS):
                found += keys
                bar.update()
        return sorted(found)

    def _tops(self) -> list[str]:
        with os.scandir(self.path) as found:
            return sorted(entry.name for entry in found if not entry.name.startswith(".") and entry.is_dir())  # it may be a link

    def _classes(self) -> list[str]:
        """The class folders. Raises ValueError that names what does not belong if there are too many or too few."""
        classes, wanted = self._tops(), self.config.classes
        if not classes:
            raise ValueError(f"{self.path} holds no class folders; images without classes need subset.classes 0")
        odd = _odd(classes)
        if len(classes) != wanted:
            shown = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
            raise ValueError(
                f"{self.path} holds {len(classes)} class folders ({shown}), and subset.classes is {wanted}: "
                f"{abs(len(classes) - wanted)} too {'many' if len(classes) > wanted else 'few'}{self._hint(classes, odd)}"
            )
        if odd and _look(next(name for name in classes if name not in odd)) == WNID:  # a class short, and one that is none
            raise ValueError(
                f"{self.path} holds {wanted} folders, but {_list(odd)} is no ImageNet class like the others; every label after would shift"
            )
        return classes

    def _hint(self, classes: list[str], odd: list[str]) -> str:
        if "train" in classes:
            return f"; did you mean {self.path / 'train'}?"
        hints = [f"not like the others: {_list(odd)}"] if odd else []
        empty = [name for name in classes if name not in odd and not _images_below(self.path, name)]
        hints += [f"without images: {_list(empty)}"] if empty else []
        return "".join(f"; {hint}" for hint in hints)


def _images_in(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """Keys of the images right in a folder of the source, and the folders in it. Hidden ones do not count."""
    keys, below = [], []
    prefix = f"{folder}/" if folder else ""
    with os.scandir(root / folder) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                below.append(prefix + entry.name)
            elif entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
                keys.append(prefix + entry.name)
    return keys, below


def _images_below(root: Path, folder: str) -> list[str]:
    """Keys of the images in a folder and those below it; links to folders are not followed."""
    found, folders = [], [folder]
    while folders:
        keys, below = _images_in(root, folders.pop())
        found += keys
        folders += below
    return found


def _odd(names: Sequence[str]) -> list[str]:
    """Those that do not look like the others, where nine of ten others look the same: ``__MACOSX`` among ``n01440764``."""
    looks = collections.Counter(map(_look, names))
    look, count = looks.most_common(1)[0]
    return [name for name in names if _look(name) != look] if count >= 0.9 * len(names) else []


def _look(name: str) -> str:
    return re.sub("[A-Za-z]", "a", re.sub("[0-9]", "0", name))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


# --- parquet -----------------------------------------------------------------------------------


def _shards(path: Path, suffix: str) -> list[tuple[str, Path]]:
    """(relative name, file) of one file, of a pattern's, or of all with that suffix below a folder, sorted.

    Raises ValueError for a folder that holds several splits, and when one of the parts that the names tell of is missing.
    """
    if path.is_file():
        return [(path.name, path)]
    root, pattern = (path, f"*{suffix}") if path.is_dir() else (path.parent, path.name)
    names = (p.relative_to(root).as_posix() for p in (root.rglob(pattern) if path.is_dir() else root.glob(pattern)) if p.is_file())
    return [(name, root / name) for name in _chosen(names, str(path), pattern, path.is_dir())]


def _chosen(names: Iterable[str], source: str, pattern: str, whole: bool) -> list[str]:
    """Those of the files' names that are shards of a source, a pattern or a ``whole`` folder; sorted."""
    found = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))  # .cache of a download
    suffix = PurePosixPath(pattern).suffix
    if not found:
        raise ValueError(f"{source} holds no {suffix} files" if whole else f"no file is called {source}")
    splits = sorted({match[1] for name in found if (match := SPLITS.search(name))})
    if whole and len(splits) > 1:
        example = _one_split(found, "train" if "train" in splits else splits[0], source.rstrip("/"), suffix)
        raise ValueError(f"{source} holds shards of {' and '.join(splits)}; name those that are meant, as in subset.source {example}")
    _require_all_parts(found, source, pattern)
    return found


def _one_split(found: Sequence[str], split: str, source: str, suffix: str) -> str:
    """How to name a split of a source's files: by the folder that is called so, or by a pattern of files in one folder."""
    name, end = next((name, match.end()) for name in found if (match := SPLITS.search(name)) and match[1] == split)
    folder = name.rpartition("/")[0]
    if end <= len(folder):
        return f"'{source}/{name[: name.index('/', end)]}'"
    place = f"{source}/{folder}".rstrip("/")
    together = all(other.rpartition("/")[0] == folder for other in found)
    return f"'{place}/*{split}*{suffix}'" + (f" (or '{place}/*{suffix}' for all)" if together else "")


def _all_of(files: Sequence[tuple[str, F]], entries: Callable[[str, F], Iterator[Entry]]) -> list[Entry]:
    """The entries of all shards, several of which are read at a time."""
    found: list[Entry] = []
    with tqdm(total=len(files), desc="listing", unit="shard", delay=1, disable=None) as bar:
        for some in parallel(lambda named: list(entries(*named)), files, LISTERS):
            found += some
            bar.update()
    return found


def _require_all_parts(found: Sequence[str], source: str, pattern: str) -> None:
    """``train-00003-of-00294.parquet`` tells of 293 others, as far as they match the pattern."""
    for start, width, total, suffix in sorted({(m[1], len(m[2]), m[3], m[4]) for name in found if (m := PART.fullmatch(name))}):
        parts = [f"{start}-{number:0{width}d}-of-{total}{suffix}" for number in range(int(total))]
        wanted = [part for part in parts if fnmatch.fnmatch(part.rpartition("/")[2], pattern)]
        missing = sorted(set(wanted) - set(found))
        if missing:
            there = len(wanted) - len(missing)
            raise ValueError(
                f"{source} holds {there} of {len(wanted)} shards, without {_list(missing)}; fetch them, or name those that are meant"
            )


@contextlib.contextmanager
def _whole(what: str) -> Iterator[None]:
    """Raises ValueError for damaged Parquet. pyarrow has an OSError for some of it, without the number that a disk's has."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{what} ({' '.join(str(error).split())}); fetch it again") from None


class Parquet:
    """Images inside Parquet. The key is file and row: an image's own name, where it has one, need not be unique."""

    far = False
    """Whether reading takes so long that captions come with the images, and the images of a row group together."""

    def __init__(self, path: Path, config: SubsetConfig) -> None:
        self.path, self.config = path, config

    def entries(self) -> list[Entry]:
        return _all_of(self.files(), self._entries)

    def _entries(self, name: str, file: Where) -> Iterator[Entry]:
        with self._opened(file) as parquet:
            label, caption = _columns(parquet.schema_arrow.names, file, self.config)
            self._bytes_of(parquet, file)
            listed, row = [column for column in (label, "" if self.far else caption) if column], 0
            for group in range(parquet.num_row_groups):
                columns = parquet.read_row_group(group, columns=listed).to_pydict()
                cluster = f"{name}:{group}" if self.far else ""
                for i in range(parquet.metadata.row_group(group).num_rows):
                    key = f"{name}:{row:07d}"
                    number = _label(columns[label][i], key, self.config) if label else -1
                    words = _caption(columns[caption][i], self.config) if caption in columns else ""
                    yield Entry(key, number, words, (file, group, i), cluster)
                    row += 1

    def _opened(self, file: Where) -> pq.ParquetFile:
        with _whole(f"{file} is not a Parquet file, or not a whole one"):
            return pq.ParquetFile(file)

    def _bytes_of(self, parquet: pq.ParquetFile, file: Where) -> str:
        """The column of the encoded bytes, which may lie in one of {bytes, path}."""
        name = self.config.image_column
        kind = parquet.schema_arrow.field(name).type
        inside = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        inner = kind.field("bytes").type if inside else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise ValueError(f"{file}: column {name!r} holds {kind}, not image bytes or {{bytes, path}}")
        return f"{name}.bytes" if inside else name

    def groups(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        return _by_row_group(entries)

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        for wanted in _by_row_group(entries):
            file, group, _ = wanted[0].place
            table = self._table(file, group)
            for entry in wanted:
                row = entry.place[2]
                value = table[self.config.image_column][row].as_py()
                data = value["bytes"] if isinstance(value, dict) else value
                if self.config.caption_column in table.column_names:
                    entry = entry._replace(caption=_caption(table[self.config.caption_column][row].as_py(), self.config))
                yield entry, "no image bytes (null)" if data is None else data

    def _table(self, file: Where, group: int) -> pa.Table:
        """The images of a row group, and captions that were not listed: as little as can be read."""
        with _whole(f"{file}: row group {group} cannot be read"), self._opened(file) as parquet:
            columns = [self._bytes_of(parquet, file)]
            if self.far and self.config.caption_column in parquet.schema_arrow.names:
                columns.append(self.config.caption_column)
            return parquet.read_row_group(group, columns=columns, use_threads=False)  # the threads are ours

    def files(self) -> Sequence[tuple[str, Where]]:
        return _shards(self.path, ".parquet")


def _by_row_group(entries: Iterable[Entry]) -> list[list[Entry]]:
    groups: dict[tuple[Where, int], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.place[:2], []).append(entry)
    return [wanted for _, wanted in sorted(groups.items())]


class HubParquet(Parquet):
    """The same on a hub, read by ranges of bytes."""

    far = True

    def __init__(self, config: SubsetConfig) -> None:
        if config.format not in ("auto", "parquet"):
            raise ValueError(f"subset.format is {config.format}, and on a hub Parquet alone is read; fetch the files and name their folder")
        self.dataset, self.config = hub.Dataset(config.source), config
        self._end = functools.lru_cache(maxsize=8)(self._read_end)

    def files(self) -> list[tuple[str, hub.File]]:
        folder, _, pattern = self.dataset.path.rpartition("/")
        whole = not (pattern.endswith(".parquet") or any(sign in pattern for sign in "*?["))
        if whole:
            folder, pattern = self.dataset.path, "*.parquet"
        listed = {file.path.removeprefix(f"{folder}/"): file for file in self.dataset.files(folder, below=whole)}
        named = (name for name in listed if fnmatch.fnmatchcase(name, pattern))
        return [(name, listed[name]) for name in _chosen(named, self.config.source, pattern, whole)]

    def _opened(self, file: Where) -> pq.ParquetFile:
        assert isinstance(file, hub.File)
        with _whole(f"{file} is not a Parquet file, or not a whole one"):
            return pq.ParquetFile(self.dataset.open(file))

    def groups(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        found = super().groups(entries)
        some = sum(self._size(*wanted[0].place[:2]) for wanted in found) / 1e6
        whole = sum(file.size for _, file in self.files()) / 1e6
        print(f"{len(found):,} row groups, {some:,.1f} of {whole:,.1f} MB, come from the hub, or were kept", file=sys.stderr)
        return found

    def _size(self, file: Where, group: int) -> int:
        """Bytes of a row group's images."""
        metadata, images = self._end(file)
        chunks = (metadata.row_group(group).column(n) for n in range(metadata.num_columns))
        return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema == images)

    def _read_end(self, file: Where) -> tuple[pq.FileMetaData, str]:
        with self._opened(file) as parquet:
            return parquet.metadata, self._bytes_of(parquet, file)

    def described(self) -> str:
        """What lies there, in words, after a look at the list of files and into the first of them."""
        files = self.files()
        next(self._entries(*files[0]), None)
        size = sum(file.size for _, file in files)
        return f"{self.config.source} at commit {self.dataset.commit}, {len(files):,} files, {size:,} bytes"


def commit(source: Source) -> dict[str, str]:
    """The ``commit`` that a dataset on a hub is read at; nothing for other sources."""
    return {"commit": source.dataset.commit} if isinstance(source, HubParquet) else {}


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
            found.append(Entry(key, number, _caption(row[caption], self.config) if caption else "", self.path.parent / place))
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

    def groups(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        return _singly(entries)

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        for entry in entries:
            if not self.path.is_file():  # with the table, the images it names have been taken away
                raise FileNotFoundError(f"{self.path} is gone")
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
        return _all_of(self.files(), self._entries)

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
                _require_end(file)
                for stem, parts in samples.items():
                    images = [parts[suffix] for suffix in SUFFIXES if suffix in parts]
                    if images:
                        yield self._entry(f"{shard}/{stem}", archive, file, images[0], parts)
        except tarfile.TarError as error:
            raise ValueError(f"{file} is not a plain, whole tar archive ({error}); compressed ones have to be unpacked first") from None

    def _require_plain(self, member: tarfile.TarInfo, file: Path) -> None:
        if ".." in member.name or member.name.startswith("/"):  # most names need no closer look
            _inside(member.name, f"{file}: member")
        if not (member.isfile() or member.isdir()) or member.issparse():
            raise ValueError(f"{file}: member {member.name!r} is a link, a device or a sparse file; a data set holds plain files")

    def _entry(self, key: str, archive: tarfile.TarFile, file: Path, image: tarfile.TarInfo, parts: dict[str, tarfile.TarInfo]) -> Entry:
        fields = _fields(key, archive, parts)
        label_column, caption_column = self.config.label_column, self.config.caption_column
        if ".cls" in parts:
            fields[label_column] = _sidecar(key, archive, parts[".cls"]).strip()
        if ".txt" in parts and not _caption(fields.get(caption_column), self.config):  # what was named goes first
            fields[caption_column] = _sidecar(key, archive, parts[".txt"])
        if self.config.classes and label_column not in fields:
            raise ValueError(f"{key} has no label: neither a .cls member nor {label_column!r} in its .json")
        if not self.config.classes and caption_column and caption_column not in fields:
            raise ValueError(f"{key} has no caption: neither a .txt member nor {caption_column!r} in its .json")
        label = _label(fields.get(label_column), key, self.config)
        caption = _caption(fields.get(caption_column), self.config)
        return Entry(key, label, caption, (file, image.offset_data, image.size))

    def groups(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        return _singly(sorted(entries, key=lambda entry: entry.place))

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


def _require_end(file: Path) -> None:
    """Two blocks of zeros end an archive. A download that stopped between two members lacks nothing else."""
    with file.open("rb") as archive:
        archive.seek(max(0, file.stat().st_size - 1024))
        if any(archive.read()):
            raise ValueError(f"{file} is not a whole tar archive (it has no end mark; half-downloaded?); fetch it again")


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
    assert archive.fileobj is not None
    archive.fileobj.seek(member.offset_data)  # a plain file: checked when listed
    return archive.fileobj.read(member.size).decode("utf-8", errors="replace")
