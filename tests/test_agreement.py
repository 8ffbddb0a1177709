"""Three descriptions of the pipeline count as one: the stage functions, config.STAGES and dvc.yaml."""

from __future__ import annotations

import importlib
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
from imports import MODULES, ROOT, reached

from vapi import config
from vapi.config import ARTIFACTS, STAGES, Config

NO_RESULT = {"vapi", "vapi.config", "vapi.run"}
"""Modules that a stage imports and that decide nothing of what it makes; params.yaml carries the values."""


def block(stage: str) -> dict[str, Any]:
    return config.read_yaml((ROOT / "dvc.yaml").read_text())["stages"][stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_function_of_its_sections_and_folders(stage: str) -> None:
    function = getattr(importlib.import_module(f"vapi.{stage}"), stage)
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    spec = STAGES[stage]
    assert list(parameters) == [*spec.sections, *spec.inputs, "out", "run"]
    assert all(hints[section] is typing.get_type_hints(Config)[section] for section in spec.sections)
    assert all(hints[folder] is Path for folder in (*spec.inputs, "out"))
    assert [name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty] == ["run"]


def test_dvc_has_the_same_stages_in_the_same_order() -> None:
    assert list(config.read_yaml((ROOT / "dvc.yaml").read_text())["stages"]) == ["listing", "weights", *STAGES]


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_reads_the_same_sections_and_folders(stage: str) -> None:
    ours, spec = block(stage), STAGES[stage]
    assert ours["cmd"] == f"python -m vapi {stage}"
    assert ours["params"] == list(spec.sections)
    assert ours["outs"] == [f"{ARTIFACTS}/{stage}"]
    folders = [dep for dep in ours["deps"] if dep.startswith(f"{ARTIFACTS}/") and not dep.endswith(".json")]
    assert folders == [f"{ARTIFACTS}/{name}" for name in spec.inputs]


WHEN_ASKED = {"tune": {f"vapi/metrics/{name}.py" for name in ("clip", "pretrained", "text")}}
"""What a stage imports for some configurations alone: the reward ``clip``."""


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_runs_a_stage_again_when_its_code_changes(stage: str) -> None:
    code = [dep for dep in block(stage)["deps"] if dep.startswith("vapi/")]
    needed = {str(MODULES[module].relative_to(ROOT)) for module in reached(f"vapi.{stage}", without=NO_RESULT)}
    covered = {path: [dep for dep in code if path == dep or path.startswith(f"{dep}/")] for path in needed}
    assert not [path for path, deps in covered.items() if not deps], "modules that the stage reaches and dvc.yaml does not name"
    when_asked = WHEN_ASKED.get(stage, set())
    assert not set(code) - when_asked - {dep for deps in covered.values() for dep in deps}, (
        "modules that dvc.yaml names and the stage does not reach"
    )
    assert code == sorted(code)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_names_data_only_where_the_configuration_does(stage: str) -> None:
    """Templates name fields that exist; a literal path below data/ holds the default of a field that may also hold a word."""
    values = config.flat(Config())
    for dep in block(stage)["deps"]:
        if dep.startswith("${"):
            assert dep[2:-1] in values
        elif dep.startswith("data/"):
            assert any(str(value) == dep or str(value).startswith(f"{dep}/") for value in values.values())
