"""An experiment as a Kubeflow package: its tree has every stage once, its table is that of ``vapi experiment``, and it runs whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import world
from imports import ROOT

from pipelines import experiment as package
from pipelines import packages, pipeline
from vapi import config, grids, recipes, track
from vapi.cluster import experiment, preflight, step
from vapi.cluster.config import ClusterConfig
from vapi.cluster.origin import Origin
from vapi.grids import GRIDS

GRID = "policy-dropout"
"""Of three rows that tune two models."""


def filled(name: str = "experiment-cpu", **changes: Any) -> dict[str, Any]:
    """A package's form with some fields changed."""
    gpu = package.PACKAGES[name]
    kinds = pipeline.fields(gpu, nodes=False, first=package.expand)
    shown = {field: package.forms.default(field, config.Config(), ClusterConfig(), gpu) for field in kinds}
    return {**pipeline.ABSENT, **shown, **changes}


def tiny() -> dict[str, Any]:
    """Overrides that make digits run on the tiny world, but for the sweep, which a table without one leaves out."""
    digits = recipes.recipe("digits")
    changes = world.fields((), world.settings(digits, tune_steps=2, track_uri=""), digits)["overrides"]
    return {name: value for name, value in changes.items() if name not in ("evaluate.temperatures", "evaluate.guidances")}


# --- the tree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_a_tree_has_every_stage_once_and_every_point(name: str, tmp_path: Path) -> None:
    asked = experiment.resolved(filled(experiment_name=name, experiment_seeds=[0, 3.0]), volume=False)
    assert config.plain(asked.base) == config.plain(grids.under(GRIDS[name], recipes.recipe(GRIDS[name].recipe))) and asked.seeds == [0, 3]
    place = step.Place(tmp_path, tmp_path)  # (with a volume no file is read for its digest)
    plans = {run: preflight.plans(settings, Origin(), place) for run, settings in asked.runs.items()}
    titled = {grids.title(*run): experiment._named(name, grids.title(*run), each) for run, each in plans.items()}
    branches = experiment.grown(list(titled.values()))

    (tmp_path / "tree").write_text(json.dumps(branches))
    first = experiment.opened(str(tmp_path / "tree"), "")
    for images, opened in zip(branches, first, strict=True):
        assert opened == {"subset": images["subset"], "tokens": images["tokens"], "at": opened["at"]}
        for model, inner in zip(images["then"], experiment.opened(str(tmp_path / "tree"), opened["at"]), strict=True):
            assert inner["tune"] == model["tune"]
            assert [look["evaluate"] for look in experiment.opened(str(tmp_path / "tree"), inner["at"])] == [
                look["evaluate"] for look in model["then"]
            ]

    models = [model for images in branches for model in images["then"]]
    looks = [look for model in models for look in model["then"]]
    found = {
        stage: [branch[stage] for branch in level]
        for level, stages in zip((branches, models, looks), experiment.LEVELS)
        for stage in stages
    }
    for stage, made in found.items():
        wanted = {json.dumps(each[stage], sort_keys=True) for each in plans.values()}
        untagged = [json.dumps({field: value for field, value in plan.items() if field != "tags"}, sort_keys=True) for plan in made]
        assert sorted(untagged) == sorted(wanted), stage
    assert len(models) == 2 * grids.tunings(GRIDS[name])
    for images in branches:
        for model in images["then"]:
            assert experiment._content(titled[model["tune"]["tags"][experiment.POINT]], ["subset"]) == experiment._content(
                images, ["subset"]
            )

    experiment._describe(asked, dict(zip(titled, plans.values(), strict=True)), tmp_path / "table")
    table = json.loads((tmp_path / "table").read_text())
    judged = {look["evaluate"]["tags"][experiment.POINT]: look["evaluate"]["config"] for look in looks}
    assert [(end["point"], end["seed"]) for end in table["ends"]] == list(asked.runs)
    assert all(judged[end["run"]] == plans[end["point"], end["seed"]]["evaluate"]["config"] for end in table["ends"])
    assert max(len(json.dumps(plan)) for stage in found.values() for plan in stage) < 20_000, "a box gets its plan on its command line"


