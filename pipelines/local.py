"""A compiled package run here, without a cluster, by kfp's local runner.

The same file that a cluster gets, each box as a process of its own. What only a cluster has is passed over: volumes, GPUs,
secrets, timeouts. A folder takes the volume's place where a package mounts one.

kfp 2.17's local runner hands on what loops within loops made as a list of lists, where a cluster makes one list; that is put right
here.

The run has a session of its own, and signals are handed to all of it: kfp leaves a box running when it is killed itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp import components, local
from kfp.local.orchestrator import enhanced_dag_orchestrator as dags

from pipelines import fields
from vapi import data, signals
from vapi.cluster import origin

ROOT = Path("artifacts") / "kubeflow"
REWRITTEN = "python3"
"""kfp's local runner puts the interpreter's path in place of this word, inside any value."""


def run(package: Path, values: Mapping[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """Run a package with some of the form's fields changed. Artifacts are written below ``root``; returns the outputs.

    Raises ValueError for a field that the form does not have or that holds something else, RuntimeError when a box fails.
    """
    pipeline = components.load_component_from_file(str(package))
    arguments = {**here(pipeline, root), **fields.checked(pipeline, values)}
    for name, value in {"--root": str(root.resolve()), **arguments}.items():
        if REWRITTEN in str(value):
            raise ValueError(f"{name} is {value!r}; kfp's local runner cannot have {REWRITTEN!r} in a value")
    os.environ.setdefault("KFP_RUN_ID", str(uuid.uuid4()))
    os.environ.setdefault("VAPI_STATE", str(data.state_dir()))
    warnings.filterwarnings("ignore", module="kfp")  # about GPUs and limits, which are passed over; and its own spelling
    dags._run_parallel_for_task = run_loop
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root.resolve()))
    return dict(pipeline(**arguments).outputs)


def run_loop(*, task_name: str, io_store: Any, **rest: Any) -> bool:
    """kfp's way to run a loop; what it made becomes one list."""
    failed = _run_loop(task_name=task_name, io_store=io_store, **rest)
    made = io_store._task_output_data[task_name]
    made |= {name: _flat(values) for name, values in made.items()}
    return bool(failed)


_run_loop = dags._run_parallel_for_task


def _flat(values: list[Any]) -> list[Any]:
    return [inner for value in values for inner in (_flat(value) if isinstance(value, list) else [value])]


def here(pipeline: Any, root: Path) -> dict[str, Any]:
    """Fields that mean another place here: the clone's data and MLflow, and a folder for the volume."""
    from vapi import track
    from vapi.config import Config

    found: dict[str, Any] = {"track_uri": track.tracking_uri(Config(), origin.IMAGE)}
    if "cluster_volume" in pipeline.component_spec.inputs:
        volume = root.resolve() / "volume"
        volume.mkdir(parents=True, exist_ok=True)
        os.environ["VAPI_WORK_DIR"] = str(volume)
        found["data_uri"] = ""
    return found


SUPERVISED = "VAPI_SUPERVISED"
"""Environment: somebody hands signals on to this process."""


def supervise(words: list[str]) -> int:
    """Run ``python -m pipelines WORDS`` in a session of its own; its exit code. Signals go to every process of it."""
    with tempfile.TemporaryDirectory(prefix="vapi-") as folder:  # kfp leaves something behind for every box
        environment = {**os.environ, SUPERVISED: "1", "TMPDIR": folder}
        child = subprocess.Popen([sys.executable, "-m", "pipelines", *words], env=environment, start_new_session=True)

        def send(number: int) -> None:
            if child.poll() is None:
                os.killpg(child.pid, number)

        with signals.handed_on(send):
            return signals.exit_code(child.wait())
