"""Grids say what the paper says and can all be run; a run shares what can be shared, goes on, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import world
from imports import MODULES, reached

from vapi import cli, config, data, experiment, grids, inputs, recipes, track
from vapi.config import Config
from vapi.experiment import Experiment
from vapi.grids import GRIDS, Grid, Point

FULL_SIZE = {
    "table1": "llamagen-xl-drawbench", "table2-xl": "llamagen-xl-c2i", "table3": "llamagen-xl-t2i", "table5": "llamagen-xl-t2i",
    "table3-janus": "janus-pro-1b", "figure5-t2i": "llamagen-xl-t2i", "figure5-janus": "janus-pro-1b",
}  # fmt: skip
"""The recipes of the paper's own runs; llamagen-xxl-c2i for the other grids."""

# arXiv 2512.19680 once more, typed for this test: rows in the grid's order, "-" where it prints nothing, ~ for what is read off a plot
PAPER = {
    "table1": """
        0.245 0.153
        0.274 0.208
        0.291 0.211""",
    "figure5": """
        - - - -
        - - - -""",
    "figure5-t2i": """
        - - - -
        - - - -""",
    "figure5-janus": """
        - - - -
        - - - -""",
    "table2": """
        14.36 86.55 0.63 0.69 2.37 252.16 0.81 0.59
        14.26 86.70 0.63 0.68 2.72 246.97 0.80 0.59
        22.99 72.49 0.56 0.68 4.31 221.57 0.75 0.58
        11.46 102.21 0.68 0.61 4.17 267.34 0.83 0.51
        7.65 116.70 0.71 0.64 2.28 273.53 0.83 0.56""",
    "table2-xl": """
        15.55 79.16 0.62 0.69 2.79 286.88 0.84 0.54
        - - - - 3.63 293.07 0.86 0.48
        9.23 111.59 0.71 0.59 2.94 299.63 0.84 0.53""",
    "table3": """
        0.042 0.550 0.032 0.197 0.750 0.263 0.306
        0.040 0.593 0.030 0.228 0.791 0.263 0.324
        0.050 0.606 0.040 0.238 0.769 0.328 0.339""",
    "table3-janus": """
        0.605 0.902 0.540 0.531 0.972 0.801 0.725
        0.600 0.912 0.585 0.540 0.988 0.835 0.744""",
    "table4": """
        14.36 86.55 0.63 0.69
        38.76 49.78 0.48 0.46
        38.63 48.14 0.49 0.46
        14.17 88.78 0.63 0.69
        7.65 116.70 0.68 0.64""",
    "figure4": """
        14.36 86.55
        38.63 48.14
        ~22.2 ~72.6
        7.65 116.70
        ~10.9 ~100.4
        ~22.5 ~71.7
        ~8.5 ~110.6
        ~12.7 ~94.6""",
    "table5": """
        0.042 0.550 0.032 0.197 0.750 0.263 0.306
        0.048 0.566 0.023 0.159 0.688 0.326 0.302
        0.043 0.598 0.025 0.215 0.700 0.306 0.315
        0.050 0.606 0.040 0.238 0.769 0.328 0.339
        0.075 0.641 0.028 0.163 0.750 0.333 0.332
        0.043 0.652 0.040 0.181 0.728 0.328 0.329""",
}


# --- the grids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_every_point_can_be_run_on_digits_and_at_full_size(name: str) -> None:
    grid = GRIDS[name]
    assert grid.full_size == FULL_SIZE.get(name, "llamagen-xxl-c2i")
    for recipe in (grid.recipe, grid.full_size):
        base = grids.under(grid, recipes.recipe(recipe))
        for point in grid.points:
            made = grids.settings(grid, base, point, seed=3)
            assert made.tune.seed == 3 and made.evaluate.seeds == [3]
            now, before = config.flat(made), config.flat(base)
            for field, value in point.changes.items():
                assert now[field] == (pytest.approx(before[field] * value) if isinstance(value, recipes.Times) else value), field
        if any(metric.startswith("guided/") for metric in grid.metrics):
            runs = [grids.settings(grid, base, point, 0) for point in grid.points]
            assert all(run.evaluate.guided > 1 for run in runs)