def test_a_package_with_a_volume_takes_the_papers_recipe() -> None:
    asked = experiment.resolved(filled("experiment", experiment_name="table5"), volume=True)
    assert asked.base == grids.under(GRIDS["table5"], recipes.recipe("llamagen-xl-t2i"))
    asked = experiment.resolved(filled("experiment", experiment_recipe="digits", overrides={"tune.steps": 3.0}), volume=True)
    assert asked.base.model == recipes.recipe("digits").model and asked.base.tune.steps == 3 and len(asked.distinct) == 4


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"experiment_name": "tabel4"}, "no experiment is called 'tabel4'; did you mean 'table4'?"),
        ({"experiment_recipe": "digit"}, "no recipe is called 'digit'; did you mean 'digits'?"),
        ({"experiment_recipe": "llamagen-xxl-c2i"}, "and this package mounts none; take the package experiment"),
        ({"experiment_seeds": [0, 0.0]}, "experiment_seeds are 0, 0; a seed counts once"),
        ({"experiment_seeds": []}, "experiment_seeds names no seed"),
        ({"experiment_name": "rates", "experiment_seeds": list(range(7))}, "a run takes at most 150; start fewer seeds at a time"),
        ({"experiment_seeds": ["first"]}, "experiment_seeds is 'first'; it must be an int"),
        ({"overrides": {"tune.rewards": {"mse": 1}}}, "overrides: tune.rewards is what this experiment varies"),
        ({"overrides": {"tune": {"seed": 3}}}, "overrides: tune.seed is what experiment_seeds decides here"),
        ({"overrides": {"tune.lrr": 1}}, "tune has no field 'lrr'; did you mean 'lr'?"),
        ({"overrides": {"evaluate.reference": "data/gone.parquet"}}, "overrides evaluate.reference: data/gone.parquet is not in"),
        ({"experiment_name": GRID, "overrides": {"tune.rewards": {"msee": 1}}}, "overrides tune.rewards: no reward is called 'msee'"),
        ({"tune_gpus": "-1"}, "tune_gpus is '-1'"),
        ({"cluster_image": "vapi:latest"}, "cluster_image is 'vapi:latest'"),
    ],
)  # fmt: skip
def test_a_mistake_ends_the_first_box(
    changes: Mapping[str, Any], answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VAPI_STATE", str(tmp_path / "state"))
    with pytest.raises(SystemExit) as stop:
        experiment.expand(
            config.plain(ClusterConfig()),
            "",
            filled(track_uri="off", **changes),
            *(str(tmp_path / name) for name in ("checks", "table", "tree")),
        )
    assert stop.value.code == 2 and answer in capsys.readouterr().err and not (tmp_path / "table").exists()


def test_a_package_answers_a_mistake_before_it_is_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines import commands

    for words, answer in (
        (["-p", "experiment_name=tabel4"], "did you mean 'table4'?"),
        (["--from-dvc"], "an experiment has experiment_recipe and overrides"),
    ):
        assert commands.main(["submit", "experiment", "--endpoint", "http://127.0.0.1:9", *words]) == 2
        assert answer in capsys.readouterr().err


# --- a whole run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package with GPUs and a volume compiled in, run here by kfp's local runner; its folder."""
    folder = tmp_path_factory.mktemp("kubeflow")
    root = world.write(folder / "world")
    fields = {"experiment_name": GRID, "experiment_recipe": "digits", "data_uri": str(root), "track_uri": "off", "overrides": tiny()}
    given = [
        word for name, value in fields.items() for word in ("-p", f"{name}={value if isinstance(value, str) else config.scalar(value)}")
    ]
    words = [sys.executable, "-m", "pipelines", "run-local", "experiment", "--root", str(folder / "out"), *given]
    done = subprocess.run(words, cwd=ROOT, env=world.ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (run,) = (path for path in (folder / "out").iterdir() if path.name != "volume")
    yield run


def test_a_whole_run_makes_the_table_of_all_its_evaluations(ran: Path) -> None:
    boxes = [path.parent.name for path in ran.rglob("executor_output.json")]
    assert {box: boxes.count(box) for box in boxes} == {
        "expand": 1,
        "subset": 1,
        "tokens": 1,
        "branches": 1,
        "branches-2": 2,
        "tune": 2,
        "evaluate": 2,
        "collect": 1,
        "verdict": 1,
    }
    results = json.loads((ran / "collect/results/results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["base", "none", "official"] and all(row["state"] == "done" for row in rows.values())
    assert rows["base"]["runs"] == rows["none"]["runs"] != rows["official"]["runs"]
    for row, side in (("base", "base"), ("none", "tuned"), ("official", "tuned")):
        (evaluation,) = map(Path, rows[row]["runs"])
        assert evaluation.parent == ran.parent / "volume/artifacts/evaluate", "on the volume, where the next experiment finds it"
        assert rows[row]["ours"]["fid"]["values"] == [json.loads((evaluation / "metrics.json").read_text())[side]["fid"]]
    dropout = {
        json.loads((path.parent / "config.json").read_text())["sections"]["tune"]["policy_dropout"]
        for path in (ran.parent / "volume/artifacts/tune").glob("*/summary.json")
    }
    assert dropout == {"none", "official"}
    table = (ran / "collect/results/table.md").read_text()
    assert (ran / "collect/page").read_text() == table and "| official | " in table and "recipe digits with " in table
    assert (ran / "collect/results/table.csv").read_text().startswith("row,metric,paper,")
    assert "| form | ok | 2 configurations of" in (ran / "expand/checks").read_text()


def test_rows_are_nested_runs_of_the_experiment(
    ran: Path, tmp_path: Path, mlflow_db: Path, sender_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAPI_WORK_DIR", str(ran.parent / "volume"))
    monkeypatch.setenv("VAPI_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("KFP_RUN_ID", "a-run")
    monkeypatch.setenv(track.GIVEN, "{}")
    (tmp_path / "mlflow.db").write_bytes(mlflow_db.read_bytes())
    made = json.loads((ran / "expand/table").read_text())
    made["config"]["track"]["uri"] = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "table").write_text(json.dumps(made))
    evaluations = {}
    for path in ran.rglob("evaluate/executor_output.json"):
        (artifact,) = json.loads(path.read_text())["artifacts"]["evaluation"]["artifacts"]
        evaluations[artifact["metadata"][experiment.POINT]] = str(path.parent / "evaluation")
    assert evaluations.keys() == {"base, seed 0", "official, seed 0"}

    work_dir = "/mnt/vapi"  # (VAPI_WORK_DIR stands for it)
    experiment.collect(str(tmp_path / "table"), work_dir, evaluations, str(tmp_path / "results"), str(tmp_path / "page"))
    client = track.connect(made["config"]["track"]["uri"])
    runs = client.search_runs([client.get_experiment_by_name("vapi").experiment_id])
    (parent,) = (run for run in runs if run.data.tags["stage"] == "experiment")
    rows = {run.info.run_name.rpartition(" ")[0]: run for run in runs if run is not parent}
    assert rows.keys() == {"base", "none", "official"} and parent.info.run_name.startswith(f"{GRID} ")
    for run in rows.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id and run.data.tags["kubeflow.run"] == "a-run"
        assert run.data.tags["data"] == made["data"]["digest"]
    assert rows["official"].data.params["tune.policy_dropout"] == "official" and "fid" in rows["official"].data.metrics

    evaluations.pop("official, seed 0")
    with pytest.raises(SystemExit):
        experiment.collect(str(tmp_path / "table"), work_dir, evaluations, str(tmp_path / "none"), str(tmp_path / "none.md"))
    assert not (tmp_path / "none").exists()


def test_a_row_that_fails_for_good_leaves_the_others_their_table(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAPI_WORK_DIR", str(ran.parent / "volume"))
    monkeypatch.setenv("VAPI_STATE", str(tmp_path / "state"))
    monkeypatch.setenv(track.GIVEN, "{}")
    branches = json.loads((ran / "expand/tree").read_text())
    (model,) = (model for model in branches[0]["then"] if "official" in model["tune"]["tags"][experiment.POINT])
    plan = json.loads(json.dumps(model["tune"]))
    plan["config"]["tune"]["prior_weight"] = 1e39  # beyond float32: the loss is not finite
    inputs = {name: str(next(ran.rglob(f"{name}/{name}"))) for name in ("subset", "tokens")}
    work_dir = "/mnt/vapi"  # (VAPI_WORK_DIR stands for it)
    assert step.attempt("tune", plan, work_dir, str(tmp_path / "model"), **inputs) is None
    assert "loss is inf" in capsys.readouterr().out
    look = model["then"][0]["evaluate"]
    assert step.attempt("evaluate", look, work_dir, str(tmp_path / "evaluation"), tune=str(tmp_path / "model")) is None

    evaluations = {"official, seed 0": str(tmp_path / "evaluation")}
    for path in ran.rglob("evaluate/executor_output.json"):
        (artifact,) = json.loads(path.read_text())["artifacts"]["evaluation"]["artifacts"]
        evaluations.setdefault(artifact["metadata"][experiment.POINT], str(path.parent / "evaluation"))
    table = str(ran / "expand/table")
    failed = experiment.collect(table, work_dir, evaluations, str(tmp_path / "results"), str(tmp_path / "page"))
    assert failed == ["official, seed 0"]
    states = {row["name"]: row["state"] for row in json.loads((tmp_path / "results/results.json").read_text())["rows"]}
    assert states == {"base": "done", "none": "done", "official": "failed"}
    experiment.verdict([])
    with pytest.raises(SystemExit):
        experiment.verdict(failed)

    plan.pop("tags")
    with pytest.raises(SystemExit) as stop:
        step.attempt("tune", plan, work_dir, str(tmp_path / "none"), **inputs)
    assert stop.value.code == 2 and not (tmp_path / "none").exists(), "of a run that is no experiment's it is the run's end"


def test_stages_of_different_runs_are_different_executions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in MLflow would show the numbers of whichever came last."""
    monkeypatch.setenv("KFP_RUN_ID", "a-run")
    plan = {"data": {"uri": "", "revision": "", "digest": "d"}, "code": {"commit": "c"}}
    told = {name: step.known({**plan, "tags": {experiment.POINT: name}}) for name in ("base, seed 0", "base, seed 1")}
    assert len({each["execution"] for each in told.values()}) == 2 and step.known(plan)["execution"] == "a-run"
    assert all(each["tags"] == {"kubeflow.run": "a-run", experiment.POINT: name} for name, each in told.items())


def test_both_packages_are_published() -> None:
    assert {"experiment", "experiment-cpu"} <= set(packages.published())
