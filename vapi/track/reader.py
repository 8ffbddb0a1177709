"""Runs back out of MLflow, as the folders that their stages wrote: what ``vapi report`` reads when it is given a run's id.

A stage that has ended left a record of its folder. Of one that has not, or that an older version logged, the parameters and
the history of its numbers are there, and are written down as the stage would have.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vapi import data
from vapi.config import STAGES, read_yaml
from vapi.track import sender

RECORD = "record"
"""Folder among a run's artifacts for what its stage wrote."""
COMPARISONS = "comparisons"
"""Folder among them for pages of several runs."""
LISTED = 5


def fetch(name: str, uri: str, target: Path) -> Path:
    """Write the stages of the run with the id ``name`` (an execution's, or one of its stages') below ``target``, and return it.

    What MLflow no longer has of it is said in ``data.NOTICES``. Raises ValueError if there is no such run, or no MLflow.
    """
    with _asked(name, uri) as client:
        everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(everywhere, f"attributes.run_id = '{name}'") if re.fullmatch(r"[0-9a-f]{32}", name) else []
        if not found:
            latest = client.search_runs(everywhere, "tags.stage = 'pipeline'", max_results=LISTED, order_by=["attributes.start_time DESC"])
            known = "".join(f"\n  {run.info.run_id}  {run.info.run_name}" for run in latest)
            raise ValueError(f"{name} is neither a folder here nor a run's id in MLflow at {uri}; the latest runs there:{known or ' none'}")
        stages, notices = _stages(client, everywhere, found[0])
        for stage, run in stages.items():
            _write(client, run, stage, target / stage)
    if not stages:
        raise ValueError(f"the run {name} in MLflow at {uri} has no stage of vapi")
    data.write_json(target / data.NOTICES, notices)
    return target


def attach(name: str, uri: str, page: Path) -> None:
    """Put a page among the artifacts of a run, in a folder of its own: the stage evaluate has left a page of the same name."""
    with _asked(name, uri) as client:
        client.log_artifact(name, str(page), COMPARISONS)


@contextlib.contextmanager
def _asked(name: str, uri: str) -> Iterator[Any]:
    """A client to ask for a run of that id. Raises ValueError where nobody answers, or for what MLflow refuses."""
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(sender.answering(uri))
        except ValueError as error:
            raise ValueError(f"{name} is no folder here, and cannot be looked up as a run's id: {error}") from None
        yield client


def _stages(client: Any, everywhere: list[str], run: Any) -> tuple[dict[str, Any], list[str]]:
    """The run of each stage: those of the same execution, the latest that ended where there are several, and those of earlier
    executions that made the inputs of stages which were skipped. And words for those that were deleted since."""
    name = run.data.tags.get("mlflow.parentRunId", "") or run.info.run_id
    parent = sender.kept(client, name)
    tags = parent.data.tags if parent else {}
    made = {tag.removeprefix(sender.UPSTREAM): id for tag, id in tags.items() if tag.startswith(sender.UPSTREAM)}
    upstream = [one for id in made.values() if (one := sender.kept(client, id))]
    own = client.search_runs(everywhere, f"tags.`mlflow.parentRunId` = '{name}'", order_by=["attributes.start_time ASC"])
    own.sort(key=lambda one: one.info.status == "FINISHED")  # a stable sort: of those that ended, the latest comes last
    found = {one.data.tags.get("stage", ""): one for one in [*upstream, *own, run]}
    gone = {stage: id for stage, id in made.items() if stage not in found}
    notices = [f"its stage {stage} is not shown: the run that it is of, {id}, was deleted in MLflow" for stage, id in gone.items()]
    notices += [] if parent else [f"what earlier executions made for it is not shown: the run above it, {name}, was deleted in MLflow"]
    return {stage: found[stage] for stage in STAGES if stage in found}, notices


def _write(client: Any, run: Any, stage: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    if client.list_artifacts(run.info.run_id, RECORD):
        client.download_artifacts(run.info.run_id, RECORD, str(folder.parent))
        folder.rmdir()
        (folder.parent / RECORD).rename(folder)
        return
    for file in client.list_artifacts(run.info.run_id):
        if file.path == "metrics.json":
            client.download_artifacts(run.info.run_id, file.path, str(folder))
    data.write_json(
        folder / "config.json", {"stage": stage, "sections": _sections(run.data.params), "inputs": {}, "status": run.info.status}
    )
    if stage == "tune":
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _history(client, run)))


def _sections(params: dict[str, str]) -> dict[str, Any]:
    """Parameters by their dotted names as nested values."""
    whole: dict[str, Any] = {}
    for name, text in params.items():
        *path, last = name.split(".")
        place = whole
        for part in path:
            place = place.setdefault(part, {})
        place[last] = read_yaml(text) if text else ""
    return whole


def _history(client: Any, run: Any) -> list[dict[str, float]]:
    """The numbers of each step that a tuning run logged; those that are not finite are left out."""
    steps: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        if name.startswith(("tune/", "holdout/")):
            for point in client.get_metric_history(run.info.run_id, name):
                if math.isfinite(point.value):
                    steps.setdefault(point.step, {"step": point.step})[name] = point.value
    return [steps[step] for step in sorted(steps)]