@pytest.mark.parametrize("name", GRIDS)
def test_the_numbers_beside_ours_are_the_papers(name: str) -> None:
    grid = GRIDS[name]
    if name not in PAPER:
        assert grid.source == grids.OURS and not any(point.paper for point in grid.points)
        return
    rows = [line.split() for line in PAPER[name].strip().splitlines()]
    for point, row in zip(grid.points, rows, strict=True):
        printed = {metric: word for metric, word in zip(grid.metrics, row, strict=True) if word != "-"}
        assert point.paper == {metric: float(word.strip("~")) for metric, word in printed.items()}, point.name
        assert point.about == any(word.startswith("~") for word in row), point.name


def test_objectives_go_with_the_released_configuration_and_with_captions() -> None:
    for recipe, left_out in (("llamagen-xxl-c2i-official", {"AR-GRPO"}), ("llamagen-xl-t2i", {"AR-GRPO", "CCA"}), ("digits", set())):
        grid = GRIDS["objectives"]
        run = {name for name, _ in grids.runs(grid, recipes.recipe(recipe), [0])}
        assert {point.name for point in grid.points} - run == left_out
    contrast = recipes.changed(recipes.recipe("digits-t2i"), {"tune.objective": "cca"})
    with pytest.raises(ValueError, match=r"tune.objective: tune.objective cca contrasts classes, and this model draws from captions"):
        Experiment("steps", contrast, [0])
    with pytest.raises(ValueError, match="no reward is called 'msee'; did you mean 'mse'"):
        Experiment("steps", recipes.changed(recipes.recipe("digits"), {"tune.rewards.msee": 1.0}), [0])
    mine = recipes.changed(recipes.recipe("llamagen-xl-c2i"), {"tune.classifier": "data/mine.safetensors"})
    assert ("AR-GRPO", 0) in grids.runs(GRIDS["table2-xl"], mine, [0])


@pytest.mark.parametrize(
    ("table", "recipe", "changes", "words"),
    [
        ("table3", "llamagen-xl-drawbench", {}, "evaluate.detector is empty, and this table shows GenEval"),
        ("table1", "janus-pro-1b", {"evaluate.text_metrics": []}, "evaluate.text_metrics has none of clipscore, hpsv2"),
    ],
)
def test_what_nobody_would_measure_is_refused(table: str, recipe: str, changes: dict[str, Any], words: str) -> None:
    base = recipes.changed(recipes.recipe(recipe), changes)
    with pytest.raises(ValueError, match=words):
        grids.runs(GRIDS[table], base, [0])


def test_names_are_unique_and_metrics_are_known() -> None:
    for grid in GRIDS.values():
        assert len({point.name for point in grid.points}) == len(grid.points)
        assert all(point.paper.keys() <= set(grid.metrics) for point in grid.points)


def test_a_recipe_that_says_so_itself_keeps_its_guidance() -> None:
    table2 = GRIDS["table2-xl"]
    assert grids.under(table2, recipes.recipe("digits")).evaluate.guided == 2.0
    assert grids.under(table2, recipes.recipe("llamagen-xxl-c2i")).evaluate.guided == 1.75


def test_a_table_that_shows_a_sweep_takes_one() -> None:
    base = recipes.changed(recipes.recipe("digits"), {"evaluate.temperatures": [0.8, 0.9], "evaluate.temperature": 0.7})
    grids.require_free(GRIDS["temperature"], ["evaluate.temperatures"])
    swept, plain = (grids.settings(GRIDS[name], base, Point("VA-pi"), 0).evaluate.temperatures for name in ("temperature", "table4"))
    assert (swept, plain) == ([0.8, 0.9], [0.7])


