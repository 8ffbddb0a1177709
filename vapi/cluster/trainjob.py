"""A stage on several nodes: a TrainJob of Kubeflow Trainer v2, made and followed by a step that has no GPU itself.

    launch: manifest -> make it, or find it -> follow node 0's log and the job's state -> the step's exit code

The job is called after the result's key, so a retry of the step finds the one that is at work and follows it on, and
never starts a second. It runs what a pod would run, under torchrun, on the volume that both mount. A job that failed is left
to be looked at, and replaced by the next attempt, which continues from the last checkpoint. The step deletes it when the
run is cancelled; where nobody can, its ``lifeline`` ends it.

Names and fields follow Trainer v2.3 (``trainer.kubeflow.org/v1alpha1``; tests hold its schema).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapi import config, signals
from vapi.cluster import lifeline
from vapi.cluster.api import SECONDS, TRAINER, ApiException, HTTPError, Kubernetes, here
from vapi.cluster.config import CERTIFICATES, ClusterConfig
from vapi.cluster.step import Command, in_words

JOBS = {**TRAINER, "plural": "trainjobs"}
CONTAINER = "node"
"""Job and container of the training nodes, as Trainer's runtimes call them."""
POLL_SECONDS = 2.0
PATIENCE = 600.0
"""Seconds that a server may not answer, before the step gives up on it; and that a job goes on alone."""
GRACE = 600
"""Seconds between SIGTERM and SIGKILL for the job's pods: a step of training, and a checkpoint of many gigabytes."""
LOST = 1
HANDED_ON = ("VAPI_STATE", "TORCH_HOME", "HF_HOME", "KFP_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")
"""Of the step's environment; what is secret comes to the job's pods as it came to the step's."""


@dataclass(frozen=True)
class Size:
    """What the form says about the job: nodes of so many GPUs, and where."""

    nodes: int
    gpus: int
    image: str
    node_selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, Any]]
    volume: str


@dataclass(frozen=True)
class Trainer:
    """Runs a stage's command as a TrainJob: what ``step.run`` takes as ``launch``."""

    kubernetes: Kubernetes
    cluster: ClusterConfig
    size: Size
    environment: Mapping[str, str]

    def __call__(self, command: Command) -> int:
        out = command.folders["out"]
        params, alive = out.with_suffix(".yaml"), out.with_suffix(".alive")
        config.write_text(params, config.dump(command.settings, comments=False))
        name = f"vapi-{command.stage}-{out.name}"
        with in_kubernetes_words(name), _touching(alive), signals.handed_on(self._cancel(name)):
            submit(self.kubernetes, manifest(name, command, params, alive, self), lifeline.note(alive))
            code = Follower(self.kubernetes, name).follow()
            if code == 0:
                delete(self.kubernetes, name)
        return code

    def _cancel(self, name: str) -> Callable[[int], None]:
        """What a signal does: delete the job and end the step. If it cannot be deleted now, its lifeline ends it."""

        def stop(number: int) -> None:
            with contextlib.suppress(ApiException, HTTPError):
                delete(self.kubernetes, name)
            raise SystemExit(lifeline.ALONE)

        return stop


@contextlib.contextmanager
def in_kubernetes_words(name: str) -> Iterator[None]:
    """What Kubernetes has to say about a TrainJob becomes a ValueError."""
    try:
        yield
    except ApiException as error:
        allowed = "; apply pipelines/manifests/rbac.yaml" if error.status == 403 else ""
        raise ValueError(f"TrainJob {name}: Kubernetes answers {error.status} {error.reason} {error.body or ''}{allowed}") from error
    except HTTPError as error:
        raise ValueError(f"TrainJob {name}: Kubernetes cannot be reached: {_short(error)}") from error


def launcher(cluster: Mapping[str, Any], environment: Mapping[str, str], size: Size) -> Trainer:
    """A trainer in the cluster that this pod runs in. Raises SystemExit(2) where it is no pod."""
    with in_words():
        kubernetes = here()
        if kubernetes is None:
            raise ValueError("this is no pod of a cluster, and a TrainJob needs one; run the package without -trainjob here")
        return Trainer(kubernetes, config.build(ClusterConfig, dict(cluster)), size, environment)


# --- the manifest ------------------------------------------------------------------------------


