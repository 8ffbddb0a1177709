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
parent instead.

Left out on purpose: system metrics, autologging, and MLflow's fluent API with its global state. This
is the only module of the package that imports mlflow.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from vapi import config as configs
from vapi import data
from vapi.config import ARTIFACTS, STAGES, Config

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("vapi.track")

POLL = 0.5  # seconds between two looks at the journal
PATIENCE = 30.0  # seconds a finished stage waits for a server that answers
GRACE = 6.0  # seconds a finished stage waits for a server that has not answered yet
BACKOFF = 30.0  # seconds before an unreachable server is tried again
KEEP = 30 * 24 * 3600.0  # seconds that a journal is kept after it was sent
PIECE = 500  # records sent between two notes of how far we came


# --- what a stage sees -------------------------------------------------------------------------


class Run:
    """Where a stage reports to. This one keeps nothing: tracking is off, or we are not rank 0."""

    def params(self, values: dict[str, Any]) -> None:
        """Parameters beyond the configuration, which is there already."""

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers at a step; without one they are final and belong to the whole execution too."""

    def image(self, key: str, image: Image | Path | str, step: int | None = None) -> None:
        """A picture (PIL, or the path of a PNG) for MLflow's image grid; final without a step."""

    def artifact(self, path: Path | str, folder: str = "") -> None:
        """A file or folder, copied now and kept beside the run."""

    def dataset(self, name: str, digest: str, source: Path | str) -> None:
        """The data that the run read. MLflow keeps 36 characters of the digest."""

    def tag(self, key: str, value: str) -> None:
        """A word about the run."""

    def server(self) -> Server | None:
        """MLflow itself, after everything so far has arrived there; None if tracking is off.

        For the stage that cannot do without. Raises ValueError when the server cannot be reached.
        """
        return None


NO_RUN = Run()


@dataclass(frozen=True)
class Server:
    """A reachable MLflow: the module, a client, the ids of this stage's run and its parent ("": none)."""

    mlflow: Any
    client: Any
    uri: str
    run: str
    parent: str
    lineage: dict[str, str]  # execution, data, git


@contextlib.contextmanager
def start(stage: str, config: Config, artifacts: Path = ARTIFACTS) -> Iterator[Run]:
    """Track one stage. Never raises or waits long because of an unreachable server.

    ``artifacts`` is the folder in which the stages' folders lie; it tells which earlier run made the
    inputs of a stage whose predecessors were skipped.
    """
    if config.track.uri == "off" or os.environ.get("RANK", "0") != "0":
        yield NO_RUN
        return
    run = _JournalRun(stage, config, artifacts)
    try:
        yield run
    except Exception:
        run.close("FAILED")
        raise
    except BaseException as stop:  # Ctrl-C, or a SIGTERM handler's exit
        run.close("FINISHED" if isinstance(stop, SystemExit) and not stop.code else "KILLED")
        raise
    run.close("FINISHED")


