"""A run from the working tree: the values of ``params.yaml``, and the revision whose data a cluster can fetch.

What the cluster computes must follow from a commit that it can reach, so a tree with edits is refused, unless told
otherwise. dvc.lock is no edit: this machine rewrites it whenever it runs a stage, and no result follows from it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from pipelines import packages, pipeline
from vapi import config, recipes
from vapi.cluster import form as forms
from vapi.config import Config

NO_EDIT = ("dvc.lock",)


def values(root: Path, package: str, dirty: bool) -> dict[str, Any]:
    """The form's fields that reproduce the tree's ``dvc repro`` on a cluster: what params.yaml changes, and the data's origin.

    Raises ValueError for a tree with edits (unless ``dirty``), or a commit that no remote has.
    """
    recipe, nodes = packages.recipe_of(package)
    changed = changes(config.load(root / "params.yaml"), recipe, nodes)
    edits = [line[3:] for line in _git(root, "status", "--porcelain", "--untracked-files=no").splitlines() if line[3:] not in NO_EDIT]
    if edits and not dirty:
        raise ValueError(f"{', '.join(edits)} differ from the last commit, which is what a cluster would see; commit, or add --dirty")
    return {**changed, **origin(root)}


def changes(ours: Config, recipe: str, nodes: bool = False) -> dict[str, Any]:
    """What a configuration changes against a recipe, as fields of its form, and as overrides for what has no field."""
    fields, base = pipeline.fields(recipes.RECIPES[recipe].gpu, nodes), recipes.recipe(recipe)
    found: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for section, mine in config.plain(ours).items():
        for knob, value in mine.items():
            if value == getattr(getattr(base, section), knob):
                continue
            name = f"{section}_{knob}"
            if name in fields:
                found[name] = value
            else:
                overrides[f"{section}.{knob}"] = value
    assert all(forms.stands_for(name) for name in found)
    return found | ({"overrides": overrides} if overrides else {})


def closest(root: Path) -> str:
    """The published package whose recipe params.yaml is nearest to."""
    ours = config.load_values(root / "params.yaml")
    return min(packages.PUBLISHED, key=lambda name: len(recipes.changes(recipes.recipe(name), ours)))


def origin(root: Path) -> dict[str, str]:
    """data_uri and data_revision: the repository's remote, and the commit. Raises ValueError where a cluster finds neither."""
    commit = _git(root, "rev-parse", "HEAD").strip()
    remotes = _git(root, "remote").split()
    if not remotes:
        raise ValueError("this clone has no remote, so no cluster can fetch its data; git remote add, git push, and try again")
    name = "origin" if "origin" in remotes else remotes[0]
    if not _git(root, "branch", "--remotes", "--contains", commit).strip():
        raise ValueError(f"commit {commit[:12]} is in none of {', '.join(remotes)} yet; git push, and try again")
    uri = _git(root, "remote", "get-url", name).strip()
    return {"data_uri": uri, "data_revision": commit}


def _git(root: Path, *words: str) -> str:
    ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"git {' '.join(words)}: {ran.stderr.strip() or ran.returncode}")
    return ran.stdout
