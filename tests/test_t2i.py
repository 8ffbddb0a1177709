"""Text to image from end to end, on a tiny world of scenes whose networks have hardly learned anything."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import test_clip
import torch
from conftest import CAPTIONS
from imports import ROOT
from PIL import Image

from vapi import compare, compare_page, data, inputs, models, prompted, recipes, references, report, report_prompts
from vapi.config import Config, EvaluateConfig, ModelConfig, RegisterConfig, TuneConfig, plain
from vapi.digits import build_janus, build_scenes
from vapi.evaluate import evaluate
from vapi.experiment import Experiment
from vapi.metrics import geneval
from vapi.models import text, weights
from vapi.objective import Batch, Objective, optimizer_of, update
from vapi.recipes import recipe
from vapi.register import register
from vapi.rewards import Reward
from vapi.run import Run
from vapi.subset import subset
from vapi.tokens import require_captions, tokens
from vapi.tune import tune


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder data/ of a world that took seconds to make."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    build_scenes.build(folder, build_scenes.TINY)
    return folder


def settings(name: str = "digits-t2i") -> Config:
    """A recipe, with small numbers."""
    made = recipe(name)
    return replace(
        made,
        model=replace(made.model, device="cpu"),
        subset=replace(made.subset, images=40),
        tokens=replace(made.tokens, images_per_batch=20),
        tune=replace(
            made.tune, steps=2, images_per_step=8, images_per_forward=4, group_size=2, holdout_images=8, holdout_every=1, checkpoint_every=1
        ),
        evaluate=replace(
            made.evaluate, samples=24, sweep_samples=24, temperatures=[1.0, 0.9], images_per_batch=10, sheet_images=10, images_per_prompt=2
        ),
    )


@pytest.fixture(scope="module")
def tuned(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which everything up to evaluate has run."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(scenes, folder / "data")
    made = settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        subset(made.subset, Path("artifacts/subset"))
        tokens(made.model, made.tokens, Path("artifacts/subset"), Path("artifacts/tokens"))
        tune(made.model, made.tune, Path("artifacts/subset"), Path("artifacts/tokens"), Path("artifacts/tune"))
        evaluate(made.model, made.evaluate, Path("artifacts/tune"), Path("artifacts/evaluate"))
    return folder


@pytest.fixture
def project(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the working directory."""
    shutil.copytree(tuned, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    return tmp_path / "project"


def results(folder: str = "artifacts/evaluate") -> dict:
    return json.loads((Path(folder) / "metrics.json").read_text())


def evaluated(out: str, **changes: object) -> dict:
    made = settings()
    evaluate(made.model, replace(made.evaluate, **changes), Path("artifacts/tune"), Path(out), Run())
    return results(out)


def test_before_and_after_by_task_with_anchors_and_pictures(project: Path) -> None:
    found = results()
    prompts = found["prompts"]
    assert prompts["prompts"] == 18 and prompts["images_per_prompt"] == 2
    for name in ("geneval", "geneval_second"):
        judged = prompts["detectors"][name]
        assert set(judged["difference"]["tuned"]) == {*geneval.TASKS, "overall"}
        assert list(judged["anchors"]) == ["real", "reconstruction", "shuffled"]
        for side in ("base", "tuned", "base_best", "tuned_best"):
            assert found[side][name] == pytest.approx(judged[side]["overall"], rel=1e-5)
            assert not judged[side]["partial"] and judged[side]["images"] == 36
        assert judged["difference"]["tuned"]["overall"]["a"] == pytest.approx(judged["base"]["overall"])
    anchors = prompts["detectors"]["geneval"]["anchors"]
    assert anchors["real"]["overall"] > 0.9 > anchors["reconstruction"]["overall"]  # that tokenizer has learned nothing
    verdict = report.verdict(found)
    assert "GenEval (scenes, classical judge)" in verdict.partition(":")[0] and " on 18 prompts: from " in verdict
    assert found["protocol"]["prompts"]["images_per_prompt"] == 2

    page = (project / "artifacts/evaluate/report.html").read_text()
    shown = [json.loads(line)["prompt"] for line in (project / "data/scenes/test.jsonl").read_text().splitlines()]
    assert all(text in page for text in shown) and "second judge" not in page  # each bears the name that its detector gives it
    with Image.open(project / "artifacts/evaluate/sheet-prompts.png") as sheet:
        assert sheet.width >= 4 * 80 and sheet.height > 18 * 80
    table = report_prompts.grid(prompts)
    assert table.count("overall") == 2 and "other prompts" in table and "tuned at its best" in table
    assert "single_object" not in table and "one object" in report.table(project / "artifacts")


def test_runs_beside_each_other_by_task_and_prompt(project: Path) -> None:
    first, again = compare.read_all({"artifacts": Path("artifacts"), "again": project / "artifacts"})
    asked = [json.loads(line)["prompt"] for line in (project / "data/scenes/test.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in first.prompts] == asked
    assert first.answers["base"].shape == first.answers["tuned"].shape == (18, 2, 40, 40, 3)
    page = compare_page.page([first, again])
    assert page.count("by task</h3>") == 2 and page.count('class="card"') == 2 * 10 + 8 + 18
    judged = first.results["prompts"]["detectors"]["geneval"]
    assert f"<span>{judged['tuned']['tasks']['counting']['score']:.3f}</span>" in page
    assert "Pictures on which both judges say the same" in page and len(page) < 3_000_000


def test_a_task_with_one_prompt_has_no_spread_and_equal_prompts_have_pictures_of_their_own(project: Path) -> None:
    lines = (project / "data/scenes/test.jsonl").read_text().splitlines()
    one, alone = lines[0], next(line for line in lines if '"counting"' in line)
    Path("few.jsonl").write_text("\n".join([one, one, alone]))
    found = evaluated("few/evaluate", prompts="few.jsonl")
    judged = found["prompts"]["detectors"]["geneval"]["tuned"]
    assert judged["standard_error"] is None and judged["tasks"]["counting"]["standard_error"] is None
    run = compare.of(Path("few/evaluate"), Path("artifacts/tune"))
    assert [row["prompt"] for row in run.prompts].count(json.loads(one)["prompt"]) == 2 and run.answers["base"].shape[0] == 3
    page = compare_page.page([run])
    assert "one object</th>" in page and f"<span>{judged['overall']:.3f}</span></td>" in page, "no spread, and none is shown"
    assert page.count('aria-describedby="prompt-A-') == 3
    within = 2 * 3 * (run.answers["base"].shape[1] - 1)  # a strip holds all pictures of a prompt
    assert len(list(compare_page._pictures([run]))) == page.count("<img ") + within


def test_an_evaluation_again_draws_nothing_and_says_the_same(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object, **how: object) -> None:
        raise AssertionError("a picture was judged again")

    monkeypatch.setattr(prompted.Panel, "judge", never)
    assert evaluated("artifacts/again") == results()


def test_a_text_metric_of_ones_own_stands_beside_one_detector(project: Path) -> None:
    Path("redness.py").write_text(
        "def redness(config):\n    return lambda images, prompts, metadata: images[..., 0].mean(axis=(1, 2)) - len(prompts[0]) * 0\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(".")
        found = evaluated("artifacts/other", text_metrics=["redness:redness"], second_detector="", images_per_prompt=1)
    assert 0 < found["base"]["redness:redness"] < 255 and "geneval_second" not in found["base"]
    assert found["prompts"]["metrics"]["redness:redness"]["base"]["standard_error"] > 0 and found["prompts"]["agreement"] == {}
    assert "redness:redness" in (project / "artifacts/other/report.html").read_text()


def test_prompts_without_a_detector_are_scored_by_text_metrics_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DrawBench's, whose prompts ask for what no detector knows."""
    monkeypatch.syspath_prepend(".")
    Path("blueness.py").write_text("def blueness(config):\n    return lambda images, *asked: images[..., 2].mean(axis=(1, 2)) / 255\n")
    Path("bench.csv").write_text('Prompts,Category\n"a red seven, and a blue one",Colors\na two above a three,Positional\na one,Colors\n')
    how = {"detector": "", "second_detector": "", "text_metrics": ["blueness:blueness"], "prompts": "bench.csv"}
    found = evaluated("bench/evaluate", **how)
    asked = found["prompts"]
    assert (asked["prompts"], asked["detectors"], asked["agreement"]) == (3, {}, {}) and "geneval" not in found["base"]
    rows = pd.read_csv("bench/evaluate/prompts.csv")
    assert rows.task.tolist() == ["Colors", "Positional", "Colors"] and rows.prompt[0] == "a red seven, and a blue one"
    assert rows["tuned/blueness:blueness"].mean() == pytest.approx(asked["metrics"]["blueness:blueness"]["tuned"]["mean"], rel=1e-5)
    assert found["tuned"]["blueness:blueness"] == pytest.approx(asked["metrics"]["blueness:blueness"]["tuned"]["mean"], rel=1e-5)
    page = Path("bench/evaluate/report.html").read_text()
    assert "3 prompts, 2 pictures of each and seed, scored by blueness:blueness." in page and "a two above a three" in page
    run = compare.of(Path("bench/evaluate"), Path("artifacts/tune"))
    assert f"blueness:blueness {rows['base/blueness:blueness'][1]:.3f}" in compare_page.page([run])
    shutil.copytree("artifacts/tune", "bench/tune")
    said = asked["metrics"]["blueness:blueness"]["difference"]["tuned"]
    assert said["b"] - said["a"] == pytest.approx(said["difference"]) and said["low"] <= said["difference"] <= said["high"]
    assert "blueness:blueness" in report.table(Path("bench")).partition(" on 3 prompts: from ")[0]


SCORED = {"evaluate.detector": "", "evaluate.second_detector": "", "evaluate.text_metrics": ["json:dumps"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate.detector": ""}, "evaluate.second_detector is .* and evaluate.detector is empty"),
        ({"evaluate.prompts": "data/scenes/validation.parquet"}, "is no text in UTF-8"),
        ({"evaluate.text_metrics": ["clipscore"]}, "set evaluate.clip"),
        (SCORED, "register.min_geneval_gain is 0.02, and evaluate.detector is empty, so that nobody measures GenEval"),
        (
            SCORED | {"register.min_geneval_gain": 0.0, "register.min_fid_drop": 0.1},
            "register.allowances names geneval_second, and evaluate.second_detector is empty",
        ),
    ],
)
def test_who_judges_is_seen_before_anything_is_tuned(project: Path, changes: dict[str, Any], words: str) -> None:
    found = inputs.looks(recipes.changed(settings(), changes))
    with pytest.raises(ValueError, match=words):
        for (field, _), look in found.items():
            if field == "evaluate.prompts":
                look()


def test_another_text_encoder_or_text_of_a_metric_is_another_evaluation(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept of the one is not the other's, and a model tuned with one is not evaluated with the other."""
    made = settings()
    device = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(".")
        Path("rank.py").write_text("def rank(config):\n    return lambda images, prompts, metadata: [1.0] * len(images)\n")
        config = replace(made.evaluate, text_metrics=["rank:rank"])
        before = prompted.Panel.of(config, device)
        Path("rank.py").write_text("def rank(config):\n    return lambda images, prompts, metadata: [2.0] * len(images)\n")
        after = prompted.Panel.of(config, device)
    assert before.digest != after.digest and before.protocol() != after.protocol()
    monkeypatch.setattr(text.Words, "digest", "f" * 64)
    with pytest.raises(ValueError, match="tuned with another text encoder than words"):
        evaluated("artifacts/other")


@pytest.mark.parametrize("name", ["table3", "table5", "table3-janus"])
def test_a_table_finds_every_number_and_names_the_judge(project: Path, name: str) -> None:
    test_clip.write(Path("data/models/scenes-clip"))  # of AR-GRPO's reward
    made = Experiment(name, settings(), [0]).table
    for end in set(made.ends.values()):
        shutil.copytree("artifacts/evaluate", end)
    rows = made.write()
    assert all(row["ours"].keys() == set(made.grid.metrics) for row in rows if row["state"] != "not run here")
    head = made.markdown(rows).splitlines()[4]
    assert head.endswith("| two object, paper | ours | GenEval, paper | ours: GenEval (scenes, classical judge) |")


def test_no_reference_of_moments_alone_for_captions(project: Path) -> None:
    np.savez("data/scenes/moments.npz", arr_0=np.zeros((10, 40, 40, 3), np.uint8), mu=np.zeros(2048), sigma=np.eye(2048))
    config = replace(settings().evaluate, reference="data/scenes/moments.npz", extractor="inception")
    with pytest.raises(ValueError, match="holds no captions to draw from"):
        references.reference(config, 40, 0)


def test_prompts_that_are_longer_than_the_generator_reads_are_counted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = models.load(settings().model)
    assert policy.cut(["a photo of a seven", "one " * 13, "two " * 12]) == 1
    with pytest.raises(ValueError, match="has no word"):
        policy.cut(["a seven", "..."])


def test_the_gates_of_a_generator_of_captions(project: Path) -> None:
    made = settings()
    found = results()
    digest = data.file_digest(Path("artifacts/tune/model.safetensors"))
    assert found["weights"]["tuned"] == digest
    asked = RegisterConfig(model_name="t2i", min_fid_drop=0.0, min_geneval_gain=0.5, allowances={"geneval_second": 0.0})
    found["tuned"]["geneval"] = found["base"]["geneval"] = 0.2
    (project / "artifacts/evaluate/metrics.json").write_text(json.dumps(found))
    assert register(made.model, asked, Path("artifacts/tune"), Path("artifacts/evaluate"), Path("artifacts/register")) is False
    told = json.loads((project / "artifacts/register/registration.json").read_text())
    gates = {gate["metric"]: gate for gate in told["against"]["challenger"]["gates"]}
    assert set(gates) == {"geneval", "geneval_second"} and not gates["geneval"]["passed"]
    assert gates["geneval"]["limit"] == pytest.approx(0.3)
    card = (project / "artifacts/register/MODEL_CARD.md").read_text()
    for words in (
        "| detector | measured it | digits | Apache-2.0 (this project) | its name |",
        "| text_encoder | part of it | words | Apache-2.0 (this project) | its name |",
        "| data | data/scenes/train.parquet, 40 images, `",
        "40 x 40 pixels from captions",
        "GenEval (scenes, classical judge) ↑",
    ):
        assert words in card, words
    assert "<h2>Gates</h2>" in (project / "artifacts/register/report.html").read_text()


def test_janus_goes_through_the_same_stages(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions reach it in words: nothing is kept of them but the subset."""
    shutil.copytree(scenes, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    made = settings("digits-janus")
    build_janus.build(tmp_path / "data", build_janus.TINY)
    model = made.model
    few = replace(made.evaluate, temperatures=[1.0], images_per_prompt=1)
    subset(made.subset, Path("artifacts/subset"))
    tokens(model, made.tokens, Path("artifacts/subset"), Path("artifacts/tokens"))
    assert data.read_tokens(Path("artifacts/tokens")).captions is None
    tune(model, made.tune, Path("artifacts/subset"), Path("artifacts/tokens"), Path("artifacts/tune"))
    evaluate(model, few, Path("artifacts/tune"), Path("artifacts/evaluate"))
    found = results()
    assert found["prompts"]["prompts"] == 18 and 0 <= found["tuned"]["geneval"] <= 1
    tuned_weights = weights.read("artifacts/tune/model.safetensors")[0]
    assert tuned_weights.keys() == models.load(model).generator.state_dict().keys()
    bare = data.read_subset(Path("artifacts/subset"))
    bare.captions[3] = "  "
    with pytest.raises(ValueError, match="model.policy janus reads captions, and 1 of 40 images .* have no caption"):
        require_captions(model, bare, Path("artifacts/subset"))


# --- what is refused ---------------------------------------------------------------------------


def rewritten(path: Path, **columns: object) -> str:
    """A Parquet file with other columns, or without them (None)."""
    frame = pq.read_table(path).to_pandas()
    for name, values in columns.items():
        frame = frame.drop(columns=name) if values is None else frame.assign(**{name: values})
    frame.to_parquet(path.with_name("other.parquet"))
    return str(path.with_name("other.parquet"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"detector": ""}, "evaluate.second_detector is .*scenes-judge.safetensors and evaluate.detector is empty"),
        ({"detector": "", "second_detector": ""}, "evaluate.detector and evaluate.text_metrics are empty"),
        ({"resize": 32}, "evaluate.resize is 32, and pictures of prompts are judged as they are drawn"),
        ({"detector": "digit"}, "did you mean 'digits'"),
        ({"prompts": "data/geneval/prompts.jsonl"}, "data/geneval/prompts.jsonl is not here"),
        ({"text_metrics": ["clipscore"]}, "set evaluate.clip"),
        ({"text_metrics": ["clipscores"]}, "did you mean 'clipscore'"),
    ],
)
def test_what_will_be_missing_is_said_before_anything_is_drawn(project: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluated("artifacts/other", **changes)
    assert not Path("artifacts/other").exists()


def test_prompts_for_other_detectors_are_refused(project: Path) -> None:
    line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    Path("data/scenes/benches.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="bench"):
        evaluated("artifacts/other", prompts="data/scenes/benches.jsonl")


def test_references_without_captions_are_refused(project: Path) -> None:
    with pytest.raises(ValueError, match="evaluate.reference .*24 of 24 images have no caption"):
        references.real_images(rewritten(Path("data/scenes/reference.parquet"), caption=None), "reference", 40, 0)
    captions = ["a seven"] * 23 + [None]
    with pytest.raises(ValueError, match="1 of 24 images have no caption"):
        references.real_images(rewritten(Path("data/scenes/reference.parquet"), caption=captions), "reference", 40, 0)


# --- the panel ---------------------------------------------------------------------------------


def test_partners_ask_for_something_else_of_the_same_task(scenes: Path) -> None:
    asked = geneval.read_prompts(scenes / "scenes/test.jsonl", None, None)
    for n, other in enumerate(prompted.partners(asked)):
        assert asked[other].tag == asked[n].tag and asked[other].include != asked[n].include
    assert prompted.partners(asked[:1]) == [0]


def test_real_pictures_are_found_by_their_captions(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scenes.parent)
    panel = prompted.Panel.of(replace(settings().evaluate, second_detector=""), torch.device("cpu"))
    real = references.real_images("data/scenes/reference.parquet", "reference", 40, 0)
    own = panel.pictures_of(real)
    assert sorted(row for rows in own.values() for row in rows) == list(range(24))
    assert all(real.captions[row] == panel.prompts[place].text for place, rows in own.items() for row in rows)
    order, asked = zip(*[(row, panel.prompts[place]) for place, rows in own.items() for row in rows])
    others = prompted.partners(panel.prompts)
    chance = [panel.prompts[others[panel.prompts.index(prompt)]] for prompt in asked]
    verdicts = panel.judge(real.pixels[list(order)], asked, chance)
    assert verdicts["geneval"].float().mean() > 0.9 and verdicts[f"{prompted.SHUFFLED}/geneval"].float().mean() < 0.2


def test_subjects_follow_the_image_alone() -> None:
    asked = references.Subjects(0, CAPTIONS, "balanced")
    assert [asked.label(3, n) for n in range(6)] == [0, 1, 2, 3, 0, 1]
    drawn = references.Subjects(0, CAPTIONS, "random")
    labels = [drawn.label(3, n) for n in range(2000)]
    assert labels[7] == drawn.label(3, 7) != drawn.label(4, 7) or labels[8] != drawn.label(4, 8)
    assert np.bincount(labels).min() > 400
    assert asked.key != drawn.key != references.Subjects(0, CAPTIONS[:2], "random").key


# --- tuning ------------------------------------------------------------------------------------


def batch_of(policy: models.Policy) -> Batch:
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(torch.arange(4), pixels, policy.encode(pixels), policy.condition(CAPTIONS))


def test_noise_never_touches_the_condition(captioned_model: ModelConfig) -> None:
    policy = models.load(captioned_model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    features = policy.generator.features
    policy.generator.features = lambda *given: seen.append(given) or features(*given)
    config = TuneConfig(rewards={"mse": 1.0}, group_size=2, context_noise=1.0)
    objective = Objective(policy, config, Reward(config.rewards, functions={}))
    batch = batch_of(policy)
    before = batch.condition.clone()
    update(objective, optimizer_of(policy.generator, config), batch, 1)
    ((condition, context),) = seen
    assert torch.equal(condition, before) and torch.equal(batch.condition, before)
    assert (context != batch.codes).all()


def test_train_and_eval_mode_predict_the_same_positions(captioned_model: ModelConfig) -> None:
    """The last T positions in both (dropout off): LlamaGen's own code cuts its logits in train mode alone."""
    policy = models.load(captioned_model)
    batch = batch_of(policy)
    for module in policy.generator.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    policy.generator.cls_embedding.dropout = 0.0
    found = [policy.generator.train(mode)(batch.condition, batch.codes) for mode in (False, True)]
    assert found[0].shape == (4, 16, 32) and torch.equal(*found)


def test_the_form_of_a_text_recipe_is_the_papers() -> None:
    made = recipe("llamagen-xl-t2i")
    assert (made.model.image_size, made.tune.steps, made.tune.images_per_step, made.tune.lr) == (256, 200, 128, 1e-6)
    assert (made.tune.prior_weight, made.tune.context_noise, made.tune.group_size) == (0.1, 0.5, 8)
    assert made.subset.images == made.tune.steps * made.tune.images_per_step + made.tune.holdout_images
    assert (made.evaluate.guidance, made.evaluate.top_k, made.evaluate.images_per_prompt) == (7.5, 2000, 4)
    assert dataclasses.asdict(EvaluateConfig())["prompts"] == recipe("digits-t2i").evaluate.prompts


def test_the_served_model_takes_prompts(captioned_model: ModelConfig, tmp_path: Path) -> None:
    """mlflow/generator.py as MLflow runs it; through the registry in tests/test_register.py, with classes."""
    spec = importlib.util.spec_from_file_location("served", ROOT / "mlflow" / "generator.py")
    assert spec and spec.loader
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    data.write_json(tmp_path / "config.json", plain(captioned_model))
    artifacts = {"generator": captioned_model.generator, "tokenizer": captioned_model.tokenizer, "config": str(tmp_path / "config.json")}
    model = served.Generator()
    model.load_context(SimpleNamespace(artifacts=artifacts))
    drawn = model.predict(None, pd.DataFrame({"prompt": list(CAPTIONS[:2])}), {"seed": 5, "temperature": 0.9})
    alone = model.predict(None, pd.DataFrame({"prompt": [CAPTIONS[1]]}), {"seed": 6, "temperature": 0.9})
    assert list(drawn.columns) == ["prompt", "png_base64"] and drawn["prompt"].tolist() == list(CAPTIONS[:2])
    assert drawn["png_base64"][1] == alone["png_base64"][0] != drawn["png_base64"][0]
    for nothing in (None, float("nan"), " ", 7):
        with pytest.raises(ValueError, match="prompt 1 is .*draws what words say"):
            model.predict(None, pd.DataFrame({"prompt": [CAPTIONS[0], nothing]}))
