"""A stage on several nodes: the manifest against Trainer's own schema, the client against a server that plays a job's life back,
and once for real, with a server that runs the job's command on two "nodes" of this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stubs
import world
from imports import ROOT

from vapi import cli, config, recipes
from vapi.cluster import api, lifeline, pages, preflight, step, trainjob
from vapi.cluster.config import ClusterConfig, ImageConfig, PodsConfig
from vapi.cluster.origin import Origin
from vapi.cluster.step import Command
from vapi.config import Config

CLUSTER = ClusterConfig(
    image=ImageConfig(pull_secret="pull"),
    pods=PodsConfig(
        labels={"kueue.x-k8s.io/queue-name": "gpu"}, annotations={"sidecar.istio.io/inject": "false"}, ca_bundle="trust",
        secrets={"login": {"user": "MLFLOW_TRACKING_USERNAME"}}, config_maps={"site": {"key": "SITE"}},
    ),
)  # fmt: skip
SIZE = trainjob.Size(2, 8, "registry.example.com/vapi:1.2.3", {"a": "b"}, [{"key": "nvidia.com/gpu", "operator": "Exists"}], "mine")
NAME = "vapi-tune-0123456789abcdef"


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stubs.Kubernetes]:
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.05)
    with stubs.serving(stubs.Kubernetes()) as stub:
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(stub.kubeconfig(tmp_path)))
        yield stub


def command(folder: Path) -> Command:
    out = folder / "artifacts/tune/0123456789abcdef"
    out.parent.mkdir(parents=True, exist_ok=True)
    return Command("tune", {"subset": folder / "subset", "tokens": folder / "tokens", "out": out}, Config(), {"VAPI_RUN": "{}"})


def trainer(cluster: ClusterConfig = CLUSTER, size: trainjob.Size = SIZE) -> trainjob.Trainer:
    return trainjob.Trainer(api.named(), cluster, size, {"NCCL_DEBUG": "INFO"})


def condition(kind: str, reason: str = "", message: str = "") -> dict[str, Any]:
    stamp = "2026-01-01T00:00:00Z"
    return {"conditions": [{"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": stamp}]}


RUNNING = {"jobsStatus": [{"name": "node", "active": 2, "failed": 0, "ready": 2, "succeeded": 0, "suspended": 0}]}


def pod(name: str, index: int, created: str = "2026-01-01T00:00:00Z", job: str = NAME) -> dict[str, Any]:
    labels = {"jobset.sigs.k8s.io/jobset-name": job, "batch.kubernetes.io/job-completion-index": str(index)}
    return {"metadata": {"name": name, "labels": labels, "creationTimestamp": created}, "status": {"phase": "Running"}}


def play(stub: stubs.Kubernetes, *states: Any) -> None:
    """Give the job one status after the other, each time it is looked at; the last one stays. None: it is gone."""
    left = list(states)

    def look(request: stubs.Request, namespace: str, name: str) -> stubs.Answer:
        if name not in stub.jobs:
            return 404, {"kind": "Status", "code": 404}
        now = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(now, int):
            return now, {"kind": "Status", "code": now}
        if now is None:
            stub.jobs.pop(name)
            return 404, {"kind": "Status", "code": 404}
        return 200, {**stub.jobs[name], "status": now}

    stub.routes.insert(0, ("GET", "/apis/trainer.kubeflow.org/v1alpha1/namespaces/([^/]+)/trainjobs/([^/]+)", look))


# --- the manifest ------------------------------------------------------------------------------


def test_the_manifest_keeps_trainer_s_schema(kubernetes: stubs.Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    made = trainjob.manifest(NAME, command(tmp_path), tmp_path / "p.yaml", tmp_path / "alive", trainer())
    assert stubs.invalid(made, stubs.TRAINJOB) == ""
    broken = {**made, "spec": {**made["spec"], "trainers": {}}}
    assert "trainers" in stubs.invalid(broken, stubs.TRAINJOB), "a field that is not in the schema shows"
    spec = made["spec"]
    assert spec["trainer"]["numNodes"] == 2 and spec["trainer"]["numProcPerNode"] == 8
    assert spec["trainer"]["resourcesPerNode"]["limits"] == {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": 8}
    assert spec["trainer"]["command"][-1] == str(tmp_path)
    words = spec["trainer"]["args"]
    assert words[: words.index("-m", 3)][-2:] == ["torchrun", "--shutdown-timeout=540"]
    assert words[words.index("-m", 3) :][:3] == ["-m", "vapi", "tune"]
    env = {one["name"]: one for one in spec["trainer"]["env"]}
    assert env["NCCL_DEBUG"]["value"] == "INFO" and env["MLFLOW_RUN_ID"]["value"] == "abc" and env["VAPI_RUN"]["value"] == "{}"
    assert env["MLFLOW_TRACKING_USERNAME"]["valueFrom"] == {"secretKeyRef": {"name": "login", "key": "user"}}
    assert env["SITE"]["valueFrom"] == {"configMapKeyRef": {"name": "site", "key": "key"}}
    job = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]
    assert pod["metadata"] == {"labels": CLUSTER.pods.labels, "annotations": CLUSTER.pods.annotations}
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert pod["spec"]["nodeSelector"] == {"a": "b"} and pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]
    mounts = {one["name"]: one["mountPath"] for one in pod["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "scratch": "/tmp", "work": "/mnt/vapi", "certificates": "/etc/vapi-certificates"}
    volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
    assert volumes["work"]["persistentVolumeClaim"] == {"claimName": "mine"} and volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"


def test_a_job_without_gpus_asks_for_none(kubernetes: stubs.Kubernetes, tmp_path: Path) -> None:
    size = trainjob.Size(2, 0, "i:1", {}, [], "mine")
    made = trainjob.manifest(NAME, command(tmp_path), tmp_path / "p", tmp_path / "a", trainer(ClusterConfig(), size))
    assert "nvidia.com/gpu" not in made["spec"]["trainer"]["resourcesPerNode"]["limits"] and made["spec"]["trainer"]["numProcPerNode"] == 1
    assert stubs.invalid(made, stubs.TRAINJOB) == ""


# --- a job's life, played back -----------------------------------------------------------------


def test_it_is_made_followed_and_deleted(kubernetes: stubs.Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(kubernetes, {}, condition("Suspended", "Queued"), RUNNING, RUNNING, RUNNING, condition("Complete", "JobsCompleted"))
    # node 0 was started again, node 1 and another job's pod are not asked
    kubernetes.pods = [pod("node-0", 0), pod("node-0-again", 0, "2026-01-02T00:00:00Z"), pod("node-1", 1), pod("other-0", 0, job="x")]
    kubernetes.logs["node-0-again"] = [b"2026-01-01T00:00:01Z step 1\n2026-01-01T00:00:02Z st", b"ep 2\n"]
    assert trainer()(command(tmp_path)) == 0
    out = capsys.readouterr().out
    for words in ("made in team", "Created", "Suspended (Queued", "Running (2 active", "Complete", "deleted", "step 1\n", "step 2\n"):
        assert words in out, words
    assert out.count("step 2") == 1, "a log that is read again goes on where it was"
    (made,) = kubernetes.asked("POST .*trainjobs")
    assert made.json["metadata"]["name"] == NAME and not kubernetes.jobs
    logs = kubernetes.asked("GET .*/log")[0]
    assert {call.path.rpartition("/pods/")[2] for call in kubernetes.asked("GET .*/log")} == {"node-0-again/log"}
    (deleted,) = kubernetes.asked("DELETE .*trainjobs")
    assert deleted.query["propagationPolicy"] == "Foreground", "its pods are gone when it is"
    assert logs.query["container"] == "node" and logs.query["follow"] == "True"
    assert (tmp_path / "artifacts/tune/0123456789abcdef.yaml").is_file(), "the configuration lies on the volume"


def test_a_retry_finds_the_job_at_work(kubernetes: stubs.Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kubernetes.jobs[NAME] = {"metadata": {"name": NAME}}
    play(kubernetes, RUNNING, RUNNING, condition("Complete"))
    assert trainer()(command(tmp_path)) == 0
    assert not kubernetes.asked("POST .*trainjobs") and "is at work already" in capsys.readouterr().out


@pytest.mark.parametrize("ended", ["Failed", "Complete"])
def test_one_that_has_ended_is_replaced(kubernetes: stubs.Kubernetes, tmp_path: Path, ended: str) -> None:
    kubernetes.jobs[NAME] = {"metadata": {"name": NAME}}
    play(kubernetes, condition(ended), RUNNING, condition("Complete"))
    made = command(tmp_path)
    note = lifeline.note(made.folders["out"].with_suffix(".alive"))
    note.write_text("75")
    assert trainer()(made) == 0 and not note.exists(), "the new one must begin"
    order = [call.method for call in kubernetes.asked("(POST|DELETE) .*trainjobs")]
    assert order == ["DELETE", "POST", "DELETE"]


def test_one_that_is_being_deleted_is_waited_for(kubernetes: stubs.Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cloned right after it was cancelled: the job's pods have ten minutes to write their checkpoint."""
    kubernetes.jobs[NAME] = {"metadata": {"name": NAME, "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    play(kubernetes, RUNNING, RUNNING, None, RUNNING, condition("Complete"))
    assert trainer()(command(tmp_path)) == 0
    assert [call.method for call in kubernetes.asked("(POST|DELETE) .*trainjobs")] == ["POST", "DELETE"]
    kubernetes.jobs[NAME] = {"metadata": {"name": NAME, "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    monkeypatch.setattr(trainjob, "GRACE", -trainjob.PATIENCE)
    play(kubernetes, RUNNING)
    with pytest.raises(ValueError, match="does not go; look at its finalizers"):
        trainer()(command(tmp_path))


def test_one_that_is_deleted_while_it_is_followed_has_failed(kubernetes: stubs.Kubernetes, tmp_path: Path) -> None:
    plain = kubernetes._create

    def create(request: stubs.Request, namespace: str) -> stubs.Answer:
        status, made = plain(request, namespace)
        made["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        return status, made

    kubernetes.routes.insert(0, ("POST", "/apis/trainer.kubeflow.org/v1alpha1/namespaces/([^/]+)/trainjobs", create))
    assert trainer()(command(tmp_path)) == trainjob.LOST


def test_logs_that_may_not_be_read_are_said_once(kubernetes: stubs.Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kubernetes.faults["GET .*/pods"] = 403
    play(kubernetes, {}, *[RUNNING] * 8, condition("Complete"))
    assert trainer()(command(tmp_path)) == 0
    assert capsys.readouterr().out.count("may not read pods and their logs") == 1


def test_two_that_come_at_once_make_one(kubernetes: stubs.Kubernetes, tmp_path: Path) -> None:
    kubernetes.faults["POST .*trainjobs"] = 409
    kubernetes.jobs[NAME] = {"metadata": {"name": NAME}}
    looks = iter([404])

    def first(request: stubs.Request, namespace: str, name: str) -> stubs.Answer:
        status = next(looks, 200)
        return status, {**kubernetes.jobs[name], "status": condition("Complete")} if status == 200 else {"kind": "Status"}

    kubernetes.routes.insert(0, ("GET", "/apis/trainer.kubeflow.org/v1alpha1/namespaces/([^/]+)/trainjobs/([^/]+)", first))
    assert trainer()(command(tmp_path)) == 0


def test_a_failure_says_what_became_of_the_pods(kubernetes: stubs.Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(kubernetes, {}, RUNNING, condition("Failed", "JobsFailed", "2 of 2 failed"))
    ended = {"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, "name": "node", "image": "i", "imageID": "", "ready": False}
    kubernetes.pods = [
        {**pod("node-0", 0), "status": {"phase": "Failed", "reason": "Evicted", "message": "low on ephemeral-storage"}},
        {**pod("node-1", 1), "status": {"phase": "Failed", "containerStatuses": [{**ended, "restartCount": 0}]}},
        {**pod("other-0", 0, job="x"), "status": {"phase": "Failed", "reason": "Nothing of ours"}},
    ]
    assert trainer()(command(tmp_path)) == trainjob.LOST
    err = capsys.readouterr().err
    assert "it failed, JobsFailed: 2 of 2 failed" in err and "node-0: Evicted low on ephemeral-storage" in err
    assert "node-1: exit code 137 OOMKilled" in err and "Nothing of ours" not in err
    assert NAME in kubernetes.jobs, "it stays to be looked at"


def test_one_that_somebody_deletes_is_a_failure(kubernetes: stubs.Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(kubernetes, {}, RUNNING, None)
    assert trainer()(command(tmp_path)) == trainjob.LOST and "it was deleted by somebody" in capsys.readouterr().err


def test_a_server_that_stumbles_does_not_end_the_run(kubernetes: stubs.Kubernetes, tmp_path: Path) -> None:
    play(kubernetes, {}, RUNNING, 500, 503, RUNNING, condition("Complete"))
    assert trainer()(command(tmp_path)) == 0


def test_a_server_that_stays_away_does(
    kubernetes: stubs.Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainjob, "PATIENCE", 0.3)
    play(kubernetes, {}, RUNNING, 500)
    assert trainer()(command(tmp_path)) == trainjob.LOST and "a retry finds the job again" in capsys.readouterr().err


@pytest.mark.parametrize("status", [403, 422, 500])
def test_one_that_is_not_accepted_says_why(kubernetes: stubs.Kubernetes, tmp_path: Path, status: int) -> None:
    kubernetes.faults["POST .*trainjobs"] = status
    with pytest.raises(ValueError, match=f"TrainJob {NAME}: Kubernetes answers {status} .*fault {status}"):
        trainer()(command(tmp_path))


def test_a_cluster_that_does_not_let_us_look_is_said_in_words(kubernetes: stubs.Kubernetes, tmp_path: Path) -> None:
    kubernetes.faults["GET .*trainjobs"] = 403
    with pytest.raises(ValueError, match="answers 403 .*apply pipelines/manifests/rbac.yaml"):
        trainer()(command(tmp_path))
    kubernetes.faults["GET .*trainjobs"] = "cut"
    with pytest.raises(ValueError, match="cannot be reached"):
        trainer()(command(tmp_path))


def test_a_cancelled_step_deletes_its_job(kubernetes: stubs.Kubernetes, tmp_path: Path) -> None:
    play(kubernetes, RUNNING)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as stop:
        trainer()(command(tmp_path))
    assert stop.value.code == lifeline.ALONE and not kubernetes.jobs


def test_outside_a_cluster_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        trainjob.launcher(config.plain(ClusterConfig()), {}, SIZE)
    assert stop.value.code == 2 and "a TrainJob needs one" in capsys.readouterr().err


# --- the lifeline ------------------------------------------------------------------------------


def test_a_command_ends_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "LOOK_SECONDS", 0.05)
    assert lifeline.follow([sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "alive", 60) == 7
    assert lifeline.follow([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "alive", 60) == 137


def test_a_job_that_nobody_follows_stops_with_its_checkpoint(tmp_path: Path) -> None:
    """As a process: it takes SIGTERM for its own."""
    program = "import signal, sys, time; signal.signal(15, lambda *a: (print('saved', flush=True), sys.exit(75))); time.sleep(60)"
    words = [sys.executable, "-m", "vapi.cluster.lifeline", str(tmp_path / "alive"), "3", sys.executable, "-c", program]
    begin = time.monotonic()
    with subprocess.Popen(words, env=world.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        for _ in range(4):  # as long as it is touched it lives
            time.sleep(1)
            (tmp_path / "alive").touch()
            assert job.poll() is None
        out, err = job.communicate(timeout=30)
    assert (job.returncode, out) == (75, "saved\n") and "nobody has followed this job" in err
    assert time.monotonic() - begin > 5
    again = subprocess.run(words, env=world.ENVIRONMENT, capture_output=True, text=True, timeout=30)  # as Kubernetes does
    assert (again.returncode, again.stdout) == (75, "") and "it is not begun again" in again.stderr


def test_a_mistake_is_not_made_twice(tmp_path: Path) -> None:
    """torchrun gives every failure the same code, and Kubernetes starts what failed again."""
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=1", "-m", "vapi", "tune", "--lr", "quick"]
    words = [sys.executable, "-m", "vapi.cluster.lifeline", str(tmp_path / "alive"), "600", *torchrun]
    environment = {**world.ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    first = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert first.returncode != 0 and "tune.lr is 'quick'" in first.stderr
    again = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "not begun again" in again.stderr and "quick" not in again.stderr


def test_sigterm_is_handed_on_once(tmp_path: Path) -> None:
    program = "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    words = [sys.executable, "-m", "vapi.cluster.lifeline", str(tmp_path / "alive"), "600", sys.executable, "-c", program]
    with subprocess.Popen(words, env=world.ENVIRONMENT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        job.terminate()
        assert job.wait(30) == 75


# --- for real ----------------------------------------------------------------------------------


class Nodes(stubs.Kubernetes):
    """A Kubernetes whose TrainJobs run: torchrun on every "node", with the variables that Trainer sets."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.running = folder, dict[str, list[subprocess.Popen[bytes]]]()
        jobs = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/([^/]+)/trainjobs/([^/]+)"
        self.routes.insert(0, ("GET", jobs, self._state))
        self.routes.insert(0, ("GET", "/api/v1/namespaces/([^/]+)/pods/([^/]+)/log", self._log))

    def _create(self, request: stubs.Request, namespace: str) -> stubs.Answer:
        status, made = super()._create(request, namespace)
        if status == 201:
            spec, name = made["spec"]["trainer"], made["metadata"]["name"]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            shared = {one["name"]: one.get("value", "") for one in spec["env"]} | {
                "PET_NNODES": str(spec["numNodes"]), "PET_NPROC_PER_NODE": str(spec["numProcPerNode"]), "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }  # fmt: skip
            self.running[name] = [
                subprocess.Popen(
                    [*spec["command"], *spec["args"]], env={**world.ENVIRONMENT, **shared, "PET_NODE_RANK": str(rank)},
                    stdout=(self.folder / f"{name}-{rank}.log").open("wb"), stderr=subprocess.STDOUT,
                )
                for rank in range(spec["numNodes"])
            ]  # fmt: skip
            self.pods = [pod(f"{name}-0", 0, job=name)]
        return status, made

    def _state(self, request: stubs.Request, namespace: str, name: str) -> stubs.Answer:
        if name not in self.jobs:
            return 404, {"kind": "Status", "code": 404}
        codes = [node.poll() for node in self.running[name]]
        status = RUNNING if None in codes else condition("Failed" if any(codes) else "Complete", "Ended", str(codes))
        return 200, {**self.jobs[name], "status": status}

    def _log(self, request: stubs.Request, namespace: str, pod: str) -> stubs.Answer:
        lines = (self.folder / f"{pod}.log").read_bytes().splitlines()
        return 200, iter([f"2026-01-01T00:00:{n:05d}Z ".encode() + line + b"\n" for n, line in enumerate(lines)])

    def _delete(self, request: stubs.Request, namespace: str, name: str) -> stubs.Answer:
        for node in self.running.get(name, []):
            node.terminate()
        return super()._delete(request, namespace, name)


def test_two_nodes_tune_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The step with its TrainJob, on the tiny world and a "volume": the same first step as one process, and its page and numbers."""
    root, volume = world.write(tmp_path / "world"), tmp_path / "volume"
    volume.mkdir()
    made = world.settings(recipes.recipe("llamagen-xl-c2i"), tune_steps=2)
    monkeypatch.chdir(root)
    monkeypatch.setenv("VAPI_STATE", str(volume / ".vapi"))
    plans = preflight.plans(made, Origin(str(root)), step.Place(volume / ".vapi", volume))
    artifacts = {name: str(tmp_path / "artifacts" / name) for name in ("subset", "tokens", "model")}
    step.run("subset", plans["subset"], str(volume), artifacts["subset"])
    step.run("tokens", plans["tokens"], str(volume), artifacts["tokens"], subset=artifacts["subset"])
    inputs = {name: artifacts[name] for name in ("subset", "tokens")}
    with stubs.serving(Nodes(tmp_path)) as stub:
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(stub.kubeconfig(tmp_path)))
        launch = trainjob.Trainer(api.named(), ClusterConfig(), trainjob.Size(2, 0, "i:1", {}, [], "vapi"), {})
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        folder = step.run("tune", plans["tune"], str(volume), artifacts["model"], launch, **inputs)
    out = capfd.readouterr().out
    assert "step 2 of 2" in out and "Complete" in out and not stub.jobs
    assert json.loads((folder / "provenance.json").read_text())["processes"] == 2
    assert "<svg" in pages.tuning(folder) and pages.tuning_metrics(folder)["processes"] == 2

    alone = tmp_path / "alone"
    cli.run_stage("tune", made, {**{name: step.opened(Path(path)) for name, path in inputs.items()}, "out": alone})
    ours, theirs = (json.loads((path / "metrics.jsonl").read_text().splitlines()[1]) for path in (folder, alone))
    assert ours["tune/loss"] == pytest.approx(theirs["tune/loss"], rel=1e-5)
