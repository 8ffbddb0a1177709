"""Servers that speak a protocol for the tests: real HTTP, every call recorded, faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import ROOT


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Answer = tuple[int, Any]
"""Status and body: bytes as they are, a generator piece by piece, all else as JSON."""


@dataclass
class Stub:
    """Routes by method and pattern of the path; ``faults`` come before them: a status, ``hang`` or ``cut``."""

    routes: list[tuple[str, str, Callable[..., Answer]]] = field(default_factory=list)
    calls: list[Request] = field(default_factory=list)
    faults: dict[str, int | str] = field(default_factory=dict)
    url: str = ""

    def route(self, method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
        def add(answer: Callable[..., Answer]) -> Callable[..., Answer]:
            self.routes.append((method, pattern, answer))
            return answer

        return add

    def answer(self, request: Request) -> Answer:
        self.calls.append(request)
        for pattern, fault in self.faults.items():
            if re.search(pattern, f"{request.method} {request.path}"):
                if isinstance(fault, int):
                    return fault, {"message": f"fault {fault}", "kind": "Status", "code": fault}
                if fault == "hang":
                    time.sleep(5)
                raise ConnectionAbortedError
        for method, pattern, found in self.routes:
            if request.method == method and (match := re.fullmatch(pattern, request.path)):
                return found(request, *match.groups())
        return 404, {"message": f"no route for {request.method} {request.path}", "kind": "Status", "code": 404}

    def asked(self, pattern: str) -> list[Request]:
        """The calls that match ``METHOD /path``."""
        return [call for call in self.calls if re.search(pattern, f"{call.method} {call.path}")]


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """The stub on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            split = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(split.query))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                path = urllib.parse.unquote(split.path)
                status, made = stub.answer(
                    Request(self.command, path, query, {name.title(): value for name, value in self.headers.items()}, body)
                )
            except ConnectionAbortedError:
                self.close_connection = True
                return
            headers = {}
            if isinstance(made, tuple):
                made, headers = made
            if hasattr(made, "__next__"):
                return self._pieces(status, made)
            text = made if isinstance(made, bytes) else json.dumps(made).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _pieces(self, status: int, pieces: Iterator[bytes]) -> None:
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for piece in pieces:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            except ConnectionError:  # who asked has heard enough, or a generator breaks off in the middle
                self.close_connection = True

        do_GET = do_POST = do_DELETE = do_HEAD = do_PUT = do_PATCH = _do

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


# --- Kubernetes --------------------------------------------------------------------------------


