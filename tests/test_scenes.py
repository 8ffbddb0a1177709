"""The embedded scenes: the same pictures everywhere, captions that fit them, prompts that never meet, judges that see it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from vapi import data, models
from vapi.config import ModelConfig
from vapi.digits import build, build_scenes, judges, paint, scenes, train
from vapi.metrics import geneval
from vapi.metrics import scenes as metric
from vapi.models import features, llamagen

DATA = Path("data")
GOLDEN = "536c41b79d23930366c4600824d417373409f7e88b05ec1e93516469a32d8b02"
generator_bundled = pytest.mark.skipif(
    not (DATA / "models/scenes-generator.safetensors").is_file(), reason="the scenes' generator is not here"
)
bundled = pytest.mark.skipif(not (DATA / "scenes/test.jsonl").is_file(), reason="data/ is not here: dvc pull data.dvc")


def some(name: str = "reference", prompts: str = "test", per_task: int = 4) -> scenes.Pictures:
    return scenes.paint_prompts(scenes.prompts(prompts, per_task), name, seed=5)


# --- pictures ----------------------------------------------------------------------------------


def test_pictures_are_the_same_bytes_everywhere() -> None:
    pictures = some()
    assert pictures.images.shape == (24, 40, 40, 3) and pictures.images.dtype == np.uint8
    assert build.pixel_hash(pictures.images) == GOLDEN


def test_a_picture_depends_on_its_prompt_seed_and_place_alone() -> None:
    asked = scenes.captions("train", 30, seed=3)
    together = scenes.paint_prompts(asked, "train", seed=3)
    other = scenes.paint_prompts([asked[0]] * 20 + asked[20:], "train", seed=3)
    assert np.array_equal(together.images[20:], other.images[20:]) and not np.array_equal(together.images[1:20], other.images[1:20])
    assert scenes.captions("train", 40, seed=3)[:30] == asked != scenes.captions("train", 30, seed=4)


def test_objects_are_whole_and_never_touch() -> None:
    for placed in some(prompts="train", name="train", per_task=30).layouts:
        inked = scenes.coverage(placed) > 0.02
        assert not inked[:, [0, -1]].any() and not inked[:, :, [0, -1]].any()
        grown = sum(ndimage.binary_dilation(mask, np.ones((3, 3))).astype(int) for mask in inked)
        assert np.max(grown) == 1


def test_layouts_fit_their_captions() -> None:
    for prompt, placed in zip((pictures := some(per_task=40)).prompts, pictures.layouts, strict=True):
        wanted = sorted(thing.digit for thing in prompt.things for _ in range(thing.count))
        assert sorted(glyph.digit for glyph in placed) == wanted
        for thing, glyph in zip(prompt.things, placed, strict=False):
            assert thing.colour in ("", glyph.colour)
        if prompt.relation:
            a, b = placed
            assert {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[prompt.relation]


def test_glyphs_are_legible_and_of_their_split() -> None:
    everything = [set(itertools.chain.from_iterable(members.tolist() for members in scenes.glyphs(name))) for name in paint.SPLITS]
    assert len(set.union(*everything)) == sum(map(len, everything)) == scenes.legible().sum()
    assert 0.6 < scenes.legible().mean() < 0.8
    assert all(len(members) >= 3 for name in paint.SPLITS for members in scenes.glyphs(name))
    used = {glyph.glyph for placed in some("validation").layouts for glyph in placed}
    assert used <= set(paint.split("validation").tolist())


# --- prompts -----------------------------------------------------------------------------------


def test_splits_share_no_combination() -> None:
    for task in scenes.TASKS[1:]:
        parts = [{_asks(prompt) for prompt in scenes.combinations(task, name)} for name in ("train", "validation", "test")]
        assert len(set.union(*parts)) == sum(map(len, parts)), task
    assert {scenes.combinations("single_object", name) for name in ("train", "validation", "test")} == {
        scenes.combinations("single_object", "test")
    }


def _asks(prompt: scenes.Prompt) -> object:
    """The same for two prompts that differ in words alone."""
    return (frozenset(prompt.things) if prompt.task == "two_object" else prompt.things), prompt.relation


def test_pairs_are_held_out_of_everything_but_test_prompts() -> None:
    for name in ("train", "validation"):
        for task in scenes.TASKS:
            assert not any(prompt.unseen for prompt in scenes.combinations(task, name))
    pictures = scenes.paint_prompts(scenes.captions("train", 300, seed=1), "train", seed=1)
    shown = {(glyph.colour, glyph.digit) for placed in pictures.layouts for glyph in placed}
    assert not shown & scenes.UNSEEN and len(shown) == 60 - len(scenes.UNSEEN)
    asked = [json.loads(line) for line in scenes.jsonl(scenes.prompts("test", 100)).splitlines()]
    flagged = [row for row in asked if row.get("unseen")]
    assert {row["tag"] for row in flagged} == {"colors", "color_attr"} and len(flagged) == 40


def test_prompts_are_genevals(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(scenes.jsonl(asked := scenes.prompts("test", 100)))
    read = geneval.read_prompts(tmp_path / "test.jsonl", scenes.DIGITS, tuple(scenes.COLOURS))
    assert len({prompt.text for prompt in read}) == len(asked) == 600
    assert [prompt.tag for prompt in read] == [task for task in geneval.TASKS for _ in range(100)]
    by_text = {prompt.text: prompt for prompt in read}
    position = next(prompt for prompt in read if prompt.tag == "position")
    first, relation, second = position.include[1].name, position.include[1].relation, position.include[0].name
    assert f"{first} {relation} a" in position.text and position.text.endswith(second)
    counting = next(prompt for prompt in read if prompt.tag == "counting")
    assert counting.exclude[0].count == counting.include[0].count + 1
    assert len(by_text) == 600
    with pytest.raises(ValueError, match="has 96 prompts, not 100"):
        scenes.prompts("validation", 100)


def test_words_are_english() -> None:
    thing = scenes.Thing
    assert scenes.Prompt("single_object", (thing(8),)).text == "a photo of an eight"
    assert scenes.Prompt("colors", (thing(1, "orange"),), opening=2).text == "an image of an orange one"
    assert scenes.Prompt("single_object", (thing(1),)).text == "a photo of a one"
    assert scenes.Prompt("counting", (thing(6, count=3),)).text == "a photo of three sixes"
    assert scenes.Prompt("position", (thing(3), thing(8)), "left of").text == "a photo of a three left of an eight"


# --- judges ------------------------------------------------------------------------------------


def test_the_classical_judge_reads_clean_pictures() -> None:
    judge, pictures = metric.classical(), some(per_task=25)
    assert judges.scores(judge, pictures.images, pictures.prompts)["overall"] >= 0.97
    assert judges.scores(judge, pictures.images, build_scenes.shuffled(pictures.prompts))["overall"] < 0.2


def test_what_it_names_is_where_it_says() -> None:
    judge, pictures = metric.classical(), some()
    for placed, seen in zip(pictures.layouts, judge.detect(list(pictures.images)), strict=True):
        assert sum(map(len, seen.values())) == len(placed)
        for objects in seen.values():
            assert objects.masks is not None and objects.masks.shape == (len(objects), 40, 40)
            assert ((objects.boxes[:, 4] > 0) & (objects.boxes[:, 4] <= 1)).all()
        for glyph, (x0, y0, x1, y1) in zip(placed, judges.boxes(placed), strict=True):
            boxes = np.concatenate([objects.boxes for objects in seen.values()])
            assert np.abs(boxes[:, :4] - [x0, y0, x1, y1]).max(axis=1).min() <= 2, glyph


def test_it_sees_nothing_where_nothing_is() -> None:
    u = paint.uniforms(1, np.arange(5), scenes.UNIFORMS)
    assert metric.classical().detect(list(scenes.ground(u[:, :14]).astype(np.uint8))) == [{}] * 5
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    rules = metric.classical().rules
    assert all(objects.boxes[:, 4].max() < rules.threshold for seen in metric.classical().detect(list(noise)) for objects in seen.values())


def test_the_judges_share_no_glyphs_with_each_other_or_a_generator() -> None:
    used = [set(paint.split(name).tolist()) for name in (metric.TEMPLATES, judges.GLYPHS, "train", "reference", "validation")]
    assert sum(map(len, used)) == len(set.union(*used))


@pytest.mark.parametrize("cell", [metric.CELL, 5])
def test_targets_mark_the_middles(cell: int) -> None:
    pictures = some(per_task=2)
    here, digit, colour, reach = judges.targets(pictures, cell)
    for i, placed in enumerate(pictures.layouts):
        for glyph, (x0, y0, x1, y1) in zip(placed, judges.boxes(placed), strict=True):
            row, column = int((y0 + y1) / 2 / cell), int((x0 + x1) / 2 / cell)
            assert here[i, row, column] > 0.5
            assert digit[i, row, column] == glyph.digit and list(scenes.COLOURS)[colour[i, row, column]] == glyph.colour
            left, up, right, down = cell * reach[i, row, column].numpy()
            x, y = cell * (column + 0.5), cell * (row + 0.5)
            assert np.allclose([x - left, y - up, x + right, y + down], [x0, y0, x1, y1], atol=1e-4)
    assert ((here == 1).sum() == 0) and here.max() <= 1


def test_a_file_that_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not hold the weights"):
        metric.learned(tmp_path / "absent.safetensors")


# --- the build ---------------------------------------------------------------------------------


def test_rebuild_at_a_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "data"
    measured = build_scenes.build(out, build_scenes.TINY)
    assert all(np.isfinite(list(measured.values())))
    policy = models.load(_model(out / "models"))
    assert policy.generate(policy.condition(["a photo of a seven"]), [0]).shape == (1, policy.num_codes)
    images, _, captions = data.read_images(out / "scenes/train.parquet")
    again = build_scenes.painted("train", build_scenes.TINY)
    assert np.array_equal(images, again.images) and list(captions) == again.captions
    assert isinstance(metric.learned(out / "models/scenes-judge.safetensors").detect(list(images[:2])), list)
    with pytest.raises(ValueError, match="exists; name a new folder"):
        build_scenes.build(out, build_scenes.TINY)


def _model(folder: Path) -> ModelConfig:
    return ModelConfig(
        generator=str(folder / "scenes-generator.safetensors"),
        tokenizer=str(folder / "scenes-tokenizer.safetensors"),
        text_encoder="words",
        image_size=scenes.SIDE,
        device="cpu",
    )


@bundled
def test_bundled_pictures_and_prompts_are_what_the_painter_makes() -> None:
    readme = (DATA / "scenes/README.md").read_text()
    for name, count in build_scenes.WORLD.painted.items():
        images, _, captions = data.read_images(DATA / "scenes" / f"{name}.parquet", limit=20)
        few = build_scenes.World(painted={name: 20})
        again = build_scenes.painted(name, few)
        assert np.array_equal(images, again.images) and list(captions) == again.captions, name
        assert f"| {name}.parquet | {count} |" in readme
    for name in build_scenes.WORLD.prompts:
        assert (DATA / "scenes" / f"{name}.jsonl").read_text() == scenes.jsonl(build_scenes.prompts(name, build_scenes.WORLD))


@bundled
@pytest.mark.parametrize("judge", [metric.classical, lambda: metric.learned(DATA / "models/scenes-judge.safetensors")])
def test_bundled_anchors_are_what_the_table_says(judge: Callable[[], metric.Classical | metric.Learned]) -> None:
    """Clean renders, their reconstructions, and renders of other prompts, by either judge with its own rules."""
    table = dict(
        line.strip("| ").split(" | ") for line in (DATA / "scenes/README.md").read_text().splitlines() if " judge, overall" in line
    )
    judge_, tokenizer = judge(), llamagen.load_tokenizer(_model(DATA / "models"), torch.device("cpu"))
    asked = scenes.prompts("test", 20)
    clean = scenes.paint_prompts(asked, "reference", seed=9).images
    through = judges.reconstructed(train.encode_all(tokenizer, clean), tokenizer)
    name = f"{judge_.identity.name} judge, overall"
    for what, images, prompts in (
        ("clean renders of the test prompts", clean, asked),
        ("reconstructions of these", through, asked),
        ("renders of other prompts of the task", clean, build_scenes.shuffled(asked)),
    ):
        assert judges.scores(judge_, images, prompts)["overall"] == pytest.approx(float(table[f"{name}: {what}"]), abs=0.09)


@bundled
def test_thresholds_are_the_frozen_ones() -> None:
    """Each is what the rule gives on renders of validation glyphs, and no glyph of a reported picture had a say."""
    tokenizer = llamagen.load_tokenizer(_model(DATA / "models"), torch.device("cpu"))
    for judge in (metric.classical(), metric.learned(DATA / "models/scenes-judge.safetensors")):
        assert judge.rules.threshold == judge.rules.counting_threshold
        assert judges.threshold(judge, build_scenes.threshold_pictures(120), tokenizer) == pytest.approx(judge.rules.threshold, abs=0.06)


@bundled
def test_bundled_networks_are_small_and_differ() -> None:
    sizes = {path.stem: path.stat().st_size for path in (DATA / "models").glob("scenes-*.safetensors")}
    assert {f"scenes-{name}" for name in ("tokenizer", "reward", "metric", "judge")} <= set(sizes)
    assert sum(sizes.values()) < 8e6 and sizes["scenes-judge"] < 3e5
    reward, other = (features.load(DATA / "models" / f"scenes-{name}.safetensors") for name in ("reward", "metric"))
    assert not any(torch.equal(a, b) for a, b in zip(reward.stages.parameters(), other.stages.parameters(), strict=True))


@generator_bundled
def test_the_bundled_generator_reads_its_captions() -> None:
    """A caption changes what is drawn, in the way it says: colours come out right far more often than by chance."""
    policy = models.load(_model(DATA / "models"))
    asked = [
        scenes.Prompt("colors", (scenes.Thing(digit, colour),)) for digit in (0, 1, 4) for colour in ("red", "green", "blue", "purple")
    ]
    asked = [prompt for prompt in asked if not prompt.unseen]
    codes = policy.generate(policy.condition([prompt.text for prompt in asked]), list(range(len(asked))), guidance=4.0)
    pictures = judges.reconstructed(codes, policy.tokenizer)
    seen = metric.classical().detect(list(pictures))
    shown = [{colour for objects in found.values() for colour in objects.colours} for found in seen]
    assert np.mean([prompt.things[0].colour in colours for prompt, colours in zip(asked, shown, strict=True)]) > 0.6
