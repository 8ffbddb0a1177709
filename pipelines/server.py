"""Talking to Kubeflow: is it there, upload a version, start a run, follow it, repeat it.

A package is uploaded once: its version is called after the package's own version and a hash of its text, so submitting
twice makes one version and two runs. Whatever the server says in place of an answer becomes one line that says what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import yaml
from urllib3.exceptions import HTTPError

import vapi
from vapi.cluster.checks import Check, failed, ok, warning

SECONDS = 30
"""That a call may take; kfp's client itself waits for ever."""
POLL_SECONDS = 10.0
PATIENCE = 600.0
"""Seconds that a server may not answer while a run is followed."""
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


@dataclass(frozen=True)
class Login:
    """How to reach a server. Fields that are empty are taken from the environment: KF_PIPELINES_ENDPOINT, KF_PIPELINES_TOKEN,
    KF_PIPELINES_COOKIES, and SSL_CERT_FILE for a site's own certificates."""

    endpoint: str = ""
    namespace: str = ""

    @property
    def host(self) -> str:
        """Raises ValueError if nobody says where Kubeflow is."""
        host = self.endpoint or os.environ.get("KF_PIPELINES_ENDPOINT", "")
        if not host:
            raise ValueError("where is Kubeflow? give --endpoint http://..., or set KF_PIPELINES_ENDPOINT")
        if not host.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint is {host!r}; it begins with http:// or https://")
        return host.rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        """What opens the door."""
        token, cookies = os.environ.get("KF_PIPELINES_TOKEN", ""), os.environ.get("KF_PIPELINES_COOKIES", "")
        return ({"Authorization": f"Bearer {token}"} if token else {}) | ({"Cookie": cookies} if cookies else {})


def version_needed() -> str:
    """The server's version that a package needs: that of the kfp it is compiled with, but for the last number."""
    return ".".join(kfp.__version__.split(".")[:2])


def check(login: Login) -> list[Check]:
    """Whether the server answers, lets us in, and is new enough to read a package."""
    host = login.host
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{host}/apis/v2beta1/healthz", headers=login.headers), timeout=SECONDS
        ) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return [failed("endpoint", _http(host, error.code, str(error.reason)))]
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        hint = (
            "an answer that is not Kubeflow's; is a login page in between?"
            if isinstance(error, ValueError)
            else f"{reason}; is it running?"
        )
        return [failed("endpoint", f"{host}: {hint}")]
    return [_version(host, str(found.get("tag_name", "unknown")))]


def _version(host: str, tag: str) -> Check:
    wanted, numbers = version_needed(), re.match(r"v?(\d+)\.(\d+)", tag)
    if numbers is None:
        return warning("endpoint", f"{host} does not say which version it is ({tag}); packages need {wanted} or newer")
    if (int(numbers[1]), int(numbers[2])) < tuple(map(int, wanted.split("."))):
        return failed("endpoint", f"{host} is version {tag}, and packages need {wanted} or newer; it would refuse or misread them")
    return ok("endpoint", f"{host}, version {tag}")


def _http(host: str, status: int, reason: str) -> str:
    words = {
        401: "does not accept this login; set KF_PIPELINES_TOKEN (or KF_PIPELINES_COOKIES) to a fresh one",
        403: "does not allow this; check --namespace, and your role in it",
        404: "knows no such thing; does --endpoint lead to Kubeflow Pipelines (often .../pipeline), version 2?",
        409: "has one of that name already",
    }
    return f"{host} {words.get(status, f'answers HTTP {status}: {reason}')}" + (f" (HTTP {status})" if status in words else "")