def node(
    name: str, gpus: int = 8, product: str = "NVIDIA-A100-SXM4-80GB", cpu: str = "96", memory: str = "1000Gi", **taint: str
) -> dict[str, Any]:
    taints = [{"key": "nvidia.com/gpu", "effect": "NoSchedule", **taint}] if gpus else []
    return {
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": product} if gpus else {}},
        "spec": {"taints": taints},
        "status": {"allocatable": {"cpu": cpu, "memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}},
    }


def claim(size: str = "2Ti", phase: str = "Bound", mode: str = "ReadWriteMany") -> dict[str, Any]:
    return {
        "metadata": {"name": "vapi"},
        "spec": {"accessModes": [mode], "resources": {"requests": {"storage": size}}},
        "status": {"phase": phase, "capacity": {"storage": size}},
    }


class Kubernetes(Stub):
    """The parts of the Kubernetes API that are used, over objects in dictionaries by name."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = [node("gpu-1"), node("gpu-2"), node("cpu-1", gpus=0, cpu="16", memory="64Gi")]
        self.claims = {"vapi": claim()}
        self.secrets: dict[str, dict[str, str]] = {}
        self.config_maps: dict[str, dict[str, str]] = {}
        self.accounts = {"default-editor": {}}
        self.quotas: list[dict[str, Any]] = []
        self.runtimes = {"torch-distributed": {}}
        self.forbidden: set[str] = set()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, list[bytes]] = {}
        self.schema = TRAINJOB
        core, trainer = "/api/v1/namespaces/([^/]+)", "/apis/trainer.kubeflow.org/v1alpha1"
        self.route("GET", "/api/v1/nodes")(lambda request: (200, {"kind": "NodeList", "items": self.nodes}))
        for plural, named in (("persistentvolumeclaims", self.claims), ("serviceaccounts", self.accounts)):
            self.route("GET", f"{core}/{plural}/([^/]+)")(lambda request, ns, name, named=named: self._one(named, name))
        for plural, held in (("secrets", self.secrets), ("configmaps", self.config_maps)):
            self.route("GET", f"{core}/{plural}/([^/]+)")(
                lambda request, ns, name, held=held: self._one({k: {"data": v} for k, v in held.items()}, name)
            )
        self.route("GET", f"{core}/resourcequotas")(lambda request, ns: (200, {"items": self.quotas}))
        self.route("GET", f"{trainer}/clustertrainingruntimes/([^/]+)")(lambda request, name: self._one(self.runtimes, name))
        self.route("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews")(self._review)
        jobs = f"{trainer}/namespaces/([^/]+)/trainjobs"
        self.route("POST", jobs)(self._create)
        self.route("GET", f"{jobs}/([^/]+)")(lambda request, ns, name: self._one(self.jobs, name))
        self.route("DELETE", f"{jobs}/([^/]+)")(self._delete)
        self.route("GET", f"{core}/pods")(self._list_pods)
        self.route("GET", f"{core}/pods/([^/]+)/log")(lambda request, ns, name: (200, iter(self.logs.get(name, []))))

    def _one(self, named: dict[str, Any], name: str) -> Answer:
        return (200, named[name]) if name in named else (404, {"kind": "Status", "code": 404, "message": f"{name} not found"})

    def _list_pods(self, request: Request, namespace: str) -> Answer:
        wanted = dict(pair.split("=") for pair in request.query.get("labelSelector", "").split(",") if pair)
        return 200, {"items": [pod for pod in self.pods if wanted.items() <= pod["metadata"].get("labels", {}).items()]}

    def _review(self, request: Request) -> Answer:
        wants = request.json["spec"]["resourceAttributes"]
        asked = f"{wants['verb']} {wants['resource']}" + (f"/{wants['subresource']}" if wants.get("subresource") else "")
        return 201, {"spec": request.json["spec"], "status": {"allowed": asked not in self.forbidden}}

    def _create(self, request: Request, namespace: str) -> Answer:
        job = request.json
        if wrong := invalid(job, self.schema):
            return 422, {"kind": "Status", "code": 422, "message": wrong}
        name = job["metadata"]["name"]
        if name in self.jobs:
            return 409, {"kind": "Status", "code": 409, "message": f"{name} already exists"}
        self.jobs[name] = job
        return 201, job

    def _delete(self, request: Request, namespace: str, name: str) -> Answer:
        return (200, self.jobs.pop(name)) if name in self.jobs else self._one(self.jobs, name)

    def kubeconfig(self, folder: Path, namespace: str = "team") -> Path:
        """A file that leads here."""
        text = {
            "apiVersion": "v1", "kind": "Config", "current-context": "stub",
            "clusters": [{"name": "stub", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": "secret"}}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "me", "namespace": namespace}}],
        }  # fmt: skip
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(text))
        return path


def _load_schema() -> dict[str, Any]:
    text = (ROOT / "tests/golden/kubeflow-trainer/trainjobs.yaml").read_text()
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return _strict(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])  # type: ignore[no-any-return]


def _strict(schema: Any) -> Any:
    """Kubernetes' schema as JSON Schema in which a field that is not declared is an error (Kubernetes drops it in silence)."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(value) for name, value in schema.items() if name != "description" or isinstance(value, dict)}
    if made.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
    if isinstance(made.get("properties"), dict) and made["properties"] and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


TRAINJOB = _load_schema()


def invalid(thing: Any, schema: dict[str, Any]) -> str:
    """What a Kubernetes object breaks of its schema; nothing if it keeps it."""
    import jsonschema

    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(thing), key=str)
    return "; ".join(f"{'/'.join(map(str, error.path))}: {error.message[:200]}" for error in errors[:5])


# --- Kubeflow Pipelines ------------------------------------------------------------------------


class Kubeflow(Stub):
    """KFP's v2beta1 API: pipelines, versions, experiments, runs that go through states, recurring runs."""

    def __init__(self, version: str = "2.17.3") -> None:
        super().__init__()
        self.version = version
        self.pipelines: dict[tuple[str, str], str] = {}  # by namespace and name
        self.versions: dict[str, list[dict[str, Any]]] = {}
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring: list[dict[str, Any]] = []
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.tasks: list[dict[str, str]] = []
        api = "/apis/v2beta1"
        self.route("GET", f"{api}/healthz")(lambda request: (200, {"tag_name": self.version, "multi_user": False}))
        self.route("GET", f"{api}/pipelines")(self._list)
        self.route("POST", f"{api}/pipelines")(self._create)
        self.route("POST", f"{api}/pipelines/upload_version")(self._upload_version)
        self.route("GET", f"{api}/pipelines/([^/]+)/versions")(
            lambda request, which: (200, {"pipeline_versions": self.versions.get(which, []), "next_page_token": ""})
        )
        self.route("GET", f"{api}/experiments")(self._list_experiments)
        self.route("POST", f"{api}/experiments")(self._experiment)
        self.route("POST", f"{api}/runs")(self._run)
        self.route("GET", f"{api}/runs/([^/]+)")(self._look)
        self.route("POST", f"{api}/recurringruns")(self._repeat)

    def _list(self, request: Request) -> Answer:
        wanted = re.search(r'stringValue": "([^"]+)"', request.query.get("filter", ""))
        space = request.query.get("namespace", "")
        found = [
            {"pipeline_id": i, "display_name": n} for (s, n), i in self.pipelines.items() if s == space and (not wanted or n == wanted[1])
        ]
        return 200, {"pipelines": found}

    def _create(self, request: Request) -> Answer:
        key = (request.json.get("namespace", ""), request.json["display_name"])
        if key in self.pipelines:
            return 409, {"message": "exists"}
        made = self.pipelines[key] = f"p-{'-'.join(filter(None, key))}"
        self.versions[made] = []
        return 200, {"pipeline_id": made, "display_name": key[1]}

    def _upload_version(self, request: Request) -> Answer:
        assert b"pipelineInfo" in request.body
        made = {
            "pipeline_version_id": f"v-{request.query['name']}",
            "display_name": request.query["name"],
            "pipeline_id": request.query["pipelineid"],
        }
        self.versions[request.query["pipelineid"]].append(made)
        return 200, made

    def _list_experiments(self, request: Request) -> Answer:
        return 200, {"experiments": [{"experiment_id": i, "display_name": n} for n, i in self.experiments.items()]}

    def _experiment(self, request: Request) -> Answer:
        name = request.json["display_name"]
        self.experiments[name] = f"e-{name}"
        return 200, {"experiment_id": f"e-{name}", "display_name": name}

    def _run(self, request: Request) -> Answer:
        made = {"run_id": f"r-{len(self.runs)}", "state": "PENDING", **request.json}
        self.runs[made["run_id"]] = {**made, "left": list(self.states)}
        return 200, made

    def _look(self, request: Request, which: str) -> Answer:
        run = self.runs[which]
        state = run["left"].pop(0) if len(run["left"]) > 1 else run["left"][0]
        error = {"error": {"code": 13, "message": "task tune failed"}} if state == "FAILED" else {}
        return 200, {
            "run_id": which,
            "display_name": run["display_name"],
            "state": state,
            "run_details": {"task_details": self.tasks},
            **error,
        }

    def _repeat(self, request: Request) -> Answer:
        self.recurring.append(request.json)
        return 200, {"recurring_run_id": "rr-1", **request.json}


# --- the Hugging Face hub ----------------------------------------------------------------------


class Hub(Stub):
    """One dataset on the hub, the files of a folder: revisions, trees in pages of two, and files by ranges, each of which is noted.
    One model too, whose size alone is known."""

    def __init__(self, folder: Path, name: str = "team/pictures") -> None:
        super().__init__()
        self.folder, self.name = folder, name
        self.revisions = {"main": "a" * 40, "refs/convert/parquet": "b" * 40}
        self.gated = False
        self.ranges: list[tuple[str, str]] = []
        self.before: Callable[[], None] = lambda: None  # is called before a range is given
        revision = "(refs/[^/]+/[^/]+|[^/]+)"
        self.route("GET", "/api/datasets/([^/]+/[^/]+)")(lambda request, name: self._info(request, name, "main"))
        self.route("GET", f"/api/datasets/([^/]+/[^/]+)/revision/{revision}")(self._info)
        self.route("GET", f"/api/datasets/([^/]+/[^/]+)/tree/{revision}/?(.*)")(self._tree)
        self.route("GET", f"/datasets/([^/]+/[^/]+)/resolve/{revision}/(.+)")(self._resolve)
        self.route("GET", "/storage/(.+)")(self._range)
        model = {"id": "team/model", "private": False, "siblings": [{"rfilename": "model.safetensors", "size": 123, "blobId": "0" * 40}]}
        self.route("GET", "/api/models/team/model")(lambda request: (200, model))

    def _refused(self, name: str, revision: str) -> Answer | None:
        if name != self.name:  # it does not tell what is private from what is not there
            return 401, ({"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        if revision not in (*self.revisions, *self.revisions.values()):
            return 404, ({"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _info(self, request: Request, name: str, revision: str) -> Answer:
        sha = self.revisions.get(revision, revision)
        return self._refused(name, revision) or (200, {"id": name, "sha": sha, "private": False, "downloads": 0, "tags": [], "likes": 0})

    def _tree(self, request: Request, name: str, revision: str, path: str) -> Answer:
        if refused := self._refused(name, revision):
            return refused
        if not (self.folder / path).is_dir():
            return 404, ({"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"})
        below = request.query["recursive"].lower() == "true"
        found = sorted((self.folder / path).rglob("*") if below else (self.folder / path).iterdir())
        start = int(request.query.get("cursor", 0))
        query = urllib.parse.urlencode({**request.query, "cursor": start + 2})
        more = {"Link": f'<{self.url}{urllib.parse.quote(request.path)}?{query}>; rel="next"'} if start + 2 < len(found) else {}
        return 200, ([self._entry(one) for one in found[start : start + 2]], more)

    def _entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "oid": digest[:40], "size": size, "lfs": {"oid": digest, "size": size, "pointerSize": 130}}

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        if self.gated:
            return 403, ({"error": "restricted"}, {"X-Error-Code": "GatedRepo"})
        return 302, (b"", {"Location": f"{self.url}/storage/{path}"})

    def _range(self, request: Request, path: str) -> Answer:
        self.before()
        first, last = request.headers["Range"].removeprefix("bytes=").split("-")
        self.ranges.append((path, f"{first}-{last}"))
        return 206, (self.folder / path).read_bytes()[int(first) : int(last) + 1]


def hub_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does to a new process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
