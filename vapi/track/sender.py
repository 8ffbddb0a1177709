"""The process that ships journals to MLflow; the only module of the package that imports mlflow."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vapi.track.journal import State, ended, waiting

log = logging.getLogger("vapi.track")

POLL = 0.5  # seconds between two looks at the journal
KEEP = 30 * 24 * 3600.0  # seconds that a journal is kept after it was sent
PIECE = 500  # records sent between two notes of how far we came
UPSTREAM = "vapi.from."
"""What the tags of an execution begin with that name the runs of earlier ones which made its inputs, by stage."""


def spawn(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that follows a journal; it outlives a killed run, so that its end is reported."""
    package = Path(__file__).parents[2]
    header = json.loads((folder / "journal.jsonl").open().readline())
    environment = {**_HASTY, **os.environ, **_QUIET}  # a run waits for this; what fails is sent again later
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
_HASTY = {f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in (("MAX_RETRIES", "1"), ("BACKOFF_FACTOR", "1"), ("TIMEOUT", "10"))}
"""How long MLflow tries to reach a server where somebody waits; its own choice is minutes."""


def connect(uri: str) -> Any:
    """A client of the MLflow at ``uri``.

    A new SQLite database is created by one process while the others wait: MLflow itself does not
    lock, and two processes that meet there can leave it unusable.
    """
    os.environ.update(_QUIET)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    path = _database(uri)
    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)  # which makes the tables


def _database(uri: str) -> Path | None:
    """The file of an SQLite database; None for a server."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:") else None


def fluent(uri: str, run: str) -> Any:
    """The module mlflow, set to ``uri`` and to the experiment of a run: for what no client does, logging a model."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.set_experiment(experiment_id=connect(uri).get_run(run).info.experiment_id)
    return mlflow


def unreachable(uri: str) -> str:
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


def out_of_reach(uri: str, why: str) -> ValueError:
    """An MLflow that somebody needs now, and that does not answer."""
    return ValueError(
        f"the MLflow server at {uri} cannot be reached ({why}); start it, or point track.uri (or MLFLOW_TRACKING_URI) at one that runs, "
        "then repeat the command"
    )


@contextlib.contextmanager
def answering(uri: str) -> Iterator[Any]:
    """A client of an MLflow that is there. What it refuses is a ValueError with its words, and so is one that is not there."""
    database = _database(uri)
    if database is not None and not database.is_file():
        raise ValueError(f"{database} is not here: nothing was tracked yet; a registry begins with: vapi register")
    if why := unreachable(uri):
        raise out_of_reach(uri, why)
    for name, value in _HASTY.items():
        os.environ.setdefault(name, value)
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        yield client
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} says: {str(error).strip().splitlines()[0]}") from error


def kept(client: Any, run: str) -> Any:
    """A run by its id; None for one that was deleted, whether MLflow still holds it or not."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


def resend() -> int:
    """Send every journal that waits (``vapi track --resend``). Returns how many still wait, and says why."""
    for folder in waiting():
        if not State.read(folder).done:  # a process that has sent its own sends the others too
            spawn(folder).wait()
    left = waiting()
    for folder in left:
        log.warning("%s: %s", folder, State.read(folder).error or "not sent yet")
    return len(left)


def follow(folder: Path, patience: float = -1) -> bool:
    """Send a journal while it is being written, until it ends. False when the server cannot be reached.

    If another process is sending it, wait for that one to finish: as long as it takes, or ``patience`` seconds.
    """
    with contextlib.suppress(Timeout), FileLock(folder / "sender.lock", timeout=patience):
        sender = _Sender(folder)
        while True:
            last = ended(folder)  # looked up before reading, so that no last word is missed
            try:
                sender.send()
            except Exception as error:  # (whatever the server or the network has to say: later)
                sender.note(error)
                return False
            if last:
                return True
            time.sleep(POLL)
    return True


class _Sender:
    """Ships one journal to MLflow, from where the last sender stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = State.read(folder)
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
                self.state.reached = True
                self.state.offset += sum(map(len, piece))
                self.state.done = record["do"] == "end"
                self.state.write(self.folder)
        if self.state.done:
            shutil.rmtree(self.folder / "files", ignore_errors=True)

    def _connect(self) -> None:
        if self.client is None:
            if why := unreachable(self.header["uri"]):
                raise ConnectionError(why)
            self.state.error = ""
            if self.header["uri"].startswith("http"):  # it has just answered, which a run may know before mlflow is imported
                self.state.reached = True
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
        short, above = record["execution"][:8], record["parent"]
        with FileLock(self.folder.parent.parent / "runs.lock"):
            self.experiment = self._experiment(record["experiment"])
            marks = {"vapi.execution": record["execution"], "stage": above["stage"]}
            parent = self._run(marks, f"{above['name']} {short}", record)
            marks = {"vapi.journal": record["journal"], "mlflow.parentRunId": parent, "stage": record["stage"]}
            run = self._run(marks, f"{record['name']} {short}", record)
        for each in (parent, run):
            self.client.update_run(each, status="RUNNING")
        return run, parent

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        database = _database(self.header["uri"])
        # MLflow's own choice is mlruns/ wherever the first process happened to stand, which in a container may be read-only
        beside = str(database.parent / "mlruns") if database else None
        try:
            return self.client.create_experiment(name, beside)
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
                self.client.set_tag(self.state.parent, f"{UPSTREAM}{output.partition(':')[0]}", found[0].info.run_id)

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
        if State.read(path.parent).done and time.time() - path.stat().st_mtime > KEEP and ended(path.parent):
            shutil.rmtree(path.parent)
