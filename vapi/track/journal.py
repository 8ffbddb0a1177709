"""A run's journal on disk: journal.jsonl, written by the stage; sent.json, kept by who sends it; two locks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vapi import config as configs
from vapi import data


@dataclass
class State:
    """How far a journal is sent, and into which runs; kept beside it by the sender."""

    offset: int = 0
    run: str = ""
    parent: str = ""
    error: str = ""
    reached: bool = False  # the server has answered this sender
    done: bool = False

    @classmethod
    def read(cls, folder: Path) -> State:
        path = folder / "sent.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, folder: Path) -> None:
        configs.write_text(folder / "sent.json", json.dumps(vars(self)))


def claim(header: dict[str, Any]) -> tuple[Path, FileLock]:
    """The journal's folder, held by a lock that dies with this process.

    A stage that was killed or failed and is started again goes on in the same journal, hence in the
    same MLflow run; one that had finished, or is still running elsewhere, gets a new one.
    """
    root = data.state_dir("track", header["execution"])
    last = max(root.glob(f"{header['stage']}-*"), key=number_of, default=None)
    if last is not None:
        lock = FileLock(last / "writer.lock")
        with contextlib.suppress(Timeout, RuntimeError):
            lock.acquire(timeout=1)  # its sender looks at it now and then
            first, end = ends(last)
            if end.get("status") != "FINISHED" and all(first.get(k) == header[k] for k in ("uri", "experiment", "attach")):
                header["journal"] = first["journal"]
                return last, lock
            lock.release()
    for number in range(number_of(last) + 1 if last else 0, 1_000_000):
        folder = root / f"{header['stage']}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            lock = FileLock(folder / "writer.lock")
            lock.acquire()
            return folder, lock
    raise AssertionError("no free name for a journal")


def number_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def ends(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """First and last record. Cuts off a last line that a killed writer left half written."""
    path = folder / "journal.jsonl"
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    lines = whole.splitlines()
    return (json.loads(lines[0]), json.loads(lines[-1])) if lines else ({}, {})


def ended(folder: Path) -> bool:
    """Whether nobody writes this journal any more: the writer's lock dies with it.

    A killed run could not write its last record; it is written here.
    """
    try:
        with FileLock(folder / "writer.lock", timeout=0):
            first, last = ends(folder)
            if first and last["do"] != "end":
                path = folder / "journal.jsonl"
                when = int(path.stat().st_mtime * 1000)
                with path.open("a") as file:
                    file.write(json.dumps({"do": "end", "time": when, "status": "KILLED", "output": ""}) + "\n")
    except (Timeout, RuntimeError):  # held by another process, or by this one
        return False
    return True


def waiting(root: Path | None = None) -> list[Path]:
    """Journals that nobody writes any more and that are not sent to the end."""
    journals = sorted((root or data.state_dir("track")).glob("*/*-*/journal.jsonl"))
    return [path.parent for path in journals if not State.read(path.parent).done and ended(path.parent) and path.stat().st_size]


def now() -> int:
    return time.time_ns() // 1_000_000


def name_for(text: str) -> str:
    """A name that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", str(text))
