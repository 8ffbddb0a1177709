"""A stage as a step of a pipeline: the command that a terminal would type, in the right place, on the right data.

A step gets its plan from ``preflight`` and folders of earlier steps from Kubeflow. Without a volume everything travels
as artifacts, and what the stage keeps for itself (resume state, token cache) dies with the pod. With one, a stage writes

    <work dir>/artifacts/<stage>/<key>/      what it made; key: hash of configuration, data and code
    <work dir>/.vapi/                        what outlives it

and the artifact holds the small files beside a descriptor (path, sha256) of the large ones. The key knows nothing of
the run, so a retry or a cloned run continues what was begun, and finds what is finished.

The stage runs as a process of its own, with a session of its own: SIGTERM for the step is handed to it once, and it is
waited for. If the step is killed, the kernel kills it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vapi import config, data, keys, signals
from vapi.cluster import origin
from vapi.cluster.origin import Origin
from vapi.config import STAGES, Config

Plan = dict[str, Any]
"""What preflight resolved for a stage, as plain values: ``config`` (the sections that its result follows from), ``data`` (uri,
revision, digest), ``files`` (sha256 of the files that the sections name, without a volume) and ``code`` (version, commit, source).
It is the step's whole input beside artifacts, so Kubeflow's cache sees what changes the result, and nothing else. In an experiment
there are also ``tags``, which say whose run it is."""

DESCRIPTOR = "descriptor.json"
FAILED = "failed.txt"
"""In the artifact of a stage that will not make its result, in place of all else: who failed."""
SMALL = 4 << 20
"""Bytes up to which a file travels as an artifact although there is a volume."""
DEED = "register"
"""The stage that changes something elsewhere: it is done every time, and what it writes is small."""
LOCK_SECONDS = 900.0
"""To wait for whoever makes the same result: as long as a volume keeps the lock of a node that was lost, and not so long that
eight GPUs wait for another eight."""
NOT_HERE = "mount the volume that it was written to, or run the step that makes it again"


def run(stage: str, plan: Plan, work_dir: str, out: str, launch: Callable[[Command], int] | None = None, **inputs: str) -> Path:
    """Run a stage and fill the artifact ``out``. ``inputs``: artifacts of earlier steps, by stage. ``launch`` runs the
    command elsewhere than here. Returns the folder that the stage wrote.

    Raises SystemExit with the stage's own code when it fails, and 2 when it cannot begin; the log says why.
    """
    with in_words(), workplace(work_dir) as place:
        settings = settings_of(plan)
        named = config.named_files(settings, STAGES[stage].sections)
        os.chdir(origin.root(Origin(plan["data"]["uri"], plan["data"]["revision"]), named.values(), place.state))
        _require_same(settings, stage, plan)
        folders = {name: opened(Path(path)) for name, path in inputs.items()}
        if place.volume is None or stage == DEED:
            _make(stage, settings, plan, folders, Path(out), launch or here)
            return Path(out)
        target = place.volume / "artifacts" / stage / _key(stage, settings, inputs)
        with data.locked(target.with_suffix(".lock"), wait=LOCK_SECONDS):
            if (target / "config.json").is_file():
                print(f"{target} holds this result already", flush=True)
            else:
                target.with_suffix(".json").unlink(missing_ok=True)
                _make(stage, settings, plan, folders, target, launch or here)
            _describe(stage, target, Path(out))
        return target


def attempt(stage: str, plan: Plan, work_dir: str, out: str, **inputs: str) -> Path | None:
    """``run``; but what fails for good in an experiment leaves the other rows alone: the artifact ``out`` says so, and None comes back.

    For good is a mistake, of which another start would say the same, and all that would follow from its result. Without a volume a
    mistake ends the step as it does elsewhere, since Kubeflow's cache would keep the answer.
    """
    notes = list(filter(None, (failure(Path(path)) for path in inputs.values())))
    if not notes:
        try:
            return run(stage, plan, work_dir, out, None, **inputs)
        except SystemExit as stop:
            if not (work_dir and "tags" in plan and stop.code == signals.MISTAKE):
                raise
        notes = [f"{stage} of {', '.join(plan['tags'].values())} failed; why, its log says"]
    print(notes[0], file=sys.stderr, flush=True)
    config.write_text(Path(out) / FAILED, notes[0])
    return None


def failure(artifact: Path) -> str:
    """Who failed, if an artifact holds that in place of a result; else nothing."""
    note = artifact / FAILED
    return note.read_text() if note.is_file() else ""


def settings_of(plan: Plan) -> Config:
    """The configuration that a plan carries; sections that are nothing to the stage have their defaults."""
    values = {**config.plain(Config()), **plan["config"]}
    if not (values["track"]["uri"] or os.environ.get("MLFLOW_TRACKING_URI")):
        values["track"] = {**values["track"], "uri": "off"}  # the database of a clone would be lost with the pod
    return config.build(Config, values)


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """A mistake that its message names ends the step with that message, as it ends a command, and not with a traceback."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


@dataclass(frozen=True)
class Place:
    """Where a step works: the volume, if there is one, and the folder for what outlives a stage (or as long as the pod lives)."""

    state: Path
    volume: Path | None = None


@contextlib.contextmanager
def workplace(work_dir: str) -> Iterator[Place]:
    """The place of a step, told to the processes that it starts. ``work_dir`` is where the package mounts its volume (empty: it
    has none); where a volume cannot be mounted, VAPI_WORK_DIR names a folder in place of it."""
    with contextlib.ExitStack() as stack:
        if work_dir:
            volume = Path(os.environ.get("VAPI_WORK_DIR") or work_dir)
            if not volume.is_dir():
                raise ValueError(f"{volume} is not here; is the volume mounted there?")
            os.environ.setdefault("TORCH_HOME", f"{volume}/torch")
            os.environ.setdefault("HF_HOME", f"{volume}/huggingface")
            place = Place(volume / ".vapi", volume)
        else:
            own = os.environ.get("VAPI_STATE") or stack.enter_context(tempfile.TemporaryDirectory(prefix="vapi-"))
            place = Place(Path(own))
        os.environ["VAPI_STATE"] = str(place.state)
        yield place


