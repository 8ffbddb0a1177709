"""Questions to Kubernetes, and the answers in words; the only importer of the library kubernetes.

A question that nobody lets us ask (403) is a warning that names the permission, not a failure: a pipeline's service
account may often not list nodes, and the run is fine all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client import ApiException
from kubernetes.utils import parse_quantity
from urllib3.exceptions import HTTPError

from vapi.cluster.checks import Check, failed, ok, warning
from vapi.cluster.config import ClusterConfig

__all__ = ["ApiException", "HTTPError", "Kubernetes", "here", "named"]

SECONDS = (4, 15)
"""To connect, and to wait for an answer."""
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Kubernetes:
    """A cluster that answers, and the namespace that runs live in."""

    connection: Any
    namespace: str

    @property
    def core(self) -> Any:
        """Pods, volumes, secrets, nodes."""
        return client.CoreV1Api(self.connection)

    @property
    def objects(self) -> Any:
        """What other projects define: TrainJobs."""
        return client.CustomObjectsApi(self.connection)

    def may(self, verb: str, resource: str, group: str = "", subresource: str = "") -> bool:
        """Whether we are allowed to."""
        wants = {"verb": verb, "resource": resource, "group": group, "subresource": subresource}
        attributes = client.V1ResourceAttributes(namespace=self.namespace, **wants)
        review = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
        found = client.AuthorizationV1Api(self.connection).create_self_subject_access_review(review, _request_timeout=SECONDS)
        return bool(found.status.allowed)


def here() -> Kubernetes | None:
    """The cluster that this pod runs in; None where it is no pod."""
    settings = client.Configuration()
    try:
        config.load_incluster_config(settings)
    except config.ConfigException:
        return None
    return Kubernetes(_patient(settings), NAMESPACE.read_text().strip())


def named(context: str = "", namespace: str = "") -> Kubernetes:
    """The cluster of the kubeconfig (or KUBECONFIG), its present context or another one. Raises ValueError without one."""
    settings = client.Configuration()
    try:
        config.load_kube_config(context=context or None, client_configuration=settings)
        contexts, present = config.list_kube_config_contexts()
    except (config.ConfigException, OSError) as error:
        raise ValueError(f"there is no usable kubeconfig: {error}") from error
    chosen = next((one for one in contexts if one["name"] == context), present)
    return Kubernetes(_patient(settings), namespace or chosen["context"].get("namespace", "default"))


def _patient(settings: client.Configuration) -> client.ApiClient:
    settings.retries = 1
    return client.ApiClient(settings)


# --- asking ------------------------------------------------------------------------------------


def _asked(field: str, permission: str) -> Callable[[Callable[..., list[Check]]], Callable[..., list[Check]]]:
    """Turns what a server says in place of an answer into a check of ``field``."""

    def decorate(ask: Callable[..., list[Check]]) -> Callable[..., list[Check]]:
        @functools.wraps(ask)
        def answer(*args: Any, **kwargs: Any) -> list[Check]:
            try:
                return ask(*args, **kwargs)
            except ApiException as error:
                if error.status == 403:
                    return [warning(field, f"could not be looked at: this account may not {permission}")]
                if error.status == 401:
                    return [failed(field, "Kubernetes does not accept this login; renew it (kubectl get pods must work)")]
                return [failed(field, f"Kubernetes answered {error.status} {error.reason}")]
            except HTTPError as error:
                return [failed(field, f"Kubernetes cannot be reached: {_reason(error)}")]

        return answer

    return decorate


def _reason(error: HTTPError) -> str:
    return str(getattr(error, "reason", error)).splitlines()[0]


def _missing(error: ApiException) -> bool:
    return bool(error.status == 404)


# --- nodes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """What a step asks of each of its nodes, and the form's field that says so."""

    field: str
    gpus: int
    cpu: str
    memory: str
    nodes: int = 1


@_asked("cluster_node_selector", "list nodes (pipelines/manifests grants it)")
def nodes(
    kubernetes: Kubernetes, cluster: ClusterConfig, demands: Iterable[Demand], selector: Mapping[str, str], tolerations: Sequence[Any]
) -> list[Check]:
    """Whether there are nodes that can ever hold each step, whoever uses them now."""
    everyone = kubernetes.core.list_node(_request_timeout=SECONDS).items
    bearing = [node for node in everyone if selector.items() <= (node.metadata.labels or {}).items()]
    admitted = [node for node in bearing if _tolerated(node, tolerations)]
    if not bearing and cluster.gpu.autoscaled:
        return [warning("cluster_node_selector", f"no node bears {_words(selector)} now; fine if one is made on demand (gpu.autoscaled)")]
    if not bearing:
        known = sorted({value for node in everyone for name, value in (node.metadata.labels or {}).items() if name in selector})
        hint = f"; nodes have {', '.join(known)}" if known else ""
        return [failed("cluster_node_selector", f"no node bears {_words(selector)}{hint}")]
    if not admitted:
        return [failed("cluster_tolerations", f"every node that would do is tainted: {_taints(bearing)}")]
    return [_fitting(demand, admitted, cluster.gpu.resource) for demand in demands]


