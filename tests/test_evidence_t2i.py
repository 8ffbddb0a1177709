"""The evidence script of text to image, whole, on a tiny plan; and again, with nothing left to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from imports import ROOT
from test_t2i import settings

from vapi.digits import build_scenes


@pytest.mark.slow
def test_the_whole_grid_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import evidence_t2i

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    build_scenes.build(Path("data"), build_scenes.TINY)
    made = settings()
    made = replace(made, tune=replace(made.tune, steps=1), evaluate=replace(made.evaluate, sheet_images=4))
    monkeypatch.setattr(evidence_t2i.Evidence, "searched", ("va-pi",))
    plan = evidence_t2i.Plan(rates=(1e-3, 1e-2), tuning_seeds=(0, 1), samples=20, images_per_prompt=1)
    grid = evidence_t2i.Evidence(Path("out"), made, plan, {"va-pi": {}, "va-pi, noise 0": {"context_noise": 0.0}})
    result = evidence_t2i.run(grid)
    written = json.loads(Path("out/evidence.json").read_text())
    assert set(written["runs"]) == set(grid.arms) and all(len(runs) == 2 for runs in written["runs"].values())
    assert len({run["weights"]["base"] for run in written["runs"]["va-pi"]}) == 1
    assert set(result["chosen"].values()) == {max(plan.rates, key=lambda rate: written["searched"]["va-pi"][f"{rate:g}"]["geneval"])}
    for judge in evidence_t2i.JUDGES:
        rows = result["tables"]["va-pi"][judge]
        gains = result["differences_by_seed"]["va-pi"][judge]
        assert rows["overall"]["difference"] == pytest.approx(sum(gains) / 2, abs=2e-6)
    held = [run["holdout"]["last"]["holdout/ce"] for run in written["runs"]["va-pi"]]
    assert result["held_out"]["va-pi"]["ce"]["after"] == pytest.approx(sum(held) / 2) != result["held_out"]["va-pi"]["ce"]["before"]
    assert "By the learned judge:" in Path("out/evidence.md").read_text()
    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("model.safetensors")}
    assert evidence_t2i.run(grid) == result
    assert times == {path: path.stat().st_mtime_ns for path in Path("out").rglob("model.safetensors")}
