"""The graph of an experiment: ``vapi experiment`` as one package, whose form asks for the grid's name and its seeds.

    expand -> for each choice of images:  subset -> tokens
                  for each model:             tune
                      for each look at it:        evaluate       -> collect -> verdict

A loop within a loop goes over what a box of its own returns (``branches``): over a field of the outer loop's item Kubeflow cannot.
A stage that points and seeds share is one box (``vapi.cluster.experiment`` makes the tree). The loop over models alone runs several
branches at once, limits.parallel of cluster.yaml, so no more boxes than these ask for GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.branches.component import branches
from components.collect.component import collect
from components.evaluate.component import evaluate
from components.expand.component import expand
from components.subset.component import subset
from components.tokens.component import tokens
from components.tune.component import tune
from components.verdict.component import verdict
from pipelines import pipeline
from pipelines.resources import place
from vapi import config
from vapi.cluster import form as forms
from vapi.cluster.config import ClusterConfig
from vapi.config import Config

PACKAGES = {"experiment": True, "experiment-cpu": False}
"""Packages of experiments, and whether they want the GPU node and a volume, as their recipes do."""


def graph(form: Mapping[str, Any], gpu: bool, cluster: ClusterConfig) -> None:
    """The boxes, the loops around them, and what flows between them."""
    work_dir = cluster.volume.path if gpu else ""
    fields = {name: form[name] for name in expand.component_spec.inputs if name in form}
    expanded = expand(cluster=config.plain(cluster), work_dir=work_dir, **fields)

    tree = expanded.outputs["tree"]
    with dsl.ParallelFor(expanded.outputs["Output"], parallelism=1, name="images") as images:
        picked = subset(plan=images.subset, work_dir=work_dir)
        encoded = tokens(plan=images.tokens, work_dir=work_dir, subset=picked.outputs["subset"])
        data = {"subset": picked.outputs["subset"], "tokens": encoded.outputs["tokens"]}
        on_images = branches(tree=tree, at=images.at)
        with dsl.ParallelFor(on_images.output, parallelism=cluster.limits.parallel, name="models") as models:
            tuned = tune(plan=models.tune, work_dir=work_dir, **data)
            of_model = branches(tree=tree, at=models.at)
            with dsl.ParallelFor(of_model.output, parallelism=1, name="evaluations") as evaluations:
                measured = evaluate(plan=evaluations.evaluate, work_dir=work_dir, model=tuned.outputs["model"])
    looks = dsl.Collected(measured.outputs["evaluation"])
    collected = collect(work_dir=work_dir, table=expanded.outputs["table"], evaluations=looks)
    judged = verdict(failed=collected.outputs["Output"])

    sized = functools.partial(place, form=form, cluster=cluster, gpu=gpu)
    for step, task in {"subset": picked, "tokens": encoded, "tune": tuned, "evaluate": measured}.items():
        sized(task, step)
    sized(expanded, "preflight", title="Expand")
    sized(on_images, "register", title="Models")
    sized(of_model, "register", title="Evaluations")
    sized(collected, "register", title="Collect")
    sized(judged, "preflight", title="Verdict")


def build(name: str, cluster: ClusterConfig) -> Any:
    """The pipeline of a package, ready to be compiled."""
    gpu = PACKAGES[name]
    kinds = pipeline.fields(gpu, nodes=False, first=expand)
    values = {field: kind(forms.default(field, Config(), cluster, gpu)) for field, kind in kinds.items()}
    doc = "A table of the paper, or one of ours (vapi experiment), of recipes that want "
    doc += "GPUs and a volume." if gpu else "neither GPUs nor a volume."
    return pipeline.made(name, doc, kinds, values, cluster, functools.partial(graph, gpu=gpu, cluster=cluster))
