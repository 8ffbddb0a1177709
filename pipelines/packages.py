"""Compiled packages: one YAML file for each recipe, ready for "Upload pipeline".

A file holds two documents, the pipeline and what it asks of Kubernetes. It follows from the recipe, cluster.yaml and the code
alone, so it is kept in git, and a test compiles it again. Only ASCII gets in: Kubeflow's database may not take more.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from pipelines import experiment, pipeline
from vapi import config, recipes
from vapi.cluster.config import ClusterConfig

HERE = Path(__file__).parent
CLUSTER = HERE / "cluster.yaml"
COMPILED = HERE / "compiled"
PUBLISHED = ("digits", "digits-t2i", "janus-pro-1b", "llamagen-xl-c2i", "llamagen-xl-t2i", "llamagen-xxl-c2i")
"""Recipes whose packages are kept in git. A control or an -official run is one of these with a field changed."""
COMPLETE = "python -m pipelines cluster --write"
"""The command that writes a complete cluster.yaml."""
HEAD = "# Made by python -m pipelines compile; ready for Upload pipeline in Kubeflow.\n"
MAX_BYTES = 100_000


def load_cluster(path: Path = CLUSTER) -> ClusterConfig:
    """The facts of ``cluster.yaml``. Raises ValueError that names the field."""
    try:
        return config.build(ClusterConfig, config.load_values(path), complete=COMPLETE)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def published() -> list[str]:
    """Names of the packages in git."""
    return [*PUBLISHED, *experiment.PACKAGES, *(pipeline.name_of(name, nodes=True) for name in PUBLISHED if recipes.RECIPES[name].gpu)]


def recipe_of(name: str) -> tuple[str, bool]:
    """The recipe of a package, and whether it is the variant for several nodes. Raises ValueError if there is none."""
    recipe = name.removesuffix("-trainjob")
    recipes.recipe(recipe)
    return recipe, recipe != name


def built(name: str, cluster: ClusterConfig) -> Any:
    """A package's pipeline. Raises ValueError if there is none of that name."""
    if name in experiment.PACKAGES:
        return experiment.build(name, cluster)
    recipe, nodes = recipe_of(name)
    return pipeline.build(recipe, cluster, nodes)


def text(name: str, cluster: ClusterConfig) -> str:
    """A package's two documents."""
    flow = built(name, cluster)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(folder) / "package.yaml"
        compiler.Compiler().compile(flow, str(path))
        # kfp's own head lists mappings in an order that is another in every process
        made = HEAD + re.sub(r"\A(#.*\n)+", "", path.read_text())
    strange = sorted(set(re.findall(r"[^\x00-\x7f]", made)))
    assert not strange, f"{name}: {strange} are no ASCII"
    assert len(made) < MAX_BYTES, f"{name}: {len(made)} bytes"
    return made


def constants(package: Path) -> dict[str, Any]:
    """What a compiled file tells its first box beside the form: cluster, work_dir, and of a recipe's package recipe and trainjob."""
    try:
        spec = next(iter(yaml.safe_load_all(package.read_text())))
        tasks = spec["root"]["dag"]["tasks"]
        first, names = ("expand", ("cluster", "work_dir")) if "expand" in tasks else ("preflight", pipeline.GIVEN)
        given = tasks[first]["inputs"]["parameters"]
        return {name: given[name]["runtimeValue"]["constant"] for name in names}
    except (yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{package} is no package that python -m pipelines compile made") from error


def cluster_text(cluster: ClusterConfig) -> str:
    """``cluster.yaml``, every field with its documentation."""
    head = "# Facts about the cluster, for: python -m pipelines compile. The defaults are a node of 8 A100. What a form's field can\n"
    head += "# change is named; everything else is fixed in the packages, so compile them again after a change here.\n\n"
    return head + config.dump(cluster)
