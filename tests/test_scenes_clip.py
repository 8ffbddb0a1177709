"""The scenes' CLIP: a folder that every reader of CLIPs loads, words that it knows, and captions that it tells apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="pip install 'vapi-align[geneval]'")

from test_scenes_janus import built

from vapi.config import EvaluateConfig
from vapi.digits import build, build_clip, build_scenes, scenes
from vapi.metrics import clip as clips
from vapi.metrics import text

BUNDLED = Path(__file__).parents[1] / "data" / build_clip.FOLDER
bundled = pytest.mark.skipif(not BUNDLED.is_dir(), reason="data/ is not here: dvc pull data.dvc")


def painted(per_task: int) -> scenes.Pictures:
    return scenes.paint_prompts(scenes.prompts("test", per_task), "reference", seed=78)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("clip") / "data", "--clip") / build_clip.FOLDER


def test_the_command_builds_what_clipscore_reads(tiny: Path) -> None:
    assert sorted(path.name for path in tiny.iterdir()) == sorted(
        ["config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]
    )
    metric = text.load(EvaluateConfig(clip=str(tiny), text_metrics=["clipscore"]), "cpu")["clipscore"]
    pictures = painted(1)
    found = metric(pictures.images, pictures.captions, [{}] * 6)
    assert max(map(abs, found)) <= 1 and len(set(found)) == 6
    with pytest.raises(ValueError, match="exists; name a new folder"):
        build_clip.build(tiny.parents[1], build_clip.TINY)


def test_it_is_built_to_scenes_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scenes-tokenizer.safetensors is not here"):
        build_clip.build(tmp_path, build_clip.TINY)
    assert not (tmp_path / build_clip.FOLDER).exists()


def test_a_word_of_a_caption_is_one_token(tiny: Path) -> None:
    words = clips.load(tiny).tokenizer
    asked = [prompt for name in ("train", "validation", "test") for prompt in scenes.captions(name, 300, seed=2)]
    wrong = [other for prompt in asked for kind in build_clip.changes(prompt).values() for other in kind]
    for prompt in (*asked, *wrong):
        ids = words(prompt.text)["input_ids"]
        assert words.convert_ids_to_tokens(ids)[1:-1] == [f"{word}</w>" for word in prompt.text.split()]
        assert len(ids) <= build_clip.LONGEST
    strange = words("a purple giraffe, zwölf")["input_ids"]
    assert strange.count(words.eos_token_id) == 1 and words.decode(strange[1:-1]).replace(" ", "") == "apurplegiraffe,zwölf"


def test_nothing_is_painted_that_is_painted_elsewhere() -> None:
    assert build_clip.SEED not in {*build.SEEDS.values(), *build_scenes.SEEDS.values()}


# --- captions that are wrong in one thing ------------------------------------------------------


def test_a_caption_fits_its_picture_and_what_is_changed_does_not() -> None:
    pictures, kinds = painted(40), set()
    for prompt, placed in zip(pictures.prompts, pictures.layouts, strict=True):
        assert build_clip.fits(prompt, placed)
        changes = build_clip.changes(prompt)
        kinds |= {(prompt.task, kind) for kind in changes}
        for kind, others in changes.items():
            assert others and not any(build_clip.fits(other, placed) for other in others), (prompt.text, kind)
    assert kinds == {
        *itertools.product(["single_object", "counting"], ["digit", "count"]),
        *itertools.product(["two_object", "position", "colors", "color_attr"], ["digit"]),
        *itertools.product(["colors", "color_attr"], ["colour"]),
        ("color_attr", "whose colour"),
        ("position", "relation"),
    }


def test_what_says_the_same_in_other_words_fits() -> None:
    three, eight = scenes.Thing(3), scenes.Thing(8)
    asked = scenes.Prompt("position", (three, eight), "left of")
    (placed,) = scenes.paint_prompts([asked], "reference", seed=1).layouts
    same = [scenes.Prompt("position", (eight, three), "right of"), scenes.Prompt("two_object", (eight, three), opening=3)]
    other = [scenes.Prompt("single_object", (three,)), scenes.Prompt("position", (three, eight), "above")]
    assert [build_clip.fits(prompt, placed) for prompt in (*same, *other)] == [True, True, False, False]


def test_what_also_fits_is_not_held_against_it() -> None:
    """Two captions alike: each picture is as near to the other's as to its own, and loses nothing by it."""
    shown = F.normalize(torch.eye(3)[[0, 0, 1]], dim=-1)
    told = shown[:, None].repeat(1, 2, 1)
    told[:, 1] = torch.eye(3)[2]
    alike = torch.eye(3, dtype=torch.bool)
    strict = build_clip.contrast_of(shown, told, alike, torch.tensor(9.0))
    alike[0, 1] = alike[1, 0] = True
    assert build_clip.contrast_of(shown, told, alike, torch.tensor(9.0)) < 1e-6 < 0.9 < strict
    told[0, 1] = shown[0]  # but what is wrong in one thing is
    assert build_clip.contrast_of(shown, told, alike, torch.tensor(9.0)) > 0.2


# --- network -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_head_begins_with_one_neighbour() -> None:
    vision = build_clip.Learner(build_clip.WORLD, words=700).clip.vision_model
    vision.set_attn_implementation("eager")
    seen = vision(pixel_values=torch.zeros(1, 3, scenes.SIDE, scenes.SIDE), output_attentions=True).attentions[0][0]  # (H, 1 + T, 1 + T)
    side = scenes.SIDE // build_clip.WORLD.patch
    for row, column in itertools.product(range(1, side - 1), repeat=2):
        for head, (right, down) in zip(seen, build_clip.NEIGHBOURS, strict=True):
            assert head[1 + side * row + column].argmax() == 1 + side * (row + down) + column + right


# --- the bundled one ---------------------------------------------------------------------------


@bundled
def test_the_bundled_one_is_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 3e6


@bundled
def test_the_bundled_one_knows_the_caption_of_a_picture() -> None:
    """Of glyphs that nothing learned from: against another prompt of the task, and against a caption that is wrong in one thing."""
    clip, pictures = clips.load(BUNDLED), painted(20)
    asked, others, random = pictures.prompts, build_scenes.shuffled(pictures.prompts), np.random.default_rng(0)
    own = build_clip.scores(clip, pictures.images, asked)
    unlike = np.array([not build_clip.fits(other, placed) for other, placed in zip(others, pictures.layouts, strict=True)])
    assert (own > build_clip.scores(clip, pictures.images, others))[unlike].mean() > 0.9
    assert (own > build_clip.scores(clip, pictures.images, [build_clip.changed(prompt, random) for prompt in asked])).mean() > 0.8
