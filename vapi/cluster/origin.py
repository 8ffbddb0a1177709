"""Where ``data/`` comes from: the image, a mounted folder, a URI, or a DVC repository at a revision.

A recipe names its files relative to a clone (``data/digits/train.parquet``). A step works in a folder in which these names
lead to the same bytes, so that a configuration, and what a run is called after it, are the same on a laptop and on a
cluster. What has to be fetched is fetched once for everybody who shares a volume, and only what a stage reads.

Left out: secrets. Whoever opens a private bucket or repository takes them from the environment (pods.secrets).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import vapi
from vapi import data, hub, keys
from vapi.config import Config, named_files, write_text

IMAGE = Path(vapi.__file__).resolve().parents[1]
"""The clone, or the folder of the image, that the package lies in; it holds the embedded data."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Origin:
    """The form's fields data_uri and data_revision."""

    uri: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        split = urlsplit(self.uri)
        if split.password or (split.username and split.scheme.endswith(("http", "https"))) or split.query:
            raise ValueError("data_uri holds a login or a signature, and everybody sees a run's parameters; use a secret (pods.secrets)")
        if self.revision and not self.uri:
            raise ValueError("data_revision is given without data_uri; name the DVC repository that the revision belongs to")
        if self.is_repository and not self.revision:
            raise ValueError(f"data_uri {self.uri} is a git repository; give data_revision, a commit or a tag of it")

    @property
    def is_repository(self) -> bool:
        """Whether the data are a DVC repository's."""
        return bool(self.revision) or self.uri.endswith(".git") or self.uri.startswith(("git+", "git@", "ssh:"))

    @property
    def folder(self) -> Path | None:
        """Where ``data/`` lies already, if it does: in the image, or mounted."""
        if not self.uri:
            return IMAGE
        if self.is_repository or not self.uri.startswith(("/", "file://")):
            return None
        return Path(self.uri.removeprefix("file://"))


def root(origin: Origin, names: Iterable[str], state: Path) -> Path:
    """The folder in which relative ``names`` lead to the data, after fetching what is not there yet into ``state``.

    A name that the origin does not know is left to whoever reads it: it may be a hub's. Raises ValueError when the
    origin cannot be reached, or lacks the data altogether.
    """
    if origin.folder is not None:
        if not origin.folder.is_dir():
            raise ValueError(f"data_uri is {origin.uri}, and there is no such folder; mount the volume it lies on, or name another")
        return origin.folder
    with _held(origin, state):
        if origin.is_repository:
            return _pulled(origin, _relative(names), state)
        return _fetched(origin.uri, _relative(names), state)


def bytes_of(origin: Origin, names: Iterable[str], state: Path) -> dict[str, int]:
    """Which of some names the origin has, and how large they are, without fetching them; a repository's are its files' own.
    Of an origin that is a folder already nothing is said. Raises ValueError when it cannot be reached."""
    if origin.folder is not None:
        return {}
    with _held(origin, state):
        if origin.is_repository:
            from dvc.api import DVCFileSystem

            folder, _ = _cloned(origin, state)
            return _sizes(DVCFileSystem(str(folder)), "", _relative(names))
        with _opened(origin.uri) as (system, base):
            return _sizes(system, f"{base}/", _relative(names))


def _sizes(system: Any, base: str, names: list[str]) -> dict[str, int]:
    found = {name: _paths(system, base, name) for name in names}
    return {name: sum(int(system.du(path) or 0) for path in paths) for name, paths in found.items() if paths}


def _paths(system: Any, base: str, name: str) -> list[str]:
    """What a name or a pattern leads to in a file system."""
    if _plain(name) != name:
        return sorted(system.glob(f"{base}{name}"))
    return [f"{base}{name}"] if system.exists(f"{base}{name}") else []


def _relative(names: Iterable[str]) -> list[str]:
    """Those that are relative. Raises ValueError for one that would leave the folder it is relative to."""
    for name in names:
        if ".." in Path(name).parts:
            raise ValueError(f"{name!r} leads out of the data; names are relative to data_uri and stay inside")
    return sorted({name for name in names if not Path(name).is_absolute() and not hub.is_address(name)})


@contextlib.contextmanager
def _held(origin: Origin, state: Path) -> Iterator[None]:
    """An origin is fetched from by one process at a time."""
    with data.locked(state / "origins" / f"{data.short_digest(origin.uri)}.lock"):
        yield


def resolve(origin: Origin, state: Path) -> Origin:
    """The same with a commit in place of a tag or branch, which may move while a run goes on."""
    if not origin.is_repository or COMMIT.fullmatch(origin.revision):
        return origin
    with _held(origin, state):
        return Origin(origin.uri, _cloned(origin, state)[1])


# --- a DVC repository --------------------------------------------------------------------------