def manifest(name: str, command: Command, params: Path, alive: Path, trainer: Trainer) -> dict[str, Any]:
    """The TrainJob of a stage. Relative names of data lead where they lead in the present folder."""
    cluster, size = trainer.cluster, trainer.size
    limits = {"cpu": cluster.gpu.cpu, "memory": cluster.gpu.memory} | ({cluster.gpu.resource: size.gpus} if size.gpus else {})
    run = ["torchrun", f"--shutdown-timeout={GRACE - 60}", *command.words(params)]
    guarded = ["python3", "-m", "vapi.cluster.lifeline", str(alive), f"{PATIENCE:g}", *run]
    return {
        "apiVersion": f"{TRAINER['group']}/{TRAINER['version']}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "vapi", **cluster.pods.labels},
            "annotations": dict(cluster.pods.annotations),
        },
        "spec": {
            "activeDeadlineSeconds": cluster.limits.timeouts[command.stage],
            "runtimeRef": {"apiGroup": TRAINER["group"], "kind": "ClusterTrainingRuntime", "name": cluster.trainer.runtime},
            "trainer": {
                "image": size.image,
                # the folder that the data's names are relative to, then the words that a terminal would type
                "command": ["sh", "-c", 'cd "$0" && exec "$@"', str(Path.cwd())],
                "args": guarded,
                "numNodes": size.nodes,
                "numProcPerNode": max(1, size.gpus),
                "resourcesPerNode": {"limits": limits, "requests": limits},
                "env": _environment(command, trainer),
            },
            "runtimePatches": [
                {"manager": "vapi.cluster/step", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [_job(trainer)]}}}}
            ],
        },
    }


def _environment(command: Command, trainer: Trainer) -> list[dict[str, Any]]:
    pods = trainer.cluster.pods
    own = {name: os.environ[name] for name in HANDED_ON if os.environ.get(name)}
    plain = {**trainer.environment, **own, **command.environment, "PYTHONSAFEPATH": "1"}
    found: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(plain.items())]
    for kind, named in (("secretKeyRef", pods.secrets), ("configMapKeyRef", pods.config_maps)):
        for source, keys in named.items():
            found += [{"name": variable, "valueFrom": {kind: {"name": source, "key": key}}} for key, variable in keys.items()]
    return found


