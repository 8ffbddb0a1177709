"""Where runs are compared: MLflow, reached through a journal.

What a stage logs goes into an append-only journal on disk, and nothing else happens in the stage's
own process: it never imports mlflow, never waits for a server, and loses nothing when it is killed.
A second process reads the journal and ships it in batches. It remembers how far it came, and every
record carries its own time and name, so sending one twice changes nothing. A server that cannot be
reached costs a run one line of notice; the journal waits until the next run or ``vapi track
--resend``.

One parent run per pipeline execution, one child per stage. The parent is found by the hash of the
resolved configuration and the data's digest, so stages that run apart meet in it. Metrics and images
without a step are final: they go to the parent too, under the same names, so that two executions line
up in the compare view. Under an injected run (``MLFLOW_RUN_ID``) the stage logs into that run and its
parent instead. An experiment (``vapi experiment``) is a parent of its own, with a child for each row of
its table.

``journal.py`` is the files on disk, ``sender.py`` the other process, ``reader.py`` the way back, this file the stage's side. Left
out on purpose: system metrics, autologging, and MLflow's fluent API with its global state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vapi import config as configs
from vapi import data
from vapi.config import ARTIFACTS, STAGES, Config
from vapi.run import NO_RUN, Run, Server
from vapi.track import sender
from vapi.track.journal import State, claim, name_for, now, waiting
from vapi.track.reader import RECORD, attach, fetch
from vapi.track.sender import answering, connect, out_of_reach, resend

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "RECORD", "answering", "attach", "connect", "data_digest", "execution", "fetch", "registry", "resend", "start", "start_point",
    "tracking_uri", "waiting",
]  # fmt: skip

log = logging.getLogger("vapi.track")

GIVEN = "VAPI_RUN"
"""Environment: what whoever starts a stage knows better than the stage, as JSON. ``execution`` (the pipeline run it belongs to),
``data`` and ``git`` (where there is no clone to read them from), and more ``tags``."""

PATIENCE = 30.0  # seconds a finished stage waits for a server that answers
GRACE = 6.0  # seconds a finished stage waits for a server that has not answered yet
BACKOFF = 30.0  # seconds before an unreachable server is tried again


@contextlib.contextmanager
def start(stage: str, config: Config, folders: Mapping[str, Path] | None = None) -> Iterator[Run]:
    """Track one stage. Never raises or waits long because of an unreachable server.

    ``folders`` are the stage's inputs by name, and its ``out``, where they do not lie in artifacts/; they tell
    which earlier run made the inputs of a stage whose predecessors were skipped.
    """
    if config.track.uri == "off" or os.environ.get("RANK", "0") != "0":
        yield NO_RUN
        return
    folders = folders or {}
    with _ended(_JournalRun(_header(stage, config, folders), folders.get("out", ARTIFACTS / stage) / "config.json")) as run:
        yield run


@contextlib.contextmanager
def start_point(grid: str, number: int, name: str, config: Config, key: str) -> Iterator[Run]:
    """Track a row of an experiment's table: a run named ``name``, nested in the one of the grid with this configuration.

    ``key`` names what the row's numbers follow from: the same row goes into the same run however often it is logged.
    """
    if config.track.uri == "off":
        yield NO_RUN
        return
    with _ended(_JournalRun(_point_header(grid, number, name, config, key))) as run:
        yield run


@contextlib.contextmanager
def _ended(run: _JournalRun) -> Iterator[Run]:
    """A run that is told how its block ended."""
    try:
        yield run
    except Exception:
        run.close("FAILED")
        raise
    except BaseException as stop:  # Ctrl-C, or a SIGTERM handler's exit
        run.close("FINISHED" if isinstance(stop, SystemExit) and not stop.code else "KILLED")
        raise
    run.close("FINISHED")


@contextlib.contextmanager
def registry(config: Config) -> Iterator[Any]:
    """A client of the MLflow that a configuration names, for what is no stage. Raises ValueError where there is none."""
    if config.track.uri == "off":
        raise ValueError("tracking is off (track.uri), and the registry is part of MLflow; name a server, or leave it empty for mlflow.db")
    with answering(tracking_uri(config, data.project_root())) as client:
        yield client


class _JournalRun(Run):
    """A run that writes its journal, with a process beside it that sends it."""

    def __init__(self, header: dict[str, Any], output: Path | None = None) -> None:
        self.stage, self.uri = header["stage"], header["uri"]
        self.lineage = {"execution": header["execution"], "data": header["tags"]["data"], "git": header["tags"]["git"]}
        self.output, self.begin = output, time.time()
        self.folder, self.lock = claim(header)
        self.journal = open(self.folder / "journal.jsonl", "a")  # noqa: SIM115  (closed in close())
        self._write("start", **header)
        self._send()

    def _send(self) -> None:
        self.sender, self.spawned = sender.spawn(self.folder), time.monotonic()

    def _write(self, do: str, **fields: Any) -> None:
        self.journal.write(json.dumps({"do": do, "time": now(), **fields}) + "\n")
        self.journal.flush()

    def _keep_sending(self) -> None:
        """The sender stops when it cannot reach the server; try again now and then."""
        if self.sender.poll() is not None and time.monotonic() - self.spawned > BACKOFF:
            self._send()

    def params(self, values: dict[str, Any]) -> None:
        self._write("params", values={name_for(k): str(v) for k, v in values.items()})

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        self._write("metrics", values={name_for(k): float(v) for k, v in values.items()}, step=step or 0, final=step is None)
        self._keep_sending()

    def image(self, key: str, image: Image | Path | str, step: int | None = None) -> None:
        key = re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII).replace("/", "~")
        # the name that MLflow's own log_image gives: its image grid reads key and step from it
        target = self._room() / f"{key}+step+{step or 0}+timestamp+{now()}+{uuid.uuid4()}.png"
        if isinstance(image, (str, Path)):
            shutil.copyfile(image, target)
        else:
            image.save(target)
        self._write("image", file=str(target.relative_to(self.folder)), final=step is None)

    def artifact(self, path: Path | str, folder: str = "") -> None:
        path, target = Path(path), self._room() / Path(path).name
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
        self._write("artifact", file=str(target.relative_to(self.folder)), folder=folder)

    def dataset(self, name: str, digest: str, source: Path | str) -> None:
        self._write("dataset", name=name, digest=digest[:36], source=str(source))

    def tag(self, key: str, value: str) -> None:
        self._write("tag", key=name_for(key), value=str(value))

    def _room(self) -> Path:
        room = self.folder / "files" / uuid.uuid4().hex
        room.mkdir(parents=True)
        return room

    def server(self) -> Server:
        if self.sender.poll() is not None:
            self._send()
        state = self._wait(4 * PATIENCE)
        if state.offset < self.journal.tell():
            raise out_of_reach(self.uri, state.error or "no answer")
        client, mlflow = connect(self.uri), sender.fluent(self.uri, state.run)
        return Server(mlflow, client, self.uri, state.run, state.parent, self.lineage)

    def close(self, status: str) -> None:
        output = self.output if status == "FINISHED" else None
        made = output is not None and output.is_file() and output.stat().st_mtime >= self.begin
        self._write("end", status=status, output=f"{self.stage}:{data.file_digest(output)}" if output and made else "")
        self.lock.release()
        self._keep_sending()
        state = self._wait(PATIENCE)
        if state.offset < self.journal.tell():
            log.warning(
                "MLflow at %s has not got all of this run (%s); it waits in %s, and goes with the next run or: vapi track --resend",
                self.uri, state.error or "slow answer", self.folder,
            )  # fmt: skip
        elif state.error:
            log.warning("MLflow at %s refused a part of this run: %s", self.uri, state.error)
        self.journal.close()

    def _wait(self, patience: float) -> State:
        """Until the sender has caught up, gave up, or patience ran out."""
        begin = time.monotonic()
        while self.sender.poll() is None:
            state = State.read(self.folder)
            known = state.reached or self.uri.startswith("sqlite:")
            if state.offset >= self.journal.tell() or time.monotonic() - begin > (patience if known else GRACE):
                break
            time.sleep(0.05)
        return State.read(self.folder)


# --- what identifies a run ---------------------------------------------------------------------


def _header(stage: str, config: Config, folders: Mapping[str, Path]) -> dict[str, Any]:
    given = json.loads(os.environ.get(GIVEN, "{}"))
    known = configs.sections_so_far(stage)  # on a cluster a stage knows no later ones, which may differ for the same result
    flat = {name: str(value) for name, value in configs.flat(config).items() if name.partition(".")[0] in known}
    tags = {name: os.environ[name] for name in ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV") if os.environ.get(name)}
    tags |= {"data": given.get("data") or data_digest(config), "git": given.get("git") or _git(), **given.get("tags", {})}
    earlier = {name: folders.get(name, ARTIFACTS / name) / "config.json" for name in list(STAGES)[: list(STAGES).index(stage)]}
    return _common(config) | {
        "journal": uuid.uuid4().hex,
        "stage": stage,
        "name": stage,
        "parent": {"stage": "pipeline", "name": tags.get("DVC_EXP_NAME", "vapi")},
        "execution": given.get("execution") or execution(config),
        "attach": os.environ.get("MLFLOW_RUN_ID", ""),
        "params": flat,
        "sections": STAGES[stage].sections,
        "tags": {"mlflow.source.name": f"vapi {stage}", "mlflow.source.type": "LOCAL", **tags},
        "upstream": [f"{name}:{data.file_digest(path)}" for name, path in earlier.items() if path.is_file()],
    }


def _point_header(grid: str, number: int, name: str, config: Config, key: str) -> dict[str, Any]:
    """The parent has the grid's configuration as parameters, its points what they vary."""
    given = json.loads(os.environ.get(GIVEN, "{}"))
    whole = data.short_digest(f"{grid}\0{given.get('execution') or execution(config)}")
    return _common(config) | {
        "journal": hashlib.sha256(f"{whole}\0{name}\0{key}".encode()).hexdigest()[:32],
        "stage": f"point{number}",
        "name": name,
        "parent": {"stage": "experiment", "name": grid},
        "execution": whole,
        "attach": "",
        "params": {field: str(value) for field, value in configs.flat(config).items()},
        "sections": (),
        "tags": {
            "mlflow.source.name": f"vapi experiment {grid}",
            "mlflow.source.type": "LOCAL",
            "data": given.get("data") or data_digest(config),
            "git": given.get("git") or _git(),
            **given.get("tags", {}),
        },
        "upstream": [],
    }


