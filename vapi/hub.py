"""Datasets on the Hugging Face hub: the files that they have, and those ranges of their bytes that somebody asks for.

    hf://datasets/OWNER/NAME[@REVISION][/a file, a folder or a pattern of files]

as huggingface_hub and fsspec write it. A branch or a tag is asked for its commit once, and everything is read at that commit.
Whatever was fetched is kept under ``.vapi/hub``, a range under the digest of its file: who was killed goes on without fetching
anything again, and needs no network for what is there if the revision is a commit.

Left out: models (``vapi.models.weights`` takes those whole), and fsspec's own file, which asks the hub about a file before it
reads it, and fetches more than it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vapi import data

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/@]+|[^/@]+))?(?:/(.*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 30
"""To wait for the hub to say something."""
BUSY = (429, 500, 502, 503, 504)
"""What the hub answers when it is worth asking again."""
PARTIAL = 206
"""What it answers when it gives the range that was asked for."""
TRIES = 3
"""How often a range is asked for, when connections break in the middle of it."""
PIECE = 64 * 2**20
"""Bytes that are asked for at one go: so much is lost when a process is killed or a connection breaks."""
ELSEWHERE = "where there is no network, fetch the files somewhere else and name the folder that holds them"


def is_address(name: str) -> bool:
    """Whether a source is named as one on the hub."""
    return name.startswith(SCHEME)


@dataclass(frozen=True, order=True)
class File:
    """A file of a dataset: its path there, its bytes, and what names its content (sha256, or git's for a small one)."""

    path: str
    size: int
    digest: str

    def __str__(self) -> str:
        return self.path


class Dataset:
    """A dataset at a commit, or what lies below a path in it. Raises ValueError for an address that is none; all that is asked of
    the hub raises it, with what to do, if it does not answer or refuses."""

    def __init__(self, address: str) -> None:
        match = ADDRESS.fullmatch(address)
        if not match:
            raise ValueError(f"{address} names no dataset; write hf://datasets/OWNER/NAME@REVISION/data/train-*.parquet, or less of it")
        self.address, self.name, self.path = address, match[1], (match[3] or "").strip("/")
        self.revision = unquote(match[2] or "")

    @functools.cached_property
    def commit(self) -> str:
        """The commit (40 hexadecimal digits) that the revision is at, or the main branch without one."""
        if COMMIT.fullmatch(self.revision):
            return self.revision
        with self._asked(self.name):
            from huggingface_hub import HfApi

            found = str(HfApi().dataset_info(self.name, revision=self.revision or None, timeout=SECONDS).sha)
            if not COMMIT.fullmatch(found):  # it becomes part of a path
                raise OSError(f"it calls {found!r} a commit")
            return found

    def files(self, folder: str, below: bool) -> list[File]:
        """All files of a folder in it, and with ``below`` of those below. Asked once for a commit."""
        known = self._kept(self.commit) / f"{data.short_digest(folder)}-{below:d}.json"
        if not known.is_file():
            with self._asked(folder or self.name):
                from huggingface_hub import HfApi
                from huggingface_hub.hf_api import RepoFile

                tree = HfApi().list_repo_tree(self.name, folder or None, recursive=below, revision=self.commit, repo_type="dataset")
                found = [File(one.path, one.size, one.lfs.sha256 if one.lfs else one.blob_id) for one in tree if isinstance(one, RepoFile)]
            data.write_json(known, [asdict(file) for file in found])
        return [File(**values) for values in data.read_json(known)]

    def open(self, file: File) -> io.RawIOBase:
        """A file to read from: each read asks for that range, unless it is kept."""
        return _Ranges(self, file)

    def read(self, file: File, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``."""
        kept = self._kept(data.text_digest(file.digest)[:32]) / f"{start}-{end}"
        if not kept.is_file():
            with self._asked(file.path):
                body = self._fetch(file, start, end)
            _keep(kept, body)
            return body
        return kept.read_bytes()

    def _fetch(self, file: File, start: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

        url = hf_hub_url(self.name, file.path, repo_type="dataset", revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        how: dict[str, Any] = {"headers": headers, "timeout": SECONDS, "retry_on_status_codes": BUSY}  # for half a minute
        broken: Exception = OSError("it was not asked")
        for _ in range(TRIES):
            with http_stream_backoff("GET", url, **how) as answer:
                hf_raise_for_status(answer)
                if answer.status_code != PARTIAL and end - start < file.size:  # it may be gigabytes, and is not waited for
                    raise OSError(f"a whole file came in place of {end - start:,} bytes of it; does a proxy drop the header Range?")
                try:
                    body = bytes(answer.read())
                except Exception as error:  # the connection broke in the middle; each version of the library has errors of its own
                    broken = error
                    continue
            if len(body) != end - start:
                raise OSError(f"{len(body):,} bytes came in place of {end - start:,}")
            return body
        raise broken

    def _kept(self, name: str) -> Path:
        return data.state_dir("hub", self.name.replace("/", "--"), name)

    @contextlib.contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """What the hub or the network has to say against it becomes a ValueError that says what to do."""
        try:
            from huggingface_hub import errors
        except ImportError:
            raise ValueError(f"{self.address} lies on the hub; to read it: pip install huggingface_hub") from None
        try:
            yield
        except errors.RevisionNotFoundError:
            raise ValueError(f"{self.address}: the dataset has no revision {self.revision!r}; give a branch, a tag or a commit") from None
        except errors.EntryNotFoundError:
            raise ValueError(f"{self.address}: the dataset holds no {what} at commit {self.commit}; mind the spelling") from None
        except Exception as error:  # (each version of the library has errors of its own)
            gated = isinstance(error, errors.GatedRepoError) or _status(error) == 403
            if gated or isinstance(error, errors.RepositoryNotFoundError):
                raise ValueError(self._refused(gated)) from None
            words = " ".join(str(error).split())
            kept = f"what came so far is kept in {data.state_dir('hub')}, so run the same command again"
            raise ValueError(f"{self.address}: the hub does not give {what} ({words}); {kept}, or {ELSEWHERE}") from error

    def _refused(self, gated: bool) -> str:
        login = "give a token that may read it (HF_TOKEN, or: hf auth login)"
        if gated:
            return f"{self.address} is gated or closed to you; accept its terms on its page, {login}"
        return f"the hub knows no dataset {self.name}, or shows it to others only; mind the spelling, and if it is private, {login}"


class _Ranges(io.RawIOBase):
    """What pyarrow takes for a file."""

    def __init__(self, dataset: Dataset, file: File) -> None:
        self.dataset, self.file, self.at = dataset, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = (0, self.at, self.file.size)[whence] + offset
        return self.at

    def read(self, count: int | None = -1) -> bytes:
        start, end = self.at, self.file.size
        if count is not None and count >= 0:
            end = min(start + count, end)
        self.at = max(start, end)
        return b"".join(self.dataset.read(self.file, at, min(at + PIECE, end)) for at in range(start, end, PIECE))


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _keep(path: Path, body: bytes) -> None:
    """Write bytes whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with partial.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror or error}; {data.AGAIN}") from error