def _fitting(demand: Demand, admitted: Sequence[Any], resource: str) -> Check:
    wants = {"cpu": parse_quantity(demand.cpu), "memory": parse_quantity(demand.memory)} | ({resource: demand.gpus} if demand.gpus else {})
    offers = [{name: parse_quantity((node.status.allocatable or {}).get(name, "0")) for name in wants} for node in admitted]
    fit = sum(all(offer[name] >= want for name, want in wants.items()) for offer in offers)
    if fit >= demand.nodes:
        return ok(demand.field, f"{fit} of {len(admitted)} nodes can hold {_sizes(wants)}")
    best = max(offers, key=lambda offer: tuple(offer[name] for name in (resource, "memory", "cpu") if name in offer))
    if demand.gpus and best[resource] < demand.gpus:
        return failed(demand.field, f"asks for {demand.gpus} {resource}, and the largest node has {best[resource]}")
    if fit:
        return failed("tune_nodes", f"{demand.nodes} nodes are asked for, and {fit} can hold {_sizes(wants)}")
    return failed(demand.field, f"asks for {_sizes(wants)}, and the largest node has {_sizes(best)}; lower cpu or memory in cluster.yaml")


def _tolerated(node: Any, tolerations: Sequence[Mapping[str, Any]]) -> bool:
    return all(any(_tolerates(one, taint) for one in tolerations) for taint in _hard(node))


def _hard(node: Any) -> list[Any]:
    """The taints that keep pods away. A node that is being drained comes back: that one does not count."""
    taints = node.spec.taints or []
    return [taint for taint in taints if taint.effect != "PreferNoSchedule" and taint.key != "node.kubernetes.io/unschedulable"]


def _tolerates(toleration: Mapping[str, Any], taint: Any) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint.effect:
        return False
    if toleration.get("operator") == "Exists":
        return not toleration.get("key") or toleration["key"] == taint.key
    return toleration.get("key") == taint.key and (toleration.get("value") or "") == (taint.value or "")


def _taints(found: Iterable[Any]) -> str:
    return ", ".join(sorted({f"{taint.key}={taint.value or ''}:{taint.effect}" for node in found for taint in _hard(node)}))


def _words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def _sizes(values: Mapping[str, Any]) -> str:
    def show(name: str, value: Any) -> str:
        return f"{float(value) / 2**30:.0f}Gi memory" if name == "memory" else f"{float(value):g} {name}"

    return ", ".join(show(name, value) for name, value in values.items())


# --- what pods mount and know ------------------------------------------------------------------


@_asked("cluster_volume", "read PersistentVolumeClaims")
def volume(kubernetes: Kubernetes, claim: str, needed: int, several_pods: bool) -> list[Check]:
    """Whether the claim is there, bound, large enough (bytes), and can be mounted by all who need it at once: ``several_pods``, of a
    TrainJob or of models that are tuned at once, or one."""
    try:
        found = kubernetes.core.read_namespaced_persistent_volume_claim(claim, kubernetes.namespace, _request_timeout=SECONDS)
    except ApiException as error:
        if not _missing(error):
            raise
        words = f"{claim} does not exist in {kubernetes.namespace}; make it (pipelines/manifests/volume.yaml), or name another"
        return [failed("cluster_volume", words)]
    if found.status.phase == "Lost":
        return [failed("cluster_volume", f"{claim} has lost its volume; restore it or name another")]
    checks = []
    size = parse_quantity((found.status.capacity or found.spec.resources.requests or {}).get("storage", "0"))
    if size < needed:
        words = f"{claim} has {float(size) / 1e9:,.0f} GB, and a run needs about {needed / 1e9:,.0f} GB; enlarge it"
        checks.append(failed("cluster_volume", words))
    if found.status.phase != "Bound":
        checks.append(
            warning("cluster_volume", f"{claim} is {found.status.phase}; fine if it waits for its first pod (kubectl describe pvc)")
        )
    if several_pods and "ReadWriteMany" not in (found.spec.access_modes or []):
        checks.append(
            failed("cluster_volume", f"{claim} can be mounted on one node at a time, and pods on several need it at once: ReadWriteMany")
        )
    return checks or [ok("cluster_volume", f"{claim} is bound, {float(size) / 1e9:,.0f} GB")]


