"""The run form: flat fields, each called after the section and field of ``params.yaml`` it stands for.

Kubeflow's form is alphabetical and shows no descriptions, so a field must be known by its name: ``tune_lr`` is
``tune.lr``. Which fields there are, the signature of ``components/preflight`` says; what is not among them can be
reached through the field ``overrides``. Besides those of the configuration there are fields for the data's origin, for
GPUs, and for the cluster.
"""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vapi import config
from vapi.cluster.config import GPU_STEPS, ClusterConfig
from vapi.config import Config


@dataclass(frozen=True)
class Field:
    """A field that no section of params.yaml has."""

    doc: str
    default: Callable[[ClusterConfig, bool], Any]
    """From the cluster, and whether the recipe wants its GPU node."""


OTHERS = {
    "experiment_name": Field("The experiment, as vapi experiment lists them.", lambda cluster, gpu: "table4"),
    "experiment_recipe": Field(
        "The recipe that its points change; empty: that of the paper's run, or without a volume the embedded one.", lambda cluster, gpu: ""
    ),
    "experiment_seeds": Field("Seeds: tuning and samples of each point once with each.", lambda cluster, gpu: [0]),
    "data_uri": Field(
        "Where the names data/... lead: empty, the image; a mounted folder; a URI; a DVC repository (with data_revision).",
        lambda cluster, gpu: cluster.volume.path if gpu else "",
    ),
    "data_revision": Field("Commit or tag of the DVC repository that data_uri names; empty for all else.", lambda cluster, gpu: ""),
    **{
        f"{step}_gpus": Field(f"GPUs of the step {step}; 0 runs it on a CPU.", lambda cluster, gpu: str(cluster.gpu.per_node if gpu else 0))
        for step in GPU_STEPS
    },
    "tune_nodes": Field("Nodes of tune_gpus GPUs each.", lambda cluster, gpu: cluster.trainer.nodes),
    "track_uri": Field("MLflow's address; empty: what the pods' environment says; off: none.", lambda cluster, gpu: cluster.mlflow.uri),
    "overrides": Field("Any other fields of params.yaml, as {tune.temperature: 0.9}.", lambda cluster, gpu: {}),
    "cluster_image": Field("Container image of all steps, by digest or version.", lambda cluster, gpu: cluster.image.name),
    "cluster_node_selector": Field(
        "Labels of the nodes that steps with GPUs run on.", lambda cluster, gpu: dict(cluster.gpu.node_selector) if gpu else {}
    ),
    "cluster_tolerations": Field("Taints of those nodes that are fine.", lambda cluster, gpu: list(cluster.gpu.tolerations) if gpu else []),
    "cluster_volume": Field(
        "PersistentVolumeClaim for data, checkpoints and results.", lambda cluster, gpu: cluster.volume.claim if gpu else ""
    ),
}


def called(dotted: str, values: Mapping[str, Any]) -> str:
    """Where a form changes a field of params.yaml: tune.lr at ``tune_lr``, or without that in its overrides."""
    name = dotted.replace(".", "_", 1)
    return name if name in values else f"overrides {dotted}"


def gpus(name: str, values: Mapping[str, Any]) -> int:
    """A field that is a number of GPUs. It is text on the form: where a box asks for GPUs, Kubeflow's driver reads text alone, and takes
    a number for nothing. Raises ValueError for other text."""
    value = str(values[name])
    if not re.fullmatch("[0-9]+", value):
        raise ValueError(f"{name} is {value!r}; give a number of GPUs, or 0 for a CPU")
    return int(value)


def stands_for(name: str) -> tuple[str, str] | None:
    """The section and field that a form field stands for: ``tune_lr`` -> (tune, lr)."""
    section, _, knob = name.partition("_")
    hints = typing.get_type_hints(Config)
    return (section, knob) if section in hints and knob in typing.get_type_hints(hints[section]) else None


def default(name: str, recipe: Config, cluster: ClusterConfig, gpu: bool) -> Any:
    """The value that the form shows at first."""
    if name in OTHERS:
        return OTHERS[name].default(cluster, gpu)
    section, knob = _known(name)
    return getattr(getattr(recipe, section), knob)


def doc(name: str) -> str:
    """One sentence about a field."""
    if name in OTHERS:
        return OTHERS[name].doc
    section, knob = _known(name)
    return config.field_docs(typing.get_type_hints(Config)[section])[knob]


def _known(name: str) -> tuple[str, str]:
    found = stands_for(name)
    assert found is not None, f"{name} is neither a field of params.yaml nor one of form.OTHERS"
    return found


def resolve(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """The configuration that a filled form asks for, from a recipe's plain values.

    Raises ValueError in words of the form: what is wrong with which of its fields.
    """
    made = copy.deepcopy(dict(recipe))
    for name, value in values.items():
        if place := stands_for(name):
            made[place[0]][place[1]] = value
    for dotted, value in flat(values.get("overrides") or {}).items():
        section, _, knob = dotted.partition(".")
        if f"{section}_{knob}" in values:
            raise ValueError(f"overrides names {dotted}, which has a field of its own on the form: {section}_{knob}")
        if not isinstance(made.get(section), dict):
            raise ValueError(f"overrides names {dotted!r}; {config.nearest(section, made)}")
        made[section][knob] = value
    try:
        return config.build(Config, made)
    except ValueError as error:
        raise ValueError(_worded(str(error), values)) from None


def flat(overrides: Any) -> dict[str, Any]:
    """``{tune: {temperature: 0.9}}`` and ``{tune.temperature: 0.9}`` alike, as the second."""
    if not isinstance(overrides, Mapping):
        raise ValueError(f"overrides is {overrides!r}; write {{tune.temperature: 0.9}}")
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        nested = isinstance(value, Mapping) and "." not in name
        flat |= {f"{name}.{knob}": inner for knob, inner in value.items()} if nested else {name: value}
    return flat


def _worded(message: str, values: Mapping[str, Any]) -> str:
    """``tune.lr is ...`` as the form calls it, ``tune_lr is ...``."""

    def name(match: re.Match[str]) -> str:
        flat = f"{match[1]}_{match[2]}"
        return flat if flat in values else match[0]

    return re.sub(rf"\b({'|'.join(typing.get_type_hints(Config))})\.(\w+)", name, message)