def _common(config: Config) -> dict[str, Any]:
    """Where a run goes."""
    root = data.project_root()
    return {"uri": tracking_uri(config, root), "root": str(root), "experiment": config.track.experiment}


def execution(config: Config) -> str:
    """What identifies one execution of the pipeline: the resolved configuration and the data."""
    values = {name: value for name, value in configs.plain(config).items() if name != "track"}
    return data.short_digest(json.dumps([values, data_digest(config)], sort_keys=True))


def data_digest(config: Config) -> str:
    """DVC's hashes of what the configuration names of ``data/``, when the source lies in it, else the source's names and sizes."""
    source, pointer = Path(config.subset.source).absolute(), Path("data.dvc").absolute()
    if pointer.is_file():
        outs = configs.read_yaml(pointer.read_text())["outs"]
        if any(source.is_relative_to(pointer.parent / out["path"]) for out in outs):
            named = [Path(name).absolute() for name in configs.named_files(config).values()]
            hashes = [str(out["md5"]) for out in outs if any(name.is_relative_to(pointer.parent / out["path"]) for name in named)]
            return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:32]
    found = sorted(source.iterdir()) if source.is_dir() else [source]
    listing = [(path.name, path.stat().st_size if path.is_file() else -1) for path in found]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]


def tracking_uri(config: Config, root: Path) -> str:
    """Configuration first, then MLFLOW_TRACKING_URI, then the database where ``mlflow ui`` in the clone looks."""
    return config.track.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def _git() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(FileNotFoundError):  # a machine without git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "none"
    return "none"
