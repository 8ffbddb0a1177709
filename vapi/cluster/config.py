"""Facts about a cluster, declared once: what ``pipelines/cluster.yaml`` holds, and what its defaults are.

The defaults are a node of eight A100 and a volume that every pod can mount. As in ``vapi.config`` a section is a frozen
dataclass and a field has its documentation under it; quantities are written as Kubernetes writes them (900Gi, 500m).
Nothing here asks a cluster: whether the facts are true is ``preflight``'s business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import vapi
from vapi.config import STAGES, require

STEPS = ("preflight", *STAGES)
"""The boxes of the graph."""
GPU_STEPS = tuple(name for name, stage in STAGES.items() if stage.parallel)
"""Those that run on the GPU node, where a recipe wants one."""

CERTIFICATES = "/etc/vapi-certificates"
"""Where pods.ca_bundle is mounted."""

QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
METADATA = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TOLERATION = ("key", "operator", "value", "effect", "tolerationSeconds")
UNITS = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip
MOVING = ("latest", "main", "master", "dev", "nightly", "stable", "edge")
"""Tags that mean another image tomorrow."""


def require_pinned(image: str, field: str) -> None:
    """Raises ValueError unless an image is named by digest or by a version's tag."""
    name, at, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    require(
        bool(re.fullmatch(r"sha256:[0-9a-f]{64}", digest)) if at else bool(tag) and tag.lower() not in MOVING,
        f"{field} is {image!r}; name it by digest (name@sha256:...) or by a version's tag, which never means another image: "
        "the cache of Kubeflow sees the name alone",
    )


def _require_quantities(section: str, values: dict[str, str]) -> None:
    for name, value in values.items():
        require(bool(QUANTITY.fullmatch(value)), f"{section}.{name} is {value!r}; write a quantity as Kubernetes does: 4, 500m, 64Gi")


def _require_name(field: str, name: str) -> None:
    require(not name or bool(NAME.fullmatch(name)), f"{field} is {name!r}; names in Kubernetes have small letters, digits, - and .")


def require_label(field: str, name: str) -> None:
    """Raises ValueError for the name of a volume's source that Kubeflow cannot mount: it calls the volume by the same name."""
    words = "Kubeflow mounts what has small letters, digits and - in its name, at most 63 of them"
    require(not name or bool(LABEL.fullmatch(name)), f"{field} is {name!r}; {words}")


def require_tolerations(field: str, tolerations: Any) -> None:
    """Raises ValueError for what is no list of Kubernetes' tolerations."""
    for toleration in tolerations:
        known = isinstance(toleration, dict) and set(toleration) <= set(TOLERATION)
        require(known, f"{field} holds {toleration!r}; a toleration is a mapping with some of {', '.join(TOLERATION)}")


def amount(quantity: str) -> float:
    """A quantity as a number: 64Gi -> 68719476736."""
    number = quantity.rstrip("mkKMGTPi")
    return float(number) * UNITS[quantity[len(number) :]]


def _require_room(section: str, memory: str, shared: str) -> None:
    require(amount(shared) < amount(memory), f"{section}.shared_memory {shared} is a part of {section}.memory {memory}, and must be less")


@dataclass(frozen=True)
class ImageConfig:
    """The container image, one for all steps (see Dockerfile)."""

    name: str = f"registry.example.com/vapi:{vapi.__version__}"
    """By digest (name@sha256:...) or by a version's tag; the form's field cluster_image."""
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node fetches it."""
    pull_secret: str = ""
    """Secret of type kubernetes.io/dockerconfigjson that opens the registry; empty: none."""

    def __post_init__(self) -> None:
        require_pinned(self.name, "image.name")
        _require_name("image.pull_secret", self.pull_secret)


@dataclass(frozen=True)
class CpuConfig:
    """What a step without a GPU asks for: preflight, subset, register, and every step of a recipe that needs none (digits)."""

    cpu: str = "2"
    """Cores."""
    memory: str = "8Gi"
    """Memory, shared memory included: request and limit."""
    shared_memory: str = "1Gi"
    """Size of /dev/shm, of the memory above."""
    scratch: str = "20Gi"
    """Size limit of /tmp, on the node's own disk."""

    def __post_init__(self) -> None:
        _require_quantities("cpu", vars(self))
        _require_room("cpu", self.memory, self.shared_memory)