class _JournalRun(Run):
    """A run that writes its journal, with a process beside it that sends it."""

    def __init__(self, stage: str, config: Config, artifacts: Path) -> None:
        header = _header(stage, config, artifacts)
        self.stage, self.uri = stage, header["uri"]
        self.lineage = {"execution": header["execution"], "data": header["tags"]["data"], "git": header["tags"]["git"]}
        self.output, self.begin = artifacts / stage / "config.json", time.time()
        self.folder, self.lock = _claim(header)
        self.journal = open(self.folder / "journal.jsonl", "a")  # noqa: SIM115  (closed in close())
        self._write("start", **header)
        self._send()

    def _send(self) -> None:
        self.sender, self.spawned = _spawn(self.folder), time.monotonic()

    def _write(self, do: str, **fields: Any) -> None:
        self.journal.write(json.dumps({"do": do, "time": _now(), **fields}) + "\n")
        self.journal.flush()

    def _keep_sending(self) -> None:
        """The sender stops when it cannot reach the server; try again now and then."""
        if self.sender.poll() is not None and time.monotonic() - self.spawned > BACKOFF:
            self._send()

    def params(self, values: dict[str, Any]) -> None:
        self._write("params", values={_name(k): str(v) for k, v in values.items()})

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        self._write("metrics", values={_name(k): float(v) for k, v in values.items()}, step=step or 0, final=step is None)
        self._keep_sending()

    def image(self, key: str, image: Image | Path | str, step: int | None = None) -> None:
        key = re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII).replace("/", "~")
        # the name that MLflow's own log_image gives: its image grid reads key and step from it
        target = self._room() / f"{key}+step+{step or 0}+timestamp+{_now()}+{uuid.uuid4()}.png"
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
        self._write("tag", key=_name(key), value=str(value))

    def _room(self) -> Path:
        room = self.folder / "files" / uuid.uuid4().hex
        room.mkdir(parents=True)
        return room

    def server(self) -> Server:
        if self.sender.poll() is not None:
            self._send()
        state = self._wait(4 * PATIENCE)
        if state.offset < self.journal.tell():
            raise ValueError(
                f"the MLflow server at {self.uri} cannot be reached ({state.error or 'no answer'}); start it, or point track.uri "
                "(or MLFLOW_TRACKING_URI) at one that runs, then repeat the command"
            )
        client = connect(self.uri)
        import mlflow

        mlflow.set_tracking_uri(self.uri)  # for what no client does: logging a model
        mlflow.set_registry_uri(self.uri)
        mlflow.set_experiment(experiment_id=client.get_run(state.run).info.experiment_id)
        return Server(mlflow, client, self.uri, state.run, state.parent, self.lineage)

    def close(self, status: str) -> None:
        made = status == "FINISHED" and self.output.is_file() and self.output.stat().st_mtime >= self.begin
        self._write("end", status=status, output=f"{self.stage}:{data.file_digest(self.output)}" if made else "")
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

    def _wait(self, patience: float) -> _State:
        """Until the sender has caught up, gave up, or patience ran out."""
        begin = time.monotonic()
        while self.sender.poll() is None:
            state = _State.read(self.folder)
            known = state.reached or self.uri.startswith("sqlite:")
            if state.offset >= self.journal.tell() or time.monotonic() - begin > (patience if known else GRACE):
                break
            time.sleep(0.05)
        return _State.read(self.folder)


# --- the journal on disk -----------------------------------------------------------------------


@dataclass
class _State:
    """How far a journal is sent, and into which runs; kept beside it by the sender."""

    offset: int = 0
    run: str = ""
    parent: str = ""
    error: str = ""
    reached: bool = False  # the server has answered
    done: bool = False

    @classmethod
    def read(cls, folder: Path) -> _State:
        path = folder / "sent.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, folder: Path) -> None:
        configs.write_text(folder / "sent.json", json.dumps(vars(self)))