@_asked("pods.secrets", "read Secrets")
def secrets(kubernetes: Kubernetes, wanted: Mapping[str, Mapping[str, str]]) -> list[Check]:
    """Whether each secret is there with the keys that pods take from it."""
    return _keys("pods.secrets", kubernetes.core.read_namespaced_secret, kubernetes.namespace, wanted)


@_asked("pods.config_maps", "read ConfigMaps")
def config_maps(kubernetes: Kubernetes, wanted: Mapping[str, Mapping[str, str]]) -> list[Check]:
    """Whether each config map is there with the keys that pods take from it."""
    return _keys("pods.config_maps", kubernetes.core.read_namespaced_config_map, kubernetes.namespace, wanted)


def _keys(field: str, read: Callable[..., Any], namespace: str, wanted: Mapping[str, Mapping[str, str]]) -> list[Check]:
    checks = []
    for name, keys in wanted.items():
        try:
            found = set(read(name, namespace, _request_timeout=SECONDS).data or {})
        except ApiException as error:
            if not _missing(error):
                raise
            checks.append(failed(field, f"{name} does not exist in {namespace}; make it, or take it out of cluster.yaml"))
            continue
        lacking = sorted(set(keys) - found)
        has = f"; it has {', '.join(sorted(found))}" if found else "; it is empty"
        checks.append(failed(field, f"{name} lacks {', '.join(lacking)}{has}") if lacking else ok(field, f"{name} has {', '.join(keys)}"))
    return checks


@_asked("image.pull_secret", "read Secrets")
def pull_secret(kubernetes: Kubernetes, name: str) -> list[Check]:
    """Whether the secret that opens the registry is there, and is of its kind."""
    return _keys("image.pull_secret", kubernetes.core.read_namespaced_secret, kubernetes.namespace, {name: {".dockerconfigjson": ""}})


@_asked("pods.service_account", "read ServiceAccounts")
def service_account(kubernetes: Kubernetes, name: str) -> list[Check]:
    """Whether the run's service account is there."""
    try:
        kubernetes.core.read_namespaced_service_account(name, kubernetes.namespace, _request_timeout=SECONDS)
    except ApiException as error:
        if not _missing(error):
            raise
        return [failed("pods.service_account", f"{name} does not exist in {kubernetes.namespace}")]
    return [ok("pods.service_account", name)]


@_asked("gpu.resource", "list ResourceQuotas")
def quota(kubernetes: Kubernetes, resource: str, gpus: int) -> list[Check]:
    """Whether the namespace may ever have that many GPUs."""
    checks = []
    for found in kubernetes.core.list_namespaced_resource_quota(kubernetes.namespace, _request_timeout=SECONDS).items:
        limit = (found.spec.hard or {}).get(f"requests.{resource}")
        if limit is not None and parse_quantity(limit) < gpus:
            checks.append(
                failed("tune_gpus", f"quota {found.metadata.name} allows {limit} {resource} in {kubernetes.namespace}, not {gpus}")
            )
    return checks


# --- the trainer -------------------------------------------------------------------------------

TRAINER = {"group": "trainer.kubeflow.org", "version": "v1alpha1"}


@_asked("trainer.runtime", "read ClusterTrainingRuntimes (pipelines/manifests grants it)")
def trainer(kubernetes: Kubernetes, runtime: str) -> list[Check]:
    """Whether Kubeflow Trainer v2 is installed, has the runtime, and would take a TrainJob from us."""
    try:
        kubernetes.objects.get_cluster_custom_object(**TRAINER, plural="clustertrainingruntimes", name=runtime, _request_timeout=SECONDS)
    except ApiException as error:
        if not _missing(error):
            raise
        words = f"{runtime} does not exist; is Kubeflow Trainer v2 installed, with its runtimes?"
        return [failed("trainer.runtime", words)]
    lacking = [f"{verb} TrainJobs" for verb in ("create", "get", "delete") if not kubernetes.may(verb, "trainjobs", TRAINER["group"])]
    if lacking:
        return [failed("pods.service_account", f"may not {', '.join(lacking)}; apply pipelines/manifests/rbac.yaml")]
    if not kubernetes.may("get", "pods", subresource="log"):
        return [warning("pods.service_account", "may not read the logs of the job's pods; apply pipelines/manifests/rbac.yaml")]
    return [ok("trainer.runtime", runtime)]