@pytest.mark.parametrize(("recipe", "row"), [("digits-t2i", "xi 0"), ("llamagen-xl-t2i", "xi 0.5")])
def test_va_pi_of_table_3_is_a_row_of_table_5(recipe: str, row: str) -> None:
    """With the paper's recipe the one that it is in the paper, on the embedded scenes another (docs/experiments.md)."""

    def settings(table: str, name: str) -> Config:
        (point,) = (point for point in GRIDS[table].points if point.name == name)
        return grids.settings(GRIDS[table], grids.under(GRIDS[table], recipes.recipe(recipe)), point, 0)

    assert settings("table3", "VA-pi") == settings("table5", row)
    assert GRIDS["table3"].points[-1].paper == next(point.paper for point in GRIDS["table5"].points if point.name == "xi 0.5")


def test_numbers_are_found_where_evaluate_writes_them() -> None:
    results = {
        "tuned": {"fid": 3.0, "precision": 0.5, "precision_adm": 0.6},
        "tuned_guided": {"fid": 2.0},
        "prompts": {"detectors": {"geneval": {"base": {"tasks": {"colors": {"score": 0.25}}}}}},
    }
    assert [experiment.number(results, "tuned", name) for name in ("fid", "guided/fid", "precision", "recall")] == [3.0, 2.0, 0.6, None]
    assert experiment.number(results, "base", "task/colors") == 0.25 and experiment.number(results, "base", "task/position") is None


# --- runs --------------------------------------------------------------------------------------

