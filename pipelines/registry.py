"""Can the image be pulled? A question to its registry (OCI distribution specification), before a cluster asks it.

The name alone tells much: a tag that moves is refused. Then the registry is asked for the manifest, without a login or with
that of ``~/.docker/config.json``; one that wants a login which is not at hand here is a warning, since the cluster may have it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from vapi.cluster.checks import Check, failed, ok, warning
from vapi.cluster.config import ImageConfig, require_pinned

SECONDS = 10
ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in ("oci.image.index.v1", "oci.image.manifest.v1", "docker.distribution.manifest.list.v2", "docker.distribution.manifest.v2")
)


def split(image: str) -> tuple[str, str, str]:
    """Registry, repository and reference: ``ghcr.io/a/b:1.0`` -> (ghcr.io, a/b, 1.0). Docker Hub where no registry is named."""
    name, at, digest = image.partition("@")
    path, _, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    first, _, rest = f"{path}/{last}".lstrip("/").partition("/")
    if rest and (re.search("[.:]", first) or first == "localhost"):
        return first, rest, digest if at else tag
    whole = f"{first}/{rest}" if rest else f"library/{first}"
    return "registry-1.docker.io", whole, digest if at else tag


def check(image: str, pull_secret: str = "") -> Check:
    """Whether the registry has the image, as far as it tells us."""
    field = "cluster_image"
    try:
        require_pinned(image, field)
    except ValueError as error:
        return failed(field, str(error).removeprefix(f"{field} is "))
    registry, repository, reference = split(image)
    if registry == split(ImageConfig().name)[0]:
        return failed(field, f"{image} is the placeholder that packages come with; build the image, push it, and name it in cluster.yaml")
    # as container engines do: a registry on this machine is spoken to without TLS
    scheme = "http" if re.match(r"(localhost|127\.0\.0\.1)(:|$)", registry) else "https"
    try:
        status = _head(f"{scheme}://{registry}/v2/{repository}/manifests/{reference}", registry)
    except OSError as error:
        return warning(
            field, f"{registry} cannot be reached from here ({getattr(error, 'reason', error)}); whether nodes can pull is unknown"
        )
    if status == 200:
        return ok(field, f"{image} is there")
    if status == 404:
        return failed(field, f"{registry} has no {repository} {reference}; push it, or name one that is there")
    if status in (401, 403):
        secret = f"nodes use {pull_secret}" if pull_secret else "name a login in image.pull_secret"
        return warning(field, f"{registry} wants a login for {repository} that is not at hand here; {secret}")
    return warning(field, f"{registry} answers HTTP {status} for {repository} {reference}")


def _head(url: str, registry: str) -> int:
    """The status of a HEAD request, after fetching the token that the registry asks for."""
    headers = {"Accept": ACCEPT, **_login(registry)}
    status, challenge = _ask(url, headers)
    if status == 401 and challenge.lower().startswith("bearer ") and (token := _token(challenge, headers)):
        status, _ = _ask(url, {**headers, "Authorization": f"Bearer {token}"})
    return status


def _ask(url: str, headers: dict[str, str]) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="HEAD"), timeout=SECONDS) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("WWW-Authenticate", "")


def _token(challenge: str, headers: dict[str, str]) -> str:
    wants = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if not wants.get("realm", "").startswith(("http://", "https://")):
        return ""
    query = urllib.parse.urlencode({name: wants[name] for name in ("service", "scope") if name in wants})
    login = {name: value for name, value in headers.items() if name == "Authorization"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{wants['realm']}?{query}", headers=login), timeout=SECONDS) as answer:
            found = json.loads(answer.read())
    except (urllib.error.HTTPError, ValueError):
        return ""
    return str(found.get("token") or found.get("access_token") or "")


def _login(registry: str) -> dict[str, str]:
    """The login for a registry that ``docker login`` has stored, if it is stored here in plain."""
    path = Path(os.environ.get("DOCKER_CONFIG", Path.home() / ".docker")) / "config.json"
    if not path.is_file():
        return {}
    known = json.loads(path.read_text()).get("auths", {})
    names = (registry, f"https://{registry}", "https://index.docker.io/v1/" if registry.endswith("docker.io") else registry)
    stored = next((known[name].get("auth", "") for name in names if name in known), "")
    return {"Authorization": f"Basic {base64.b64encode(base64.b64decode(stored)).decode()}"} if stored else {}
