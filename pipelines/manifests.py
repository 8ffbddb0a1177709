"""What a cluster's owner applies once: the volume, and what the run's service account must be allowed.

    python -m pipelines manifests --namespace my-team | kubectl apply -f -

Kubeflow's own roles cover pods, volumes and logs. They do not cover TrainJobs, nor looking at nodes, without which preflight
can only warn.
"""

from __future__ import annotations

from typing import Any

import yaml

from vapi.cluster.api import TRAINER
from vapi.cluster.config import ClusterConfig

NAMESPACE, SERVICE_ACCOUNT = "kubeflow", "pipeline-runner"
"""Those of a Kubeflow Pipelines that stands alone; in full Kubeflow: the profile's, and default-editor."""


def volume(cluster: ClusterConfig, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """The PersistentVolumeClaim."""
    spec: dict[str, Any] = {"accessModes": [cluster.volume.access_mode], "resources": {"requests": {"storage": cluster.volume.size}}}
    if cluster.volume.storage_class:
        spec["storageClassName"] = cluster.volume.storage_class
    return [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": _called(cluster.volume.claim, namespace), "spec": spec}]


def rbac(cluster: ClusterConfig, namespace: str = NAMESPACE, account: str = "") -> list[dict[str, Any]]:
    """Roles and their bindings to the run's service account."""
    account = account or cluster.pods.service_account or SERVICE_ACCOUNT
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    inside = [
        _rule(TRAINER["group"], ["trainjobs"], ["create", "get", "list", "watch", "delete"]),
        _rule("", ["pods", "pods/log"], ["get", "list", "watch"]),
        _rule("", ["persistentvolumeclaims", "resourcequotas", "serviceaccounts"], ["get", "list"]),
        *_named("secrets", [*cluster.pods.secrets, cluster.image.pull_secret]),
        *_named("configmaps", [*cluster.pods.config_maps, cluster.pods.ca_bundle]),
    ]
    outside = [_rule("", ["nodes"], ["list"]), _rule(TRAINER["group"], ["clustertrainingruntimes"], ["get"])]
    return [
        _role("Role", _called("vapi-steps", namespace), inside),
        _binding("RoleBinding", _called("vapi-steps", namespace), "Role", subject),
        _role("ClusterRole", _called("vapi-preflight"), outside),
        _binding("ClusterRoleBinding", _called(f"vapi-preflight-{namespace}"), "ClusterRole", subject, role="vapi-preflight"),
    ]


def text(objects: list[dict[str, Any]], head: str) -> str:
    """Manifests as YAML."""
    return f"# {head}\n" + yaml.safe_dump_all(objects, sort_keys=False, explicit_start=True)


def _called(name: str, namespace: str = "") -> dict[str, Any]:
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": {"app.kubernetes.io/name": "vapi"}}


def _rule(group: str, resources: list[str], verbs: list[str], names: list[str] | None = None) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs, **({"resourceNames": names} if names else {})}


def _named(resource: str, names: list[str]) -> list[dict[str, Any]]:
    """The right to read just these; none where there are none: an empty list would mean all."""
    wanted = [name for name in names if name]
    return [_rule("", [resource], ["get"], wanted)] if wanted else []


def _role(kind: str, metadata: dict[str, Any], rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata, "rules": rules}


def _binding(kind: str, metadata: dict[str, Any], of: str, subject: dict[str, str], role: str = "") -> dict[str, Any]:
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": of, "name": role or metadata["name"]}
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata, "roleRef": reference, "subjects": [subject]}