class Refusal(ValueError):
    """What a server said in place of an answer, with its HTTP status (0: it said nothing)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A Kubeflow that was reached. Every method raises ``Refusal`` with what the server said."""

    def __init__(self, login: Login) -> None:
        self.login, self.host = login, login.host
        with self._in_words(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it speaks to version 2 only
            token = os.environ.get("KF_PIPELINES_TOKEN") or None
            self.client = kfp.Client(
                host=self.host,
                namespace=login.namespace or "kubeflow",
                existing_token=token,
                cookies=os.environ.get("KF_PIPELINES_COOKIES") or None,
                ssl_ca_cert=os.environ.get("SSL_CERT_FILE") or None,
            )
            _hurry(self.client)
            self.pipelines = kfp_server_api.PipelineServiceApi(self.client._pipelines_api.api_client)

    @contextlib.contextmanager
    def _in_words(self, what: str = "") -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # kfp prints links of its own
                yield
        except kfp_server_api.ApiException as error:
            raise Refusal(f"{what}{_http(self.host, error.status, str(error.reason))}{_detail(error.body)}", error.status) from error
        except (HTTPError, TimeoutError) as error:
            raise Refusal(f"{what}{self.host} cannot be reached: {str(error).splitlines()[0]}", 0) from error

    def upload(self, package: Path) -> tuple[str, str]:
        """The package's pipeline and version, made if they are not there; their ids."""
        name, version = _name(package), version_of(package)
        with self._in_words("upload: "):
            pipeline = self._pipeline(name) or self._made(name)
            known = {one.display_name: one.pipeline_version_id for one in self._versions(pipeline)}
            if version not in known:
                made = self.client.upload_pipeline_version(str(package), version, pipeline_id=pipeline)
                known[version] = made.pipeline_version_id
            return pipeline, known[version]

    def _pipeline(self, name: str) -> str | None:
        """The id of the pipeline of that name in our namespace (kfp's own look-up knows of none)."""
        wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
        found = self.pipelines.pipeline_service_list_pipelines(namespace=self.login.namespace, filter=json.dumps(wanted)).pipelines
        return found[0].pipeline_id if found else None

    def _made(self, name: str) -> str:
        body = kfp_server_api.V2beta1Pipeline(display_name=name, namespace=self.login.namespace or None)
        try:
            return str(self.pipelines.pipeline_service_create_pipeline(body).pipeline_id)
        except kfp_server_api.ApiException as error:
            if error.status != 409:  # somebody was faster
                raise
            return str(self._pipeline(name))

    def _versions(self, pipeline: str) -> Iterator[Any]:
        token = ""
        while True:
            page = self.client.list_pipeline_versions(pipeline, page_token=token, page_size=100)
            yield from page.pipeline_versions or []
            token = page.next_page_token or ""
            if not token:
                return

    def _experiment(self, name: str) -> str:
        return str(self.client.create_experiment(name, namespace=self.login.namespace or None).experiment_id)

    def start(self, package: Path, name: str, experiment: str, values: Mapping[str, Any], service_account: str = "") -> str:
        """Start a run of a package; its id."""
        pipeline, version = self.upload(package)
        with self._in_words("run: "):
            made = self.client.run_pipeline(
                self._experiment(experiment), name, params=dict(values), pipeline_id=pipeline, version_id=version,
                service_account=service_account or None,
            )  # fmt: skip
            return str(made.run_id)

    def repeat(self, package: Path, name: str, experiment: str, values: Mapping[str, Any], cron: str, service_account: str = "") -> str:
        """Start a run at the times of a cron expression (six fields, seconds first), one at a time, none made up for; its id."""
        pipeline, version = self.upload(package)
        with self._in_words("schedule: "):
            made = self.client.create_recurring_run(
                self._experiment(experiment), name, cron_expression=cron, max_concurrency=1, no_catchup=True, params=dict(values),
                pipeline_id=pipeline, version_id=version, service_account=service_account or None,
            )  # fmt: skip
            return str(made.recurring_run_id)

    def link(self, run: str) -> str:
        """Where a browser shows a run."""
        return f"{self.host}/#/runs/details/{run}"

    def follow(self, run: str, say: Callable[[str], None] = print) -> int:
        """Say what each step of a run does until the run has ended. 0: it succeeded; 1: it did not."""
        said: dict[str, str] = {}
        answered = time.monotonic()
        while True:
            try:
                with self._in_words():
                    found = self.client.get_run(run)
                answered = time.monotonic()
            except Refusal as error:
                if time.monotonic() - answered > PATIENCE or 400 <= error.status < 500:
                    raise ValueError(f"{error}; the run goes on: {self.link(run)}") from error
                time.sleep(POLL_SECONDS)
                continue
            for task, state in _tasks(found).items():
                if said.get(task) != state:
                    say(f"{task}: {state.lower()}")
                    said[task] = state
            if found.state in ENDED:
                say(f"run {run}: {found.state.lower()}" + (f", {found.error.message}" if found.error else ""))
                return 0 if found.state == "SUCCEEDED" else 1
            time.sleep(POLL_SECONDS)


def _tasks(run: Any) -> dict[str, str]:
    """The state of every box; drivers and the run's own root left out."""
    details = (run.run_details.task_details if run.run_details else None) or []
    return {one.display_name: one.state for one in details if one.state and not one.display_name.endswith("-driver") and one.parent_task_id}


def _hurry(client: kfp.Client) -> None:
    """Give every call of a client a time limit: kfp hands none down to the library that has one."""
    rest = client._run_api.api_client.rest_client  # (all services share it)
    wait = rest.request

    def request(*args: Any, **kwargs: Any) -> Any:
        return wait(*args, **{**kwargs, "_request_timeout": kwargs.get("_request_timeout") or SECONDS})

    rest.request = request


def _detail(body: Any) -> str:
    with contextlib.suppress(TypeError, ValueError):
        found = json.loads(body)
        message = found.get("message") or found.get("error") or ""
        return f"; {str(message).splitlines()[0][:300]}" if message else ""
    return ""


def _name(package: Path) -> str:
    spec = next(iter(yaml.safe_load_all(package.read_text())))
    return str(spec["pipelineInfo"]["name"])


def version_of(package: Path) -> str:
    """What a package's version is called: vapi's, and a hash of its text."""
    return f"{vapi.__version__}-{hashlib.sha256(package.read_bytes()).hexdigest()[:8]}"


def complain(message: str) -> None:
    """A line for whoever started the command."""
    print(message, file=sys.stderr, flush=True)
