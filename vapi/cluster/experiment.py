"""``vapi experiment`` as a Kubeflow run: a grid becomes a tree of plans at its first step, and one table at its last.

    form -> the grid's runs -> checks -> a tree of plans -> (the steps that every run has) -> table

The tree has every stage once, however many points and seeds share it: images, the models that are tuned on them, the looks
at a model. The pipeline loops over its branches, which a box reads from the tree for each inner loop (``opened``). Evaluations
come back in any order; each bears its run's tags, by which its row is found. The grids, and what a table looks like, are those
of ``vapi.grids`` and ``vapi.experiment``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapi import config, data, experiment, grids, recipes, track
from vapi.cluster import form as forms
from vapi.cluster import preflight, step
from vapi.cluster.origin import Origin
from vapi.cluster.step import Plan
from vapi.config import Config
from vapi.grids import Grid

LEVELS = (("subset", "tokens"), ("tune",), (experiment.LAST,))
"""The stages of each level of the tree; a loop of the pipeline goes over each."""
POINT = "vapi.point"
"""The tag that names a run: a point and a seed, the first of those that share it."""
MAX_EVALUATIONS = 150
"""Of a run. The box that makes the table is told of all of them in one argument of its command line: some 660 bytes for each, and
Linux takes 128 KiB."""
THEN = "then"
"""Where a branch of the tree has its branches."""
AT = "at"
"""Where a branch that a loop goes over has its place in the tree: numbers of branches, one a level."""


@dataclass(frozen=True)
class Asked:
    """What a filled form asks for: a grid, what its points change, seeds, and where the data come from."""

    name: str
    base: Config
    seeds: list[int]
    source: Origin

    @property
    def grid(self) -> Grid:
        """The named grid."""
        return grids.grid(self.name)

    @property
    def runs(self) -> dict[tuple[str, int], Config]:
        """The configuration of each point and seed."""
        return grids.runs(self.grid, self.base, self.seeds)

    @property
    def distinct(self) -> list[Config]:
        """Those of the runs that are not the same."""
        return list({json.dumps(config.plain(settings), sort_keys=True): settings for settings in self.runs.values()}.values())


def resolved(values: Mapping[str, Any], volume: bool) -> Asked:
    """What a filled form asks for, of a package with a ``volume`` or without. Raises ValueError that names its field."""
    grid = grids.grid(values["experiment_name"])
    name = values["experiment_recipe"] or (grid.full_size if volume else grid.recipe)
    recipe = recipes.recipe(name)
    if recipes.RECIPES[name].gpu and not volume:
        raise ValueError(f"experiment_recipe {name} keeps its data on a volume, and this package mounts none; take the package experiment")
    seeds = grids.seeds(values["experiment_seeds"], "experiment_seeds")
    try:
        grids.require_free(grid, list(forms.flat(values["overrides"])))
    except ValueError as error:
        raise ValueError(f"overrides: {str(error).replace('--seeds', 'experiment_seeds').replace('--', '')}") from None
    base, source = preflight.resolved(config.plain(grids.under(grid, recipe)), {"tune_nodes": 1, **values}, volume)
    asked = Asked(values["experiment_name"], base, seeds, source)
    assert asked.runs, f"{asked.name} has nothing to run"
    if (looks := len(preflight.distinct(asked.runs.values(), experiment.LAST))) > MAX_EVALUATIONS:
        raise ValueError(
            f"experiment_seeds: {name} x seeds are {looks} evaluations, and a run takes at most {MAX_EVALUATIONS}; "
            "start fewer seeds at a time"
        )
    return asked


# --- the first step ----------------------------------------------------------------------------


def expand(cluster: Mapping[str, Any], work_dir: str, form: Mapping[str, Any], report: str, table: str, tree: str) -> list[dict[str, Any]]:
    """Check what the form asks for; the first branches of the tree.

    Writes the checks as Markdown to ``report``, the whole to ``tree``, and to ``table`` what ``collect`` must know. Raises
    SystemExit(2) after printing every check if one of them failed.
    """

    def ask() -> tuple[Asked, Sequence[Config], Origin]:
        asked = resolved(form, bool(work_dir))
        return asked, asked.distinct, asked.source

    with step.in_words(), step.workplace(work_dir) as place:
        asked, source = preflight.looked_at(ask, place, cluster, {"tune_nodes": 1, **form}, False, report)
        plans = {grids.title(point, seed): preflight.plans(settings, source, place) for (point, seed), settings in asked.runs.items()}
        data.write_json(Path(tree), grown([_named(asked.name, title, each) for title, each in plans.items()]))
        _describe(asked, plans, Path(table))
        return opened(tree, "")


def _named(name: str, title: str, plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """A run's plans with its tags: stages are MLflow runs of their own, which should say whose."""
    return {stage: {**plan, "tags": {"vapi.experiment": name, POINT: title}} for stage, plan in plans.items()}


