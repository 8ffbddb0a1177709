"""A run from the working tree: the values of ``params.yaml``, and the revision whose data a cluster can fetch.

What the cluster computes must follow from a commit that it can reach, so a tree with edits is refused, unless told
otherwise: files of git's and files that DVC tracks alike. dvc.lock is no edit: this machine rewrites it whenever it runs a
stage, and no result follows from it.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines import packages
from vapi import config, recipes
from vapi.config import Config

NO_EDIT = ("dvc.lock",)
POINTER = "data.dvc"


def values(root: Path, pipeline: Any, recipe: Mapping[str, Any], dirty: bool) -> dict[str, Any]:
    """The fields of a package's form that reproduce the tree's ``dvc repro`` on a cluster: what params.yaml changes against the
    recipe, and the data's origin.

    Raises ValueError for a tree with edits (unless ``dirty``), or for a commit or data that no remote has.
    """
    changed = changes(config.load(root / "params.yaml"), recipe, pipeline.component_spec.inputs)
    edits = [line[3:] for line in _git(root, "status", "--porcelain", "--untracked-files=no").splitlines() if line[3:] not in NO_EDIT]
    edits += _edited_data(root)
    if edits and not dirty:
        raise ValueError(f"{', '.join(edits)} differ from the last commit, which is what a cluster would see; commit, or add --dirty")
    return {**changed, **origin(root)}


def changes(ours: Config, recipe: Mapping[str, Any], form: Iterable[str]) -> dict[str, Any]:
    """What a configuration changes against a recipe's plain values, as fields of its form, and as overrides for what has no field."""
    form, base = set(form), config.build(Config, dict(recipe))
    found: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for section, mine in config.plain(ours).items():
        for knob, value in mine.items():
            if value == getattr(getattr(base, section), knob):
                continue
            name = f"{section}_{knob}"
            if name in form:
                found[name] = value
            else:
                overrides[f"{section}.{knob}"] = value
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
    if uri.startswith(("/", ".", "file:")) or Path(uri).exists():
        raise ValueError(f"the remote {name} is {uri}, a folder of this machine; a cluster needs an address, or -p data_uri=...")
    return {"data_uri": uri, "data_revision": commit}


def _edited_data(root: Path) -> list[str]:
    """Files that DVC tracks and somebody changed. Raises ValueError if their bytes are in no remote of DVC's."""
    if not (root / POINTER).is_file():
        return []
    from dvc.repo import Repo

    with contextlib.chdir(root), contextlib.closing(Repo(str(root))) as repo:
        found = repo.status(targets=[POINTER])
        outs = [change["changed outs"] for changes in found.values() for change in changes if "changed outs" in change]
        edited = [path for out in outs for path, state in out.items() if state != "deleted"]  # not pulled yet is no edit
        if not edited and (absent := sorted(name for name, state in repo.status(targets=[POINTER], cloud=True).items() if state == "new")):
            raise ValueError(f"{', '.join(absent)} are in no remote of DVC's; dvc push, and try again")
    return edited


def _git(root: Path, *words: str) -> str:
    ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"git {' '.join(words)}: {ran.stderr.strip() or ran.returncode}")
    return ran.stdout