TINY = Grid(
    "Two points.",
    "a table",
    ("fid", "precision"),
    (
        Point("base", {}, {"fid": 2.0}, "base"),
        Point("elsewhere", {"tune.rewards.class": 1.0, "subset.classes": 11}, {"fid": 3.0}),  # no embedded classifier knows eleven
        Point("G 2", {"tune.group_size": 2}),
        Point("VA-pi", {}, {"fid": 1.0}, about=True),
    ),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write(tmp_path_factory.mktemp("world"))


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with tiny data and weights and a tiny grid, entered."""
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK", "DVC_ROOT", "DVC_EXP_NAME", "VAPI_STATE", "VAPI_DEBUG", track.GIVEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    Path("params.yaml").write_text(config.dump(world.settings(Config(), tune_steps=2, tune_checkpoint_every=1)))
    monkeypatch.setitem(GRIDS, "tiny", TINY)
    return tmp_path


class Here:
    """Runs commands in this process, and remembers which. ``instead`` may answer for one: its exit code."""

    def __init__(self, instead: Callable[[str, int], int | None] = lambda stage, count: None) -> None:
        self.stages: list[str] = []
        self.instead = instead

    def __call__(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        self.stages.append(words[0])
        if (code := self.instead(words[0], self.stages.count(words[0]))) is not None:
            return code
        with pytest.raises(SystemExit) as stop:
            cli.main(list(words))
        return int(stop.value.code or 0)


def tiny(*seeds: int) -> Experiment:
    return Experiment("tiny", config.load(), seeds or (0,))


def rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(Path("artifacts/experiments/tiny/results.json").read_text())["rows"]}


def test_points_share_stages_and_a_stopped_command_goes_on(project: Path) -> None:
    first = Here(lambda stage, count: os.EX_TEMPFAIL if (stage, count) == ("tune", 2) else None)
    with pytest.raises(SystemExit) as stop:
        tiny().run(first)
    assert stop.value.code == os.EX_TEMPFAIL
    assert first.stages == ["subset", "tokens", "tune", "evaluate", "tune"]
    assert {name: row["state"] for name, row in rows().items()} == {
        "base": "done", "elsewhere": "not run here", "G 2": "not finished", "VA-pi": "done",
    }  # fmt: skip

    second = Here()
    assert tiny(0, 1).run(second) == 0
    assert second.stages == ["tune", "evaluate", "tune", "evaluate", "tune", "evaluate"], "seed 0 goes on, seed 1 shares subset and tokens"
    third = Here()
    assert tiny(0, 1).run(third) == 0 and third.stages == []

    found = rows()
    for name, side in (("base", "base"), ("G 2", "tuned"), ("VA-pi", "tuned")):
        scores = [data.read_json(Path(run) / "metrics.json")[side] for run in found[name]["runs"]]
        fids = [one["fid"] for one in scores]
        ours = found[name]["ours"]["fid"]
        assert ours["values"] == fids and len(fids) == 2 and ours["mean"] == pytest.approx(sum(fids) / 2)
        assert ours["std"] == pytest.approx(abs(fids[0] - fids[1]) / 2**0.5)
    assert found["base"]["runs"] == found["VA-pi"]["runs"] != found["G 2"]["runs"]

    table = Path("artifacts/experiments/tiny/table.md").read_text().splitlines()
    assert table[4] == "|  | FID, paper | ours | precision, paper | ours |"
    assert table[6].startswith("| base | 2 | ") and " ± " in table[6]
    assert table[7] == "| elsewhere | 3 | not run here | - | not run here |"
    assert table[9].startswith("| VA-pi | ≈ 1 | ")
    long = pd.read_csv("artifacts/experiments/tiny/table.csv").set_index(["row", "metric"])
    assert long.loc[("G 2", "fid"), "ours"] == pytest.approx(found["G 2"]["ours"]["fid"]["mean"]) and len(long) == 8
    assert tiny(0, 1).plan().endswith("0 of 10 stages to run")
    assert "4 of 10 stages to run, about 1 minute if they take as long as those that are finished" in tiny(0, 2).plan()


@pytest.mark.parametrize("code", [cli.MISTAKE, 128 + signal.SIGKILL])
def test_a_point_that_fails_is_noted_and_the_others_go_on(project: Path, capsys: pytest.CaptureFixture[str], code: int) -> None:
    """By a mistake, or ended by the system, whose memory was short; nobody asked for a stop."""
    launch = Here(lambda stage, count: code if (stage, count) == ("tune", 2) else None)
    assert tiny().run(launch) == code
    assert launch.stages == ["subset", "tokens", "tune", "evaluate", "tune"], "what is failed is not evaluated"
    assert rows()["G 2"]["state"] == "failed" and rows()["VA-pi"]["state"] == "done"
    said = capsys.readouterr()
    assert f"G 2, seed 0: tune ended with code {code}" in said.err and "| G 2 (failed) | - | - | - | - |" in said.out
    assert tiny().run(again := Here()) == 0 and again.stages == ["tune", "evaluate"]


def test_other_settings_and_other_files_make_other_results(project: Path) -> None:
    before = [step.folder for step in tiny().queue.values()]
    assert [step.folder for step in tiny().queue.values()] == before
    base = config.load()
    other = Experiment("tiny", recipes.changed(base, {"evaluate.samples": 30}), [0])
    same = set(before) & set(other.queue)
    assert {folder.parent.name for folder in same} == {"subset", "tokens", "tune"}
    Path("data/models/reward.safetensors").write_bytes(Path("data/models/metric.safetensors").read_bytes())
    assert {folder.parent.name for folder in set(before) & set(tiny().queue)} == {"subset", "tokens"}


@pytest.mark.parametrize(("file", "kept"), [("package/tune.py", set()), ("data/models/reward.safetensors", {"subset", "tokens"})])
def test_source_and_files_that_change_meanwhile_stop_it(project: Path, monkeypatch: pytest.MonkeyPatch, file: str, kept: set[str]) -> None:
    """What is made of the new would lie under the name of the old."""
    data.code_version()  # remembered, of the true package
    (project / "package").mkdir()
    (project / "package/tune.py").write_text("steps = 1")
    monkeypatch.setattr(data, "_PACKAGE", project / "package")
    before = tiny()

    def edit(stage: str, count: int) -> None:
        if stage == "tokens":
            Path(file).write_bytes(Path("data/models/metric.safetensors").read_bytes())

    with pytest.raises(ValueError, match="has changed since this command began; what is finished is in .*, and the same command goes on"):
        before.run(launch := Here(edit))
    assert launch.stages == ["subset", "tokens"]
    again = tiny()
    assert {step.stage for step in again.queue.values() if step.made} == kept
    assert {folder.parent.name for folder in set(before.queue) & set(again.queue)} == kept


def test_what_a_result_is_not_named_after_decides_none(project: Path) -> None:
    ignored = {f"vapi.{name.removesuffix('.py')}" for name in experiment.DECIDE_NOTHING}
    assert ignored < MODULES.keys()
    for stage in {folder.parent.name for folder in tiny().queue}:
        assert reached(f"vapi.{stage}", without=set()) & ignored <= {"vapi.config", "vapi.run"}, (
            "the values of one are named, the other is a face"
        )


def test_rows_are_runs_nested_in_one_of_the_experiment(project: Path, mlflow_db: Path, sender_thread: None) -> None:
    Path("mlflow.db").write_bytes(mlflow_db.read_bytes())
    Path("params.yaml").write_text(config.dump(recipes.changed(config.load(), {"track.uri": ""})))
    experiment_of = tiny()
    stages_off = Here()

    def launch(words: Sequence[str], environment: Mapping[str, str]) -> int:
        return stages_off([*words, "--track.uri", "off"], environment)

    for _ in range(2):  # the same rows go into the same runs
        assert experiment_of.run(launch) == 0
    client = track.connect(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("vapi").experiment_id])
    (parent,) = (run for run in runs if run.data.tags["stage"] == "experiment")
    assert parent.info.run_name.startswith("tiny ") and parent.data.params["tune.group_size"] == "4" and not parent.data.metrics
    points = {run.info.run_name.rpartition(" ")[0]: run for run in runs if run is not parent}
    assert points.keys() == {"base", "G 2", "VA-pi"} and len(runs) == 4
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in points.values())
    found = rows()
    for name, size in (("G 2", "2"), ("VA-pi", "4")):
        own = {"tune.group_size": size, "tune.rewards.class": "0.0", "subset.classes": "10", "side": "tuned", "seeds": "0"}
        assert points[name].data.params == own
        assert points[name].data.metrics["fid"] == found[name]["ours"]["fid"]["mean"]
        assert points[name].info.status == "FINISHED"
    assert points["VA-pi"].data.metrics["paper/fid"] == 1.0 and "paper/fid" not in points["G 2"].data.metrics


def test_every_metric_of_a_table_of_digits_is_in_what_evaluate_writes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(Those of tables of scenes: test_t2i.py.)"""
    tables = [grid for grid in GRIDS.values() if grid.recipe == "digits"]
    metrics = tuple(dict.fromkeys(metric for grid in tables for metric in grid.metrics))
    points = (Point("base", side="base"), Point("VA-pi"))
    monkeypatch.setitem(GRIDS, "all", Grid("All metrics.", "every table", metrics, points))
    made = Experiment("all", recipes.changed(config.load(), {"evaluate.guided": 1.75}), [0])
    assert made.run(Here()) == 0
    for row in made.table.rows():
        assert row["ours"].keys() == set(metrics), row["name"]


# --- mistakes and stops ------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["experiment", *words])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["tabel4"], "no experiment is called 'tabel4'; did you mean 'table4'?"),
        (["tiny", "--seeds", "0,0"], "a seed counts once"),
        (["tiny", "--seeds", "none"], "--seeds is 'none'; it must be an int"),
        (["tiny", "--tune.seed", "3"], "--tune.seed is what --seeds decides"),
        (["tiny", "--tune.group_size", "3"], "--tune.group_size is what this experiment varies"),
        (["table4", "--tune.rewards", "{mse: 1}"], "--tune.rewards is what this experiment varies"),
        (["tiny", "--evaluate.temperatures", "0.8", "0.9"], "--evaluate.temperatures is swept where a table shows what comes of it"),
        (["table2", "--evaluate.guidances", "[1, 2]"], "(temperature does); say --evaluate.guidance or nothing"),
        (["tiny", "--tune.lrr", "3"], "did you mean '--tune.lr'?"),
        (["tiny", "table4"], "takes one name"),
        (["tiny", "--recipe", "digits", "--params", "params.yaml"], "not both"),
        (["tiny", "--recipe", "digit"], "did you mean 'digits'?"),
        (["tiny", "--params", "params.yaml", "--model.generator", "data/models/gone.safetensors"], "base: model.generator: data/models"),
        (["tiny", "--params", "params.yaml", "--evaluate.reference", "gone.parquet"], "base: evaluate.reference: gone.parquet is not in"),
        (["tiny", "--params", "params.yaml", "--evaluate.reference", "data/models/metric.safetensors"], "base: evaluate.reference: "),
        (["tiny", "--params", "params.yaml", "--evaluate.validation", "params.yaml"], "base: evaluate.validation: "),
        (["tiny", "--params", "params.yaml", "--evaluate.dinov2", "data"], "base: evaluate.dinov2: evaluate.dinov2 is data; give a folder"),
        (["tiny", "--params", "params.yaml", "--subset.source", "gone"], "base: subset.source: gone is not in"),
        (["tiny", "--params", "params.yaml", "--evaluate.extractor", "inception"], "inception"),
        (["tiny", "--params", "params.yaml", "--tune.perceptual", "vgg"], "vgg16"),
        (["tiny", "--params", "params.yaml", "--tune.policy_weight", "0", "--tune.prior_weight", "0"], "nothing to optimise"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_before_anything_is_run(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], answer: str
) -> None:
    launch = Here()
    monkeypatch.setattr(experiment, "here", launch)
    code, _, err = call(capsys, *words)
    assert code == cli.MISTAKE and answer in err, err
    assert launch.stages == [] and not Path("artifacts/experiments/tiny").exists()


@pytest.mark.parametrize("network", ["vgg", "data/models/reward.safetensors"])
def test_a_network_that_nothing_reads_need_not_be_here(project: Path, network: str) -> None:
    """LPIPS is read where the reward names it, also by the prior alone, which follows it on held-out images."""
    Path("data/models/reward.safetensors").unlink()  # and of the published ones torch's cache has none
    named = recipes.changed(config.load(), {"tune.perceptual": network})
    for without in ({"mse": 1.0}, {"mse": 1.0, "lpips": 0.0}):
        assert Experiment("tiny", recipes.changed(named, {"tune.rewards": without}), [0]).points
    for settings in (named, recipes.changed(named, {"tune.policy_weight": 0.0})):
        with pytest.raises(ValueError, match="is not here|needs .*vgg16-397923af.pth"):
            inputs.looks(settings)["tune.perceptual", network]()


def test_the_list_names_every_grid_and_its_rows(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys)
    assert code == 0 and all(f"\n  {name} " in out and grid.doc in out for name, grid in GRIDS.items())
    assert out.partition("  tiny ")[2].count("Models to tune per seed: 2 (digits).") == 1
    code, out, _ = call(capsys, "tiny", "--params", "params.yaml", "--list")
    assert code == 0 and "G 2        not finished; tune.group_size 2" in out and "6 of 6 stages to run" in out


def test_a_command_runs_in_a_process_of_its_own() -> None:
    assert experiment.here(["recipe", "digits"], {}) == 0
    assert experiment.here(["recipe", "digitz"], {}) == cli.MISTAKE


@pytest.mark.parametrize("code", [os.EX_TEMPFAIL, 128 + signal.SIGINT, 128 + signal.SIGTERM])
def test_after_a_stop_nothing_begins(project: Path, code: int) -> None:
    launch = Here(lambda stage, count: code)
    with pytest.raises(SystemExit) as stop:
        tiny().run(launch)
    assert stop.value.code == code and launch.stages == ["subset"]


@pytest.mark.parametrize("how", ["exit 0", "exit 1", "kill -9 $$"])
def test_a_stop_reaches_the_command_and_no_other_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """However the command ends on it."""
    program, begun = tmp_path / "program", tmp_path / "begun"
    program.write_text(f"#!/bin/sh\ntrap '{how}' TERM\ntouch {begun}\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def stop() -> None:
        while not begun.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert experiment.here(["tune"], {}) == os.EX_TEMPFAIL