def _claim(header: dict[str, Any]) -> tuple[Path, FileLock]:
    """The journal's folder, held by a lock that dies with this process.

    A stage that was killed or failed and is started again goes on in the same journal, hence in the
    same MLflow run; one that had finished, or is still running elsewhere, gets a new one.
    """
    root = data.state_dir("track", header["execution"])
    last = max(root.glob(f"{header['stage']}-*"), key=_number, default=None)
    if last is not None:
        lock = FileLock(last / "writer.lock")
        with contextlib.suppress(Timeout, RuntimeError):
            lock.acquire(timeout=1)  # its sender looks at it now and then
            first, end = _ends(last)
            if end.get("status") != "FINISHED" and all(first.get(k) == header[k] for k in ("uri", "experiment", "attach")):
                header["journal"] = first["journal"]
                return last, lock
            lock.release()
    for number in range(_number(last) + 1 if last else 0, 1_000_000):
        folder = root / f"{header['stage']}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            lock = FileLock(folder / "writer.lock")
            lock.acquire()
            return folder, lock
    raise AssertionError("no free name for a journal")


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _ends(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """First and last record. Cuts off a last line that a killed writer left half written."""
    path = folder / "journal.jsonl"
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    lines = whole.splitlines()
    return (json.loads(lines[0]), json.loads(lines[-1])) if lines else ({}, {})


def _header(stage: str, config: Config, artifacts: Path) -> dict[str, Any]:
    root = data.project_root()
    flat = {name: str(value) for name, value in configs.flat(config).items() if not name.startswith("track.")}
    tags = {name: os.environ[name] for name in ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV") if os.environ.get(name)}
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    return {
        "journal": uuid.uuid4().hex,
        "stage": stage,
        "execution": execution(config),
        "uri": tracking_uri(config, root),
        "root": str(root),
        "experiment": config.track.experiment,
        "attach": os.environ.get("MLFLOW_RUN_ID", ""),
        "params": flat,
        "sections": STAGES[stage].sections,
        "tags": {"data": data_digest(config), "git": _git(), "mlflow.source.name": f"vapi {stage}", "mlflow.source.type": "LOCAL", **tags},
        "upstream": [f"{s}:{data.file_digest(p)}" for s in earlier if (p := artifacts / s / "config.json").is_file()],
    }


def execution(config: Config) -> str:
    """What identifies one execution of the pipeline: the resolved configuration and the data."""
    values = {name: value for name, value in configs.plain(config).items() if name != "track"}
    text = json.dumps([values, data_digest(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_digest(config: Config) -> str:
    """DVC's hash of ``data/`` when the source lies in it, else a hash of the source's names and sizes."""
    source, pointer = Path(config.subset.source).absolute(), Path("data.dvc").absolute()
    if pointer.is_file():
        outs = configs.read_yaml(pointer.read_text())["outs"]
        if any(source.is_relative_to(pointer.parent / out["path"]) for out in outs):
            hashes = [str(out["md5"]) for out in outs]
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


def _now() -> int:
    return time.time_ns() // 1_000_000


def _name(text: str) -> str:
    """A name that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", str(text))


# --- the sender --------------------------------------------------------------------------------


def _spawn(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that follows a journal; it outlives a killed run, so that its end is reported."""
    package = Path(__file__).parent.parent
    header = json.loads((folder / "journal.jsonl").open().readline())
    environment = {**os.environ, **_QUIET}
    # short, because a run waits for this; what fails is sent again later
    for name, value in (("MAX_RETRIES", 1), ("BACKOFF_FACTOR", 1), ("TIMEOUT", 10)):
        environment.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", str(value))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "vapi.track", str(folder)],
        cwd=header["root"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=open(folder / "sender.log", "wb"),  # the child's from here on
        start_new_session=True,
    )


_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def connect(uri: str) -> Any:
    """A client of the MLflow at ``uri``.

    A new SQLite database is created by one process while the others wait: MLflow itself does not
    lock, and two processes that meet there can leave it unusable.
    """
    os.environ.update(_QUIET)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    if uri.startswith("sqlite:"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            client.get_experiment("0")
    return client


def _unreachable(uri: str) -> str:
    """Why a server cannot be reached, or an empty string. Costs seconds at most, and no import of mlflow."""
    if not uri.startswith(("http://", "https://")):
        return ""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3).close()
    except urllib.error.HTTPError as error:  # it answers: a proxy that wants a password, a hosted MLflow without /health
        return f"HTTP {error.code}" if error.code >= 500 else ""
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""


def _ended(folder: Path) -> bool:
    """Whether nobody writes this journal any more: the writer's lock dies with it.

    A killed run could not write its last record; it is written here.
    """
    try:
        with FileLock(folder / "writer.lock", timeout=0):
            first, last = _ends(folder)
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
    return [path.parent for path in journals if not _State.read(path.parent).done and _ended(path.parent) and path.stat().st_size]


def resend() -> int:
    """Send every journal that waits (``vapi track --resend``). Returns how many still wait, and says why."""
    for folder in waiting()[:1]:
        _spawn(folder).wait()  # having sent its own, it sends the others
    left = waiting()
    for folder in left:
        log.warning("%s: %s", folder, _State.read(folder).error or "not sent yet")
    return len(left)


def follow(folder: Path, patience: float = -1) -> bool:
    """Send a journal while it is being written, until it ends. False when the server cannot be reached.

    If another process is sending it, wait for that one to finish: as long as it takes, or ``patience`` seconds.
    """
    with contextlib.suppress(Timeout), FileLock(folder / "sender.lock", timeout=patience):
        sender = _Sender(folder)
        while True:
            ended = _ended(folder)  # looked up before reading, so that no last word is missed
            try:
                sender.send()
            except Exception as error:  # (whatever the server or the network has to say: later)
                sender.note(error)
                return False
            if ended:
                return True
            time.sleep(POLL)
    return True


class _Sender:
    """Ships one journal to MLflow, from where the last sender stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = _State.read(folder)
        self.state.reached = False
        with (folder / "journal.jsonl").open() as file:
            self.header = json.loads(file.readline())
        self.client: Any = None
        self.points: dict[str, list[Any]] = {}

    def note(self, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self.state.error = lines[0][:300]
        self.state.write(self.folder)

    def send(self) -> None:
        """Send what the journal holds beyond the noted offset, a piece at a time."""
        with (self.folder / "journal.jsonl").open("rb") as file:
            file.seek(self.state.offset)
            while piece := [line for line in itertools.islice(file, PIECE) if line.endswith(b"\n")]:
                self._connect()
                for record in map(json.loads, piece):
                    getattr(self, f"_{record['do']}")(record)
                self._flush()
                self.state.offset += sum(map(len, piece))
                self.state.done = record["do"] == "end"
                self.state.write(self.folder)
        if self.state.done:
            shutil.rmtree(self.folder / "files", ignore_errors=True)

    def _connect(self) -> None:
        if self.client is None:
            if why := _unreachable(self.header["uri"]):
                raise ConnectionError(why)
            self.state.reached, self.state.error = True, ""
            self.state.write(self.folder)
            self.client = connect(self.header["uri"])

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """What the server refuses for good is noted and passed over: it must not hold up the rest."""
        from mlflow.exceptions import MlflowException

        try:
            call(*args, **kwargs)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"):
                raise
            self.note(error)

    def _targets(self, record: dict[str, Any]) -> list[str]:
        return [run for run in (self.state.run, self.state.parent if record["final"] else "") if run]

    # one method for each kind of record

    def _start(self, record: dict[str, Any]) -> None:
        self.state.run, self.state.parent = self._attach(record) if record["attach"] else self._runs(record)
        self.state.write(self.folder)
        own = {name: value for name, value in record["params"].items() if name.split(".")[0] in record["sections"]}
        self._batch(self.state.run, own, {**record["tags"], "stage": record["stage"], "vapi.execution": record["execution"]})
        if not record["attach"]:
            self._batch(self.state.parent, record["params"], record["tags"])
            self._tag_makers(record)

    def _attach(self, record: dict[str, Any]) -> tuple[str, str]:
        run = self.client.get_run(record["attach"])
        return run.info.run_id, run.data.tags.get("mlflow.parentRunId", "")

    def _runs(self, record: dict[str, Any]) -> tuple[str, str]:
        """This stage's run and its parent, found or made. A lock keeps two stages from making two parents."""
        short, name = record["execution"][:8], record["tags"].get("DVC_EXP_NAME", "")
        with FileLock(self.folder.parent.parent / "runs.lock"):
            self.experiment = self._experiment(record["experiment"])
            marks = {"vapi.execution": record["execution"], "stage": "pipeline"}
            parent = self._run(marks, f"{name or 'vapi'} {short}", record)
            marks = {"vapi.journal": record["journal"], "mlflow.parentRunId": parent, "stage": record["stage"]}
            run = self._run(marks, f"{record['stage']} {short}", record)
        for each in (parent, run):
            self.client.update_run(each, status="RUNNING")
        return run, parent

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self.client.create_experiment(name)
        except MlflowException:  # another machine was faster
            return self.client.get_experiment_by_name(name).experiment_id

    def _run(self, marks: dict[str, str], name: str, record: dict[str, Any]) -> str:
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in marks.items())
        found = self.client.search_runs([self.experiment], wanted, max_results=1, order_by=["attributes.start_time ASC"])
        if found:
            return found[0].info.run_id
        tags = {**marks, "mlflow.user": getpass.getuser()}
        return self.client.create_run(self.experiment, start_time=record["time"], tags=tags, run_name=name).info.run_id

    def _tag_makers(self, record: dict[str, Any]) -> None:
        """Point the parent at the runs of other executions that made the inputs of stages skipped here."""
        for output in record["upstream"]:
            made = f"tags.`vapi.output` = '{output}'"
            found = self.client.search_runs([self.experiment], made, order_by=["attributes.start_time DESC"])
            if found and all(run.data.tags.get("mlflow.parentRunId") != self.state.parent for run in found):
                self.client.set_tag(self.state.parent, f"vapi.from.{output.partition(':')[0]}", found[0].info.run_id)

    def _params(self, record: dict[str, Any]) -> None:
        self._batch(self.state.run, record["values"], {})

    def _batch(self, run: str, params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        entries = [Param(name, value) for name, value in params.items()]
        for at in range(0, len(entries), 100):
            self._try(self.client.log_batch, run, params=entries[at : at + 100])
        self._try(self.client.log_batch, run, tags=[RunTag(name, value) for name, value in tags.items()])

    def _metrics(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        for run in self._targets(record):
            points = self.points.setdefault(run, [])
            points += [Metric(k, v, record["time"], record["step"]) for k, v in record["values"].items()]

    def _flush(self) -> None:
        """Metrics in few calls: one costs what a thousand cost."""
        for run, points in self.points.items():
            for at in range(0, len(points), 1000):
                self._try(self.client.log_batch, run, metrics=points[at : at + 1000])
        self.points = {}

    def _image(self, record: dict[str, Any]) -> None:
        """Laid out as MLflow's own log_image does, but under a name that is the same when it is sent again."""
        from mlflow.tracking.multimedia import compress_image_size
        from PIL import Image

        path = self.folder / record["file"]
        small = path.with_name(f"{path.stem}+compressed.webp")
        with Image.open(path) as image:
            compress_image_size(image).save(small)
        for run in self._targets(record):
            for file in (path, small):
                self.client.log_artifact(run, str(file), "images")
            self.client.set_tag(run, "mlflow.loggedImages", "True")

    def _artifact(self, record: dict[str, Any]) -> None:
        path, folder = self.folder / record["file"], record["folder"]
        if path.is_dir():
            self.client.log_artifacts(self.state.run, str(path), f"{folder}/{path.name}".strip("/"))
        else:
            self.client.log_artifact(self.state.run, str(path), folder or None)

    def _dataset(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": record["source"]})
        entry = DatasetInput(
            Dataset(record["name"], record["digest"], "local", source), [InputTag("mlflow.data.context", self.header["stage"])]
        )
        for run in filter(None, (self.state.run, self.state.parent)):
            self._try(self.client.log_inputs, run, datasets=[entry])

    def _tag(self, record: dict[str, Any]) -> None:
        self._try(self.client.set_tag, self.state.run, record["key"], record["value"])

    def _end(self, record: dict[str, Any]) -> None:
        self._flush()
        if record["output"]:
            self._try(self.client.set_tag, self.state.run, "vapi.output", record["output"])
        if not self.header["attach"]:  # whoever made an injected run also ends it
            for run in (self.state.run, self.state.parent):
                self.client.set_terminated(run, record["status"], record["time"])


def main(folder: Path) -> bool:
    """The process beside a run: send its journal, then what others left."""
    sent = follow(folder)
    if sent:
        root = folder.parent.parent
        for other in waiting(root):
            follow(other, patience=0)
        _prune(root)
    return sent


def _prune(root: Path) -> None:
    """Forget journals that were sent a month ago."""
    for path in root.glob("*/*-*/sent.json"):
        if _State.read(path.parent).done and time.time() - path.stat().st_mtime > KEEP and _ended(path.parent):
            shutil.rmtree(path.parent)


if __name__ == "__main__":
    os.nice(10)
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
