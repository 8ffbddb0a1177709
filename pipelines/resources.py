"""What a box asks of the cluster: image, size, GPUs, volume, environment, time.

Fields of the form are placeholders here, which Kubeflow fills in when a run starts; what it takes from nobody but the
package (timeouts, retries, mounts) comes from cluster.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

from vapi.cluster.config import CERTIFICATES, GPU_STEPS, ClusterConfig

RUN_ID = "KFP_RUN_ID"
"""Environment: the run's id, from the pod's label; as a parameter it would be part of the cache's key."""
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")


def place(
    task: PipelineTask, step: str, form: Mapping[str, Any], cluster: ClusterConfig, *, gpu: bool, pod_gpus: bool = True, title: str = ""
) -> None:
    """Give a box its place. ``gpu``: the recipe wants the GPU node and a volume. ``pod_gpus`` False: others do the work. ``title``: what
    the box is called that is placed as a ``step`` is."""
    on_gpus = step in GPU_STEPS and pod_gpus
    size = cluster.gpu if gpu and on_gpus else cluster.cpu
    task.set_display_name(title or step.capitalize())
    task.set_container_image(form["cluster_image"])
    task.set_cpu_request(size.cpu).set_cpu_limit(size.cpu)
    task.set_memory_request(size.memory).set_memory_limit(size.memory)
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=size.shared_memory)
    kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=size.scratch)
    if on_gpus:
        task.set_accelerator_type(cluster.gpu.resource).set_accelerator_limit(
            form[f"{step}_gpus"]
        )  # a string: of a number the driver makes none
        task.register_pipeline_channels([form[f"{step}_gpus"]])  # which kfp 2.17 forgets: inside a loop nobody would know the number
        kubernetes.add_node_selector_json(task, form["cluster_node_selector"])
        kubernetes.add_toleration_json(task, form["cluster_tolerations"])
    if gpu:
        kubernetes.mount_pvc(task, pvc_name=form["cluster_volume"], mount_path=cluster.volume.path)
    # what preflight finds is of the moment; what lies on a volume is found again there, and a cached step writes nothing
    task.set_caching_options(not gpu and step not in ("preflight", "register"))
    _bound(task, step, cluster, pod_gpus)
    _inform(task, cluster, optional=step == "preflight")


def _bound(task: PipelineTask, step: str, cluster: ClusterConfig, pod_gpus: bool) -> None:
    """Time and attempts. Preflight has one: what it finds does not pass by itself. A box that waits for a TrainJob waits for its
    nodes too; the job has the time limit."""
    limits = cluster.limits
    kubernetes.set_timeout(task, limits.timeouts[step] if pod_gpus else limits.run)
    if limits.retries and step != "preflight":
        # the last argument bounds all attempts together, from the first one's start: kfp's own default is an hour
        backoff = {"backoff_duration": f"{limits.retry_seconds}s", "backoff_max_duration": f"{limits.run}s"}
        task.set_retry(num_retries=limits.retries, backoff_factor=2.0, **backoff)


def _inform(task: PipelineTask, cluster: ClusterConfig, optional: bool) -> None:
    """What every pod bears and knows. ``optional``: the pod starts without what is missing, in order to say so."""
    pods = cluster.pods
    kubernetes.use_field_path_as_env(task, RUN_ID, "metadata.labels['pipeline/runid']")
    kubernetes.set_image_pull_policy(task, cluster.image.pull_policy)
    if cluster.image.pull_secret:
        kubernetes.set_image_pull_secrets(task, [cluster.image.pull_secret])
    for name, keys in pods.secrets.items():
        kubernetes.use_secret_as_env(task, name, dict(keys), optional=optional)
    for name, keys in pods.config_maps.items():
        kubernetes.use_config_map_as_env(task, name, dict(keys), optional=optional)
    for name, value in pods.labels.items():
        kubernetes.add_pod_label(task, name, value)
    for name, value in pods.annotations.items():
        kubernetes.add_pod_annotation(task, name, value)
    if pods.ca_bundle:
        kubernetes.use_config_map_as_volume(task, pods.ca_bundle, CERTIFICATES, optional=optional)
    for name, value in environment(cluster).items():
        task.set_env_variable(name, value)


def environment(cluster: ClusterConfig) -> dict[str, str]:
    """Variables with nothing secret in them."""
    pods, found = cluster.pods, dict(cluster.pods.env)
    if pods.proxy:
        values = {"HTTP_PROXY": pods.proxy, "HTTPS_PROXY": pods.proxy, "NO_PROXY": pods.no_proxy}
        found |= values | {name.lower(): value for name, value in values.items()}
    if pods.ca_bundle:
        found |= dict.fromkeys(CERTIFICATE_VARIABLES, f"{CERTIFICATES}/ca.crt")
    return found