def _job(trainer: Trainer) -> dict[str, Any]:
    """What the pods mount and where they may run."""
    cluster, size = trainer.cluster, trainer.size
    volumes = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.gpu.shared_memory}},
        {"name": "scratch", "emptyDir": {"sizeLimit": cluster.gpu.scratch}},
        {"name": "work", "persistentVolumeClaim": {"claimName": size.volume}},
    ]
    mounts = {"shared-memory": "/dev/shm", "scratch": "/tmp", "work": cluster.volume.path}
    if cluster.pods.ca_bundle:
        volumes.append({"name": "certificates", "configMap": {"name": cluster.pods.ca_bundle}})
        mounts["certificates"] = CERTIFICATES
    pod: dict[str, Any] = {
        "nodeSelector": dict(size.node_selector),
        "tolerations": [dict(toleration) for toleration in size.tolerations],
        "terminationGracePeriodSeconds": GRACE,
        "volumes": volumes,
        "containers": [{"name": CONTAINER, "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()]}],
    }
    if cluster.image.pull_secret:
        pod["imagePullSecrets"] = [{"name": cluster.image.pull_secret}]
    bearing = {"labels": dict(cluster.pods.labels), "annotations": dict(cluster.pods.annotations)}
    return {"name": CONTAINER, "template": {"spec": {"template": {"metadata": bearing, "spec": pod}}}}


# --- making, finding, deleting -----------------------------------------------------------------


def state(job: Mapping[str, Any]) -> tuple[str, str]:
    """What a TrainJob says of itself (Created, Suspended, Running, Complete, Failed, Deleted), and why."""
    if job["metadata"].get("deletionTimestamp"):
        return "Deleted", "its pods have their grace"
    status = job.get("status") or {}
    holding = {one["type"]: one for one in status.get("conditions", []) if one["status"] == "True"}
    for kind in ("Complete", "Failed", "Suspended"):
        if kind in holding:
            return kind, f"{holding[kind].get('reason', '')}: {holding[kind].get('message', '')}"
    active = sum(one.get("active", 0) for one in status.get("jobsStatus", []))
    return ("Running", f"{active} active jobs") if active else ("Created", "waiting for its pods")


def submit(kubernetes: Kubernetes, job: dict[str, Any], note: Path) -> None:
    """Make a TrainJob, or leave the one of that name that is at work. One that has ended, or is being deleted, is replaced,
    and the ``note`` of its end removed."""
    name = job["metadata"]["name"]
    present = find(kubernetes, name)
    if present is not None and state(present)[0] in ("Complete", "Failed", "Deleted"):
        if state(present)[0] != "Deleted":
            delete(kubernetes, name)
        print(f"waiting for the TrainJob {name} of an earlier attempt to go", flush=True)
        _await_absence(kubernetes, name)
        present = None
    if present is not None:
        print(f"TrainJob {name} is at work already; it is followed on", flush=True)
        return
    note.unlink(missing_ok=True)
    try:
        kubernetes.objects.create_namespaced_custom_object(**JOBS, namespace=kubernetes.namespace, body=job, _request_timeout=SECONDS)
    except ApiException as error:
        if error.status != 409:  # somebody was faster: the same job
            raise
    print(f"TrainJob {name} made in {kubernetes.namespace}", flush=True)


def find(kubernetes: Kubernetes, name: str) -> dict[str, Any] | None:
    """A TrainJob, if it is there."""
    try:
        return kubernetes.objects.get_namespaced_custom_object(**JOBS, namespace=kubernetes.namespace, name=name, _request_timeout=SECONDS)
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def delete(kubernetes: Kubernetes, name: str) -> None:
    """Delete a TrainJob and its pods; one that is gone already is fine."""
    try:
        kubernetes.objects.delete_namespaced_custom_object(
            **JOBS, namespace=kubernetes.namespace, name=name, propagation_policy="Foreground", _request_timeout=SECONDS
        )
    except ApiException as error:
        if error.status != 404:
            raise
    print(f"TrainJob {name} deleted", flush=True)


def _await_absence(kubernetes: Kubernetes, name: str) -> None:
    """Its pods have their grace, and a job that is still there keeps its name."""
    deadline = time.monotonic() + GRACE + PATIENCE
    while find(kubernetes, name) is not None:
        if time.monotonic() > deadline:
            raise ValueError(f"TrainJob {name} was deleted and does not go; look at its finalizers: kubectl describe trainjob {name}")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _touching(file: Path) -> Iterator[None]:
    """Touch the job's lifeline until the block ends."""
    ended = threading.Event()

    def touch() -> None:
        while True:
            with contextlib.suppress(OSError):  # a volume that does not answer now may answer later
                file.touch()
            if ended.wait(PATIENCE / 20):
                return

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)


# --- following ---------------------------------------------------------------------------------


class Follower:
    """Says what a TrainJob does until it has ended."""

    def __init__(self, kubernetes: Kubernetes, name: str) -> None:
        self.kubernetes, self.name = kubernetes, name
        self.ended = threading.Event()

    def follow(self) -> int:
        """0: complete; 1: failed, deleted by somebody, or not to be seen any more."""
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        try:
            return self._watch()
        finally:
            self.ended.set()
            reader.join(timeout=10)  # node 0's last words

    def _watch(self) -> int:
        said, answered = "", time.monotonic()
        while True:
            try:
                job = find(self.kubernetes, self.name)
                answered = time.monotonic()
            except (ApiException, HTTPError) as error:
                if time.monotonic() - answered > PATIENCE:
                    return self._lost(
                        f"Kubernetes has not answered for {PATIENCE:.0f} seconds ({_short(error)}); a retry finds the job again"
                    )
                self.ended.wait(POLL_SECONDS)
                continue
            if job is None:
                return self._lost("it was deleted by somebody")
            now, why = state(job)
            if now != said:
                print(f"TrainJob {self.name}: {now} ({why})", flush=True)
                said = now
            if now == "Complete":
                return 0
            if now == "Deleted":
                return self._lost("it was deleted by somebody")
            if now == "Failed":
                return self._lost(f"it failed, {why}{self._reasons()}")
            self.ended.wait(POLL_SECONDS)

    def _lost(self, why: str) -> int:
        print(f"error: TrainJob {self.name}: {why}", file=sys.stderr, flush=True)
        return LOST

    def _pods(self, selector: str = "") -> list[Any]:
        wanted = f"jobset.sigs.k8s.io/jobset-name={self.name}{selector}"
        return list(
            self.kubernetes.core.list_namespaced_pod(self.kubernetes.namespace, label_selector=wanted, _request_timeout=SECONDS).items
        )

    def _reasons(self) -> str:
        """What the pods say about their end: evicted, out of memory, exit codes."""
        with contextlib.suppress(ApiException, HTTPError):
            return "".join(f"\n  {pod.metadata.name}: {words}" for pod in self._pods() if (words := _end_of(pod)))
        return ""

    def _read(self) -> None:
        """Print node 0's log as it grows; after a break from where it was."""
        since = ""
        while not self.ended.is_set():
            try:
                pods = self._pods(",batch.kubernetes.io/job-completion-index=0")
                for pod in sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp))[-1:]:  # one that failed is replaced
                    since = self._print(pod.metadata.name, since)
            except ApiException as error:
                if error.status == 403:
                    print("this account may not read pods and their logs; apply pipelines/manifests/rbac.yaml to see them", flush=True)
                    return
            except HTTPError:  # a connection that broke
                pass
            self.ended.wait(POLL_SECONDS)

    def _print(self, pod: str, since: str) -> str:
        """Print a pod's log beyond a time stamp; the last one seen."""
        stream = self.kubernetes.core.read_namespaced_pod_log(
            pod, self.kubernetes.namespace, container=CONTAINER, follow=True, timestamps=True, _preload_content=False
        )
        try:
            for line in _lines(stream):
                stamp, _, text = line.partition(" ")
                if stamp > since:
                    print(text, flush=True)
                    since = stamp
        except HTTPError:
            pass
        finally:
            stream.close()
        return since


def _lines(stream: Any) -> Iterator[str]:
    left = b""
    for piece in stream.stream(amt=4096):
        *whole, left = (left + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if left:
        yield left.decode(errors="replace")


def _end_of(pod: Any) -> str:
    words = [pod.status.reason or "", pod.status.message or ""]
    for one in pod.status.container_statuses or []:
        if ended := one.state.terminated if one.state else None:
            words.append(f"exit code {ended.exit_code} {ended.reason or ''}" if ended.exit_code else "")
    return " ".join(word.strip() for word in words if word)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0]
