"""The evidence script, whole, on a tiny plan: search, pretraining, arms, tables; and again, with nothing left to do."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from benchmarks import evidence
from vapi import data
from vapi.config import Config
from vapi.digits import build


def tiny(data: Path) -> Config:
    config, models = Config(), data / "models"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, generator=str(models / "generator.safetensors"), tokenizer=str(models / "tokenizer.safetensors"), device="cpu"
        ),
        subset=dataclasses.replace(config.subset, source=str(data / "digits/train.parquet"), images=40),
        tune=dataclasses.replace(
            config.tune, steps=2, images_per_step=4, group_size=2, holdout_images=8, perceptual=str(models / "reward.safetensors")
        ),
        evaluate=dataclasses.replace(
            config.evaluate,
            temperatures=[0.9, 1.0],
            sweep_samples=20,
            reference=str(data / "digits/reference.parquet"),
            validation=str(data / "digits/validation.parquet"),
            extractor=str(models / "metric.safetensors"),
            images_per_batch=10,
            sheet_images=10,
        ),
    )


@pytest.mark.slow
def test_the_whole_grid_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build.build(Path("data"), build.TINY)
    plan = evidence.Plan(rates=(1e-3, 1e-2), tuning_seeds=(0,), search_samples=20, samples=20)
    grid = evidence.Evidence(Path("out"), tiny(tmp_path / "data"), plan, build.TINY)
    result = evidence.run(grid, workers=2)
    written = json.loads(Path("out/evidence.json").read_text())
    assert set(written["runs"]) == set(evidence.ARMS) and all(len(runs) == 2 for runs in written["runs"].values())
    bases = {run["weights"]["base"] for run in written["runs"]["va-pi"]}
    assert len(bases) == 2, "two pretraining seeds are two generators"
    assert {run["weights"]["base"] for run in written["runs"]["reward alone"]} == bases
    for arm, rate in result["chosen"].items():
        assert rate in plan.rates
        assert min(written["searched"][arm].values(), key=lambda scores: scores["fid"]) == written["searched"][arm][f"{rate:g}"]
    assert "2 pretraining x 1 tuning seeds" in Path("out/evidence.md").read_text()
    made = {path: path.stat().st_mtime_ns for path in Path("out").rglob("model.safetensors")}
    assert evidence.run(grid) == result
    assert made == {path: path.stat().st_mtime_ns for path in Path("out").rglob("model.safetensors")}
    other = evidence.Evidence(
        Path("out"), dataclasses.replace(grid.params, tune=dataclasses.replace(grid.params.tune, steps=3)), plan, build.TINY
    )
    with pytest.raises(ValueError, match="made with other settings"):
        evidence.run(other)


def test_results_of_another_plan_or_world_are_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder left by a run with fewer samples, or on other pictures, is refused by name."""
    monkeypatch.chdir(tmp_path)
    params = tiny(tmp_path / "data")
    made = evidence.Evidence(Path("out"), params, evidence.Plan(), build.TINY)
    how = dataclasses.replace(params.evaluate, samples=20)
    reference, folder = tmp_path / "data/digits/reference.parquet", Path("out/report/va-pi-x")
    reference.parent.mkdir(parents=True)
    reference.write_bytes(b"once")
    folder.mkdir(parents=True)
    data.describe(folder, "evaluate", {"evaluate": how}, {"reference": data.file_digest(reference)}, 1.0)
    evidence._require_same(folder, evaluate=how)
    evidence._require_inputs(folder, reference=reference)
    with pytest.raises(ValueError, match="made with other settings"):
        made.scores(Path("out/tune/va-pi-x"), 0, dataclasses.replace(how, samples=5000), "report")
    reference.write_bytes(b"repainted")
    with pytest.raises(ValueError, match="made with another reference"):
        evidence._require_inputs(folder, reference=reference)


def test_interval_by_hand() -> None:
    found = evidence.interval([-1.0, -2.0, -3.0])
    half = 4.302652729696142 / math.sqrt(3)
    assert found["mean"] == -2.0 and math.isclose(found["high"] - found["mean"], half) and math.isclose(found["mean"] - found["low"], half)


def test_a_base_shared_by_several_runs_counts_once() -> None:
    runs = [
        {"weights": {"base": name, "tuned": str(i)}, "base": {"fid": fid}, "tuned": {"fid": fid}}
        for i, (name, fid) in enumerate((("a", 1.0), ("a", 1.0), ("b", 4.0)))
    ]
    assert evidence.spread(runs, "base", "fid")["mean"] == 2.5
    assert evidence.spread(runs, "tuned", "fid")["mean"] == 2.0
