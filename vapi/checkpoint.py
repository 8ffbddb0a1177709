"""Save and resume: one file, replaced whole or not at all.

The file holds whatever a run must not lose (weights, optimizer, position, metrics so far) and the
digest of the run it belongs to. It is written under a temporary name, flushed to the disk and
renamed, so that at every moment one complete checkpoint exists. It is read as data: tensors and
plain values, nothing that executes.

Left out: keeping several. What a run produced is in its output folder; this file only bridges a kill.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO, Any, cast

import torch


class _Flushed(io.RawIOBase):
    """A file that only writes, and remembers why it could not: torch wraps the reason in its own error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = open(path, "wb")  # noqa: SIM115  (closed by save)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes  # the write is void already; let torch come to its end

    def finish(self) -> None:
        """To the disk, or raise what went wrong on the way."""
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())


def save(path: Path, digest: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint at ``path`` by ``state`` (tensors and plain values in dicts and lists).

    Raises ValueError if it cannot be written (disk full, read-only); the old checkpoint is then intact
    and nothing half-written is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = _Flushed(temporary)
        with target.file:
            torch.save({"digest": digest, **state}, cast(IO[bytes], target))
            target.finish()
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "the one before it is intact" if path.is_file() else "there is none before it"
        reason = error.strerror or error
        raise ValueError(f"cannot write the checkpoint {path}: {reason}; {kept}. Make room and run the same command again") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path, digest: str) -> dict[str, Any] | None:
    """The state saved at ``path``, or None if there is none yet.

    Raises ValueError for a file that is damaged, or was written by a run with another configuration.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # once for all processes of a machine
        found = state.pop("digest")
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of ours, or damaged ({error}); remove it to start anew") from error
    if found != digest:
        raise ValueError(f"{path} belongs to a run of another configuration, data or code ({found}, not {digest}); remove it to start anew")
    return dict(state)