def _pulled(origin: Origin, names: list[str], state: Path) -> Path:
    """A checkout with the wanted of its DVC-tracked files in place, all of each: DVC looks at what is there already."""
    from dvc.exceptions import DvcException, NoOutputOrStageError
    from dvc.repo import Repo

    folder, _ = _cloned(origin, state)
    with contextlib.closing(Repo(str(folder))) as repo:
        for name in names:
            try:
                repo.pull(targets=[str(folder / _plain(name))])
            except NoOutputOrStageError:
                pass  # git's own, or none of the repository's
            except DvcException as error:
                raise ValueError(f"data_uri {origin.uri}: DVC cannot fetch {name} ({error}); is its remote reachable from here?") from error
    return folder


def _plain(name: str) -> str:
    """A pattern's folder, since DVC fetches no patterns."""
    return name if glob.escape(name) == name else str(Path(name).parent)


def _cloned(origin: Origin, state: Path) -> tuple[Path, str]:
    """The checkout of a revision, and its commit."""
    from dvc.scm import CloneError, SCMError, clone, map_scm_exception

    def place(commit: str) -> Path:
        return state / "repositories" / data.short_digest(f"{origin.uri}@{commit}")

    if COMMIT.fullmatch(origin.revision) and place(origin.revision).is_dir():
        return place(origin.revision), origin.revision
    partial = state / "repositories" / f".{data.short_digest(origin.uri)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with map_scm_exception(), contextlib.closing(clone(origin.uri.removeprefix("git+"), str(partial))) as git:
            commit = _commit(git, origin.revision)
            git.checkout(commit, detach=True)
    except CloneError as error:
        raise ValueError(f"data_uri {origin.uri} cannot be cloned: {error.__cause__ or error}") from error
    except SCMError as error:
        raise ValueError(f"data_revision {origin.revision!r} is not in {origin.uri}: {error}; has it been pushed?") from error
    if place(commit).exists():
        shutil.rmtree(partial)
    else:
        partial.rename(place(commit))
    return place(commit), commit


def _commit(git: Any, revision: str) -> str:
    from dvc.scm import RevError, resolve_rev

    try:
        return str(resolve_rev(git, revision))
    except RevError:
        return str(resolve_rev(git, f"origin/{revision}"))  # a branch that is not checked out


# --- a URI -------------------------------------------------------------------------------------


def _fetched(uri: str, names: list[str], state: Path) -> Path:
    """A folder with copies of the wanted files; one that changed at its origin is fetched again."""
    folder = state / "fetched" / data.short_digest(uri)
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(uri) as (system, base):
        for path in [path for name in names for path in _paths(system, f"{base}/", name)]:
            # file by file, so that what was interrupted goes on where it was
            files = system.find(path, detail=True) if system.isdir(path) else {path: system.info(path)}
            for name, about in files.items():
                (inside,) = _relative([name.removeprefix(f"{base}/")])  # a server's listing may say anything
                _fetch(system, name, _version(about), folder / inside)
    wanted = [name for name in names if name.startswith("data/")]  # others may be a hub's
    if wanted and not any(folder.iterdir()):
        raise ValueError(f"data_uri {uri} holds none of {', '.join(wanted)}; a recipe's names are relative to it")
    return folder


def _version(about: dict[str, Any]) -> str:
    """What tells a file at its origin from one that it was before; nothing if the protocol does not say."""
    marks = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "Last-Modified", "LastModified", "last_modified", "updated", "mtime")
    known = {mark: str(about[mark]) for mark in marks if about.get(mark)}
    return str(sorted({**known, "size": str(about.get("size"))}.items())) if known else ""


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[tuple[Any, str]]:
    """The file system behind a URI and the path in it. What a network has to say becomes a ValueError."""
    import fsspec

    try:
        system, base = fsspec.core.url_to_fs(uri.rstrip("/"))
        yield system, base
    except ImportError as error:
        raise ValueError(f"data_uri {uri}: this image cannot speak {urlsplit(uri).scheme}:// ({error})") from error
    except OSError as error:
        raise ValueError(f"data_uri {uri} cannot be read: {error}") from error
    except Exception as error:  # (each protocol has errors of its own)
        if isinstance(error, ValueError):
            raise ValueError(f"data_uri is {uri}: {error}") from error
        raise ValueError(f"data_uri {uri} cannot be read: {type(error).__name__} {error}") from error


def _fetch(system: Any, path: str, version: str, target: Path) -> None:
    """One file, unless its copy is of the same version. The copy that was there stays until the new one is whole."""
    mark = target.with_name(f".{target.name}.version")
    if version and target.is_file() and mark.is_file() and mark.read_text() == version:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    system.get_file(path, str(partial))
    mark.unlink(missing_ok=True)
    partial.replace(target)
    write_text(mark, version)


# --- what is there -----------------------------------------------------------------------------


def digests(settings: Config, sections: Iterable[str]) -> dict[str, str]:
    """sha256 of what is named and here, by field; what lies elsewhere (on a hub) has none. Reads every byte."""
    return {
        field: hashlib.sha256("".join(map(data.file_digest, found)).encode()).hexdigest()
        for field, name in named_files(settings, sections).items()
        if (found := keys.matches(Path(name)))
    }
