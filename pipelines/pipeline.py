"""The graph: six boxes in a row, from a filled form to a version in the registry.

    preflight -> subset -> tokens -> tune -> evaluate -> register

No box hides others (loops, exit handlers and conditions would: Kubeflow shows those collapsed), and the gate before the
registry is inside ``register``. The form's fields are those of preflight's signature, with a recipe's values in them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl

from components.evaluate.component import evaluate
from components.preflight.component import preflight
from components.register.component import register
from components.subset.component import subset
from components.tokens.component import tokens
from components.trainjob.component import trainjob
from components.tune.component import tune
from pipelines.fields import KINDS
from pipelines.resources import environment, place
from vapi import config, recipes
from vapi.cluster import form as forms
from vapi.cluster.config import ClusterConfig

GIVEN = ("recipe", "cluster", "work_dir", "trainjob")
"""Inputs of preflight that are the package's own, and no fields of the form."""
ABSENT: dict[str, Any] = {"cluster_volume": "", "tune_nodes": 1}
"""Fields that not every form has, and what they are then."""


def graph(form: Mapping[str, Any], recipe: str, cluster: ClusterConfig, nodes: bool) -> None:
    """The boxes and what flows between them. ``nodes``: tune runs on several nodes, in a TrainJob."""
    base, gpu = recipes.recipe(recipe), recipes.RECIPES[recipe].gpu
    work_dir = cluster.volume.path if gpu else ""

    checked = preflight(recipe=config.plain(base), cluster=config.plain(cluster), work_dir=work_dir, trainjob=nodes, **form)
    plans = checked.outputs

    picked = subset(plan=plans["subset"], work_dir=work_dir)
    encoded = tokens(plan=plans["tokens"], work_dir=work_dir, subset=picked.outputs["subset"])
    data = {"subset": picked.outputs["subset"], "tokens": encoded.outputs["tokens"]}
    if nodes:
        facts = {"cluster": config.plain(cluster), "environment": environment(cluster)}
        fields = {name: form[name] for name in ("tune_gpus", "tune_nodes", *(name for name in form if name.startswith("cluster_")))}
        tuned = trainjob(plan=plans["tune"], work_dir=work_dir, **data, **facts, **fields)
    else:
        tuned = tune(plan=plans["tune"], work_dir=work_dir, **data)
    measured = evaluate(plan=plans["evaluate"], work_dir=work_dir, model=tuned.outputs["model"])
    made = {"model": tuned.outputs["model"], "evaluation": measured.outputs["evaluation"]}
    registered = register(plan=plans["register"], work_dir=work_dir, **made)

    boxes = {"preflight": checked, "subset": picked, "tokens": encoded, "tune": tuned, "evaluate": measured, "register": registered}
    for step, task in boxes.items():
        place(task, step, form, cluster, gpu=gpu, pod_gpus=not (nodes and step == "tune"))


def fields(gpu: bool, nodes: bool, first: Any = preflight) -> dict[str, type]:
    """The form's fields and their types: inputs of the ``first`` box. Without a volume there are none about it, and for one node none
    about nodes."""
    absent = {*GIVEN, *(() if gpu else ("cluster_volume",)), *(() if nodes else ("tune_nodes",))}
    return {name: KINDS[spec.type] for name, spec in first.component_spec.inputs.items() if name not in absent}


def defaults(recipe: str, cluster: ClusterConfig, nodes: bool = False) -> dict[str, Any]:
    """What the form shows at first."""
    base, gpu = recipes.recipe(recipe), recipes.RECIPES[recipe].gpu
    return {name: kind(forms.default(name, base, cluster, gpu)) for name, kind in fields(gpu, nodes).items()}


def build(recipe: str, cluster: ClusterConfig, nodes: bool = False) -> Any:
    """The pipeline of a recipe, ready to be compiled: its signature is the form.

    Raises ValueError for a recipe that is not known, or that has no use for several nodes.
    """
    recipes.recipe(recipe)
    row = recipes.RECIPES[recipe]
    if nodes and not row.gpu:
        raise ValueError(f"the recipe {recipe} needs no GPU, and so no second node")
    values = defaults(recipe, cluster, nodes)
    flow = functools.partial(graph, recipe=recipe, cluster=cluster, nodes=nodes)
    return made(name_of(recipe, nodes), f"{row.doc} Expect {row.expect}.", fields(row.gpu, nodes), values, cluster, flow)


def made(
    name: str,
    doc: str,
    kinds: Mapping[str, type],
    values: Mapping[str, Any],
    cluster: ClusterConfig,
    graph: Callable[[dict[str, Any]], None],
) -> Any:
    """A pipeline ready to be compiled: the fields of its form are the arguments of a function, ``values`` their defaults."""

    def flow(*given: Any) -> None:
        graph({**ABSENT, **dict(zip(values, given, strict=True))})

    flow.__name__ = name
    flow.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=values[name], annotation=kind)
            for name, kind in kinds.items()
        ]
    )
    flow.__doc__ = "\n".join([doc, "", "Args:", *(f"    {name}: {forms.doc(name)}" for name in values)])
    limit = dsl.PipelineConfig(active_deadline_seconds=cluster.limits.run)
    return dsl.pipeline(name=name, description=doc, pipeline_config=limit)(flow)


def name_of(recipe: str, nodes: bool = False) -> str:
    """What the package, and the pipeline in Kubeflow, are called."""
    return f"{recipe}-trainjob" if nodes else recipe