def grown(runs: Sequence[Mapping[str, Plan]], levels: Sequence[Sequence[str]] = LEVELS) -> list[dict[str, Any]]:
    """Runs as branches: the plans of a level's stages, and under ``then`` the branches of the runs that share them.

    What is shared has the tags of the first of these runs.
    """
    stages, *further = levels
    groups: dict[str, list[Mapping[str, Plan]]] = {}
    for plans in runs:
        groups.setdefault(_content(plans, stages), []).append(plans)
    return [{stage: group[0][stage] for stage in stages} | ({THEN: grown(group, further)} if further else {}) for group in groups.values()]


def opened(tree: str, at: str) -> list[dict[str, Any]]:
    """The branches at a place of the file ``tree``, the first ones at "": each its stages' plans, and its own place under ``at``."""
    branches = data.read_json(Path(tree))
    for number in at.split():
        branches = branches[int(number)][THEN]
    return [
        {name: each for name, each in branch.items() if name != THEN} | {AT: f"{at} {number}".strip()}
        for number, branch in enumerate(branches)
    ]


def _content(plans: Mapping[str, Plan], stages: Sequence[str]) -> str:
    """What makes two runs share some stages: their plans, whoever's they are."""
    return json.dumps([{**plans[stage], "tags": None} for stage in stages], sort_keys=True)


def _describe(asked: Asked, plans: Mapping[str, Mapping[str, Plan]], path: Path) -> None:
    """What the table is made from: the grid, and by which run's evaluation each point and seed is judged."""
    first: dict[str, str] = {}
    for title, each in plans.items():
        first.setdefault(_content(each, LEVELS[-1]), title)
    ends = [
        {"point": point, "seed": seed, "run": first[_content(plans[grids.title(point, seed)], LEVELS[-1])]} for point, seed in asked.runs
    ]
    some = next(iter(plans.values()))[experiment.LAST]
    made = {"experiment": asked.name, "config": config.plain(asked.base), "seeds": asked.seeds, "ends": ends}
    data.write_json(path, made | {name: some[name] for name in ("data", "code")})


# --- the last step -----------------------------------------------------------------------------


def collect(table: str, work_dir: str, evaluations: Mapping[str, str], out: str, page: str) -> list[str]:
    """The table of an experiment, as ``vapi experiment`` makes it: table.md, table.csv and results.json in ``out``, the first of them
    in ``page`` too, and the rows as MLflow runs nested in one of the table.

    ``table`` is what ``expand`` wrote, ``evaluations`` are the artifacts of the evaluations by run. Returns the runs of those that
    hold a failure; their rows say so.
    """
    with step.in_words(), step.workplace(work_dir):
        made = data.read_json(Path(table))
        failed = {run: Path(path) for run, path in evaluations.items() if step.failure(Path(path))}
        folders = failed | {run: step.opened(Path(path)) for run, path in evaluations.items() if run not in failed}
        if missing := [end["run"] for end in made["ends"] if end["run"] not in folders]:
            raise ValueError(f"no evaluation came of {', '.join(dict.fromkeys(missing))}; start the run again (Clone run)")
        ends = {(end["point"], end["seed"]): folders[end["run"]] for end in made["ends"]}
        found = experiment.Table(made["experiment"], step.settings_of(made), made["seeds"], Path(out), ends, set(failed.values()))
        os.environ[track.GIVEN] = json.dumps(step.known(made))
        rows = found.write()
        found.track(rows, set())
        text = found.markdown(rows)
        print(text, flush=True)
        step.write(text, page)
        return list(failed)


def verdict(failed: Sequence[str]) -> None:
    """Raises SystemExit(2), with words, if runs ``failed``."""
    with step.in_words():
        if failed:
            words = "the table is whole but for them; why, the logs of their steps say (Clone run tries them again)"
            raise ValueError(f"{', '.join(failed)} failed; {words}")