def _require_same(settings: Config, stage: str, plan: Plan) -> None:
    """Raises ValueError if the data are not those that preflight saw: the cache would believe otherwise."""
    if not plan["files"]:
        return
    for field, digest in origin.digests(settings, STAGES[stage].sections).items():
        if plan["files"].get(field) != digest:
            raise ValueError(f"{field} has changed since preflight looked at it; start the run again")


# --- the stage's own process -------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A stage as a command line, with the environment it needs beside the present one."""

    stage: str
    folders: Mapping[str, Path]
    settings: Config
    environment: Mapping[str, str]

    def words(self, params: Path) -> list[str]:
        """What to type after the interpreter, given where the configuration is written."""
        folders = [word for name, path in self.folders.items() for word in (f"--{name}", str(path))]
        return ["-m", "vapi", self.stage, "--params", str(params), *folders]


def _make(stage: str, settings: Config, plan: Plan, folders: Mapping[str, Path], out: Path, launch: Callable[[Command], int]) -> None:
    code = launch(Command(stage, {**folders, "out": out}, settings, {"VAPI_RUN": json.dumps(known(plan))}))
    if code:
        print(f"vapi {stage} ended with code {code}; its words are above", file=sys.stderr, flush=True)
        raise SystemExit(code)


def known(plan: Plan) -> dict[str, Any]:
    """What the tracker cannot see from inside a pod. The runs of an experiment are executions of their own."""
    run = os.environ.get("KFP_RUN_ID", "")  # from the pod's label, since a parameter would be part of the cache's key
    own: dict[str, str] = plan.get("tags", {})
    tags = {"kubeflow.run": run, "data.uri": plan["data"]["uri"], "data.revision": plan["data"]["revision"], **own}
    return {
        "execution": data.short_digest(json.dumps([run, own], sort_keys=True)) if own else run,
        "data": plan["data"]["digest"],
        "git": plan["code"]["commit"] or "none",
        "tags": {name: value for name, value in tags.items() if value},
    }


def here(command: Command) -> int:
    """Run a stage on this machine; its exit code."""
    with tempfile.TemporaryDirectory(prefix="vapi-") as folder:
        params = Path(folder) / "params.yaml"
        config.write_text(params, config.dump(command.settings, comments=False))
        environment = {**os.environ, **command.environment, "VAPI_STARTED_BY": str(os.getpid())}
        # the data may lie in a checkout of this very project, and its code must not run in place of ours
        environment |= {
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(origin.IMAGE), os.environ.get("PYTHONPATH")])),
        }
        words = [sys.executable, *command.words(params)]
        child = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        with signals.handed_on(lambda number: child.send_signal(number)):  # (which does nothing to one that has ended)
            _relay(child.stdout)
            return signals.exit_code(child.wait())


def _relay(words: IO[bytes] | None) -> None:
    """Print what the stage says as it says it. When whoever listened is gone, the stage must not notice: it still has a
    checkpoint to write."""
    assert words is not None
    for line in words:
        with contextlib.suppress(OSError):
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


# --- artifacts and the volume ------------------------------------------------------------------


def _key(stage: str, settings: Config, inputs: Mapping[str, str]) -> str:
    """Names a result after what it follows from."""
    made = {name: _descriptor(Path(path))["sha256"] for name, path in inputs.items()}
    return keys.of(stage, settings, made, data.code_version()["source"])


def _describe(stage: str, target: Path, out: Path) -> None:
    """Fill the artifact: a descriptor of the folder on the volume, and copies of the small files in it."""
    note = target.with_suffix(".json")  # the digest of gigabytes is computed once
    found = {path.relative_to(target).as_posix(): path for path in sorted(target.rglob("*")) if path.is_file()}
    if not note.is_file():
        sizes = {name: path.stat().st_size for name, path in found.items()}
        data.write_json(note, {"stage": stage, "path": str(target), "sha256": data.file_digest(target), "bytes": sizes})
    for name, path in found.items():
        if path.stat().st_size <= SMALL:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)
    shutil.copyfile(note, out / DESCRIPTOR)


def _descriptor(artifact: Path) -> dict[str, Any]:
    if not (artifact / DESCRIPTOR).is_file():
        raise ValueError(f"{artifact} holds no {DESCRIPTOR}, although there is a volume; it comes from a run without one")
    return data.read_json(artifact / DESCRIPTOR)


def opened(artifact: Path) -> Path:
    """The folder that a stage wrote: the artifact itself, or what its descriptor leads to.

    Raises ValueError when that is not here, or not whole.
    """
    if not (artifact / DESCRIPTOR).is_file():
        if not artifact.is_dir():
            raise ValueError(f"{artifact} is not here; run the step that makes it again")
        return artifact
    described = _descriptor(artifact)
    folder = Path(described["path"])
    for name, size in described["bytes"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is not here, or not whole; {NOT_HERE}")
    return folder


# --- what the run's graph shows ----------------------------------------------------------------


def show(page: Path, target: str) -> None:
    """Put a page that a stage wrote where Kubeflow looks for it."""
    write(page.read_text(), target)


def write(text: str, target: str) -> None:
    """Put the text of a page where Kubeflow looks for it."""
    config.write_text(Path(target), text)