@dataclass(frozen=True)
class GpuConfig:
    """The node that tokens, tune and evaluate run on, and what they ask of it."""

    resource: str = "nvidia.com/gpu"
    """The name under which the device plugin offers GPUs."""
    per_node: int = 8
    """GPUs of a node, and as many as a step takes; the form's fields tokens_gpus, tune_gpus, evaluate_gpus."""
    node_selector: dict[str, str] = field(default_factory=lambda: {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"})
    """Labels that the node bears; the form's field cluster_node_selector."""
    tolerations: list[dict[str, str]] = field(
        default_factory=lambda: [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    )
    """Taints of the node that are fine; the form's field cluster_tolerations."""
    autoscaled: bool = False
    """Whether such nodes are made on demand: then it is no failure if none is there yet."""
    cpu: str = "64"
    """Cores."""
    memory: str = "512Gi"
    """Memory, shared memory included: request and limit."""
    shared_memory: str = "64Gi"
    """Size of /dev/shm, of the memory above: NCCL needs more than the 64 MB that a pod has by itself."""
    scratch: str = "100Gi"
    """Size limit of /tmp, on the node's own disk."""

    def __post_init__(self) -> None:
        _require_quantities("gpu", {name: getattr(self, name) for name in ("cpu", "memory", "shared_memory", "scratch")})
        _require_room("gpu", self.memory, self.shared_memory)
        require_tolerations("gpu.tolerations", self.tolerations)
        require(self.per_node >= 1, f"gpu.per_node is {self.per_node}; a GPU node has at least 1")


@dataclass(frozen=True)
class VolumeConfig:
    """The volume for what outlives a pod: data, weights, checkpoints, results. Recipes that need no GPU mount none."""

    claim: str = "vapi"
    """PersistentVolumeClaim in the namespace of the run; the form's field cluster_volume."""
    path: str = "/mnt/vapi"
    """Where it is mounted."""
    size: str = "2Ti"
    """Size to ask for, in the manifest."""
    storage_class: str = ""
    """Its StorageClass, in the manifest; empty: the cluster's default."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """ReadWriteOnce will do where all steps run on one node; a TrainJob, or an experiment with limits.parallel above 1, is refused it."""

    def __post_init__(self) -> None:
        _require_quantities("volume", {"size": self.size})
        require(bool(self.claim), "volume.claim is empty; name a PersistentVolumeClaim")
        require_label("volume.claim", self.claim)
        _require_name("volume.storage_class", self.storage_class)
        taken = ("/tmp", "/dev", "/opt/vapi", "/opt/venv", "/etc", "/usr", "/proc", "/sys")
        free = (
            self.path.startswith("/") and self.path != "/" and not any(self.path == one or self.path.startswith(f"{one}/") for one in taken)
        )
        require(free, f"volume.path is {self.path!r}; give a folder that nobody else has, such as /mnt/vapi")


@dataclass(frozen=True)
class LimitsConfig:
    """When to give up, and how often to try again."""

    timeouts: dict[str, int] = field(
        default_factory=lambda: {"preflight": 900, "subset": 14400, "tokens": 14400, "tune": 86400, "evaluate": 86400, "register": 3600}
    )
    """Seconds that a step may take once its pod runs."""
    run: int = 259200
    """Seconds that a whole run may take, waiting for nodes included."""
    parallel: int = 2
    """Models of an experiment that are tuned and evaluated at once; the others wait their turn."""
    retries: int = 2
    """Attempts after the first, for a node that was taken away or a network that failed; a step continues where it stopped."""
    retry_seconds: int = 60
    """Seconds before the second attempt; doubled for each further one."""

    def __post_init__(self) -> None:
        require(sorted(self.timeouts) == sorted(STEPS), f"limits.timeouts names {', '.join(self.timeouts)}; it needs {', '.join(STEPS)}")
        for name in ("run", "retry_seconds"):
            require(getattr(self, name) >= 1, f"limits.{name} is {getattr(self, name)}; give at least 1 second")
        require(self.parallel >= 1, f"limits.parallel is {self.parallel}; give at least 1")
        require(all(seconds >= 1 for seconds in self.timeouts.values()), "limits.timeouts must all be at least 1 second")
        require(self.retries >= 0, f"limits.retries is {self.retries}; give a number of attempts, or 0 for none")


@dataclass(frozen=True)
class PodsConfig:
    """What every pod bears or knows."""

    service_account: str = ""
    """The run's service account; empty: the namespace's own (default-editor, pipeline-runner)."""
    labels: dict[str, str] = field(default_factory=dict)
    """Such as {kueue.x-k8s.io/queue-name: gpu} for a Kueue queue, {sidecar.istio.io/inject: 'false'} for a mesh."""
    annotations: dict[str, str] = field(default_factory=dict)
    """As labels."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables with nothing secret in them."""
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    """Secrets as environment: {mlflow-login: {username: MLFLOW_TRACKING_USERNAME, password: MLFLOW_TRACKING_PASSWORD}}."""
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    """ConfigMaps as environment, in the same form."""
    ca_bundle: str = ""
    """ConfigMap whose key ca.crt holds the certificates that the site trusts, the public ones included; empty: the image's."""
    proxy: str = ""
    """Address of the HTTP(S) proxy; empty: none."""
    no_proxy: str = "localhost,127.0.0.1,.svc,.cluster.local"
    """What is reached without it."""

    def __post_init__(self) -> None:
        for what, named in (("secrets", self.secrets), ("config_maps", self.config_maps)):
            for name, keys in named.items():
                _require_name(f"pods.{what}", name)
                require(bool(keys), f"pods.{what}.{name} names no key; write {{key: VARIABLE}}")
        variables = [
            *self.env,
            *(variable for named in (self.secrets, self.config_maps) for keys in named.values() for variable in keys.values()),
        ]
        for variable in variables:
            require(bool(VARIABLE.fullmatch(variable)), f"pods names the variable {variable!r}; it has letters, digits and _")
        for what, given in (("labels", self.labels), ("annotations", self.annotations)):
            for name in given:
                require(bool(METADATA.fullmatch(name)), f"pods.{what} has {name!r}; a key is like kueue.x-k8s.io/queue-name")
        _require_name("pods.service_account", self.service_account)
        require_label("pods.ca_bundle", self.ca_bundle)


@dataclass(frozen=True)
class MlflowConfig:
    """The tracking server (mlflow/kubernetes sets one up). Who logs in does so through pods.secrets."""

    uri: str = ""
    """Its address, as pods reach it: http://mlflow.mlflow.svc:5000; empty: MLFLOW_TRACKING_URI of the pods, or none."""


@dataclass(frozen=True)
class TrainerConfig:
    """Kubeflow Trainer v2, which runs tune on several nodes in the packages whose name ends in -trainjob."""

    runtime: str = "torch-distributed"
    """The ClusterTrainingRuntime."""
    nodes: int = 2
    """Nodes of gpu.per_node GPUs; the form's field tune_nodes."""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, f"trainer.nodes is {self.nodes}; give a number of nodes")


@dataclass(frozen=True)
class ClusterConfig:
    """A cluster: what ``cluster.yaml`` holds."""

    image: ImageConfig = field(default_factory=ImageConfig)
    cpu: CpuConfig = field(default_factory=CpuConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    pods: PodsConfig = field(default_factory=PodsConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
