"""docs/results.md shows what was measured, and says what was not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vapi.grids import GRIDS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import experiments  # noqa: E402

TEXT = experiments.PAGE.read_text()
KEPT = json.loads(experiments.KEPT.read_text())


def test_tables_are_those_that_were_collected() -> None:
    assert experiments.page(TEXT, KEPT) == TEXT, "run: python benchmarks/experiments.py write"


@pytest.mark.parametrize("name", GRIDS)
def test_every_experiment_is_there_or_said_to_be_missing(name: str) -> None:
    shown = f"<!-- {name} -->" in TEXT
    assert shown == (name in KEPT) and (shown or f"`{name}`" in TEXT.partition("## Not run")[2])


@pytest.mark.parametrize("name", KEPT)
def test_what_was_measured_is_a_row_of_today(name: str) -> None:
    """A row that was renamed or dropped would stand in the page for good."""
    assert [row["name"] for row in KEPT[name]["rows"]] == [point.name for point in GRIDS[name].points]
    for row in KEPT[name]["rows"]:
        assert row["state"] == "not run here" or all(len(ours["values"]) == len(KEPT[name]["seeds"]) for ours in row["ours"].values())


def test_differences_are_to_the_base_of_the_same_seed() -> None:
    base = {"ours": {"fid": {"values": [1.0, 2.0, 3.0]}}}
    row = {"ours": {"fid": {"values": [0.5, 1.5, 2.5]}}}
    assert experiments.difference(row, base, "fid") == (-0.5, 0.0)
