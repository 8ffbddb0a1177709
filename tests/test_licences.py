"""Licences are those of the names that recipes use, or somebody's word, or unknown."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from imports import ROOT

from vapi import config, recipes
from vapi.config import RegisterConfig
from vapi.licences import DIGITS, EMBEDDED, KNOWN, UNKNOWN, WORDS, licences
from vapi.metrics.mask2former import LICENCES


def of(recipe: str) -> dict[str, str]:
    """Licences of a recipe's inputs, before anything has judged."""
    values = {field: str(value) for field, value in config.flat(recipes.recipe(recipe)).items()}
    return {found.input: found.licence for found in licences(values, {}, {})}


@pytest.mark.parametrize(
    ("recipe", "each", "words"),
    [
        ("digits", "data", DIGITS),
        ("digits-t2i", "text_encoder", "Apache-2.0 (this project)"),
        ("digits-t2i", "second_detector", DIGITS),
        ("llamagen-xxl-c2i", "generator", "MIT (LlamaGen)"),
        ("llamagen-xxl-c2i", "tokenizer", "MIT (LlamaGen)"),
        ("llamagen-xxl-c2i", "data", "no commerce"),
        ("llamagen-xxl-c2i", "perceptual", "from ImageNet's"),
        ("llamagen-xl-t2i", "text_encoder", "Apache-2.0 (Google)"),
        ("llamagen-xl-t2i", "data", "the pictures': unknown"),
        ("llamagen-xl-t2i", "extractor", "torch-fidelity"),
        ("llamagen-xl-t2i", "prompts", "MIT (GenEval)"),
        ("llamagen-xl-t2i", "clip", "MIT"),
        ("llamagen-xl-t2i", "detector", UNKNOWN),  # it depends on who trained the weights, which they say when they judge
        ("janus-pro-1b", "generator", "bind tuned weights too"),
        ("janus-pro-1b", "tokenizer", "DeepSeek License Agreement"),
        ("janus-pro-1b", "data", "FLUX.1 [dev], whose licence (2 d) forbids training competing models"),
    ],
)
def test_inputs_of_the_recipes(recipe: str, each: str, words: str) -> None:
    assert words in of(recipe)[each]


def test_what_nobody_said_is_unknown_and_who_said_it_is_told() -> None:
    named = {"subset.source": "photos", "model.generator": "data/models/mine.safetensors", "evaluate.detector": "data/geneval/mask2former"}
    said = {found.input: (found.licence, found.source) for found in licences(named, {"data": "mine"}, {"detector": LICENCES[False]})}
    assert said["data"] == ("mine", "register.licences") and said["generator"] == (UNKNOWN, "nobody")
    assert "CC BY-NC 4.0" in said["detector"][0] and said["detector"][1] == "the detector"
    (stated,) = licences({"subset.source": "data/imagenet/train"}, {"data": "bought"}, {})
    assert stated.licence == "bought", "who states it knows better than a name"


@pytest.mark.parametrize(
    ("each", "name"),
    [("data", "words"), ("data", "digits"), ("data", "photos/mscoco/mine"), ("generator", "weights/my_c2i_tuned.pt")],
)
def test_a_name_that_is_only_alike_says_nothing(each: str, name: str) -> None:
    (found,) = licences({config.INPUTS[each]: name}, {}, {})
    assert found.licence == UNKNOWN


def test_every_row_of_the_table_is_needed() -> None:
    """By a recipe, or by what docs say to fetch."""
    recipe = [str(value) for name in recipes.RECIPES for value in config.flat(recipes.recipe(name)).values()]
    names = [
        *recipe,
        "facebook/dinov2-small",
        "FoundationVision/LlamaGen/c2i_B_256.pt",
        "weights/t2i_XL_stage2_512.pt",
        "weights/c2i_B_256.pt",
        "weights/vq_ds8_c2i.pt",
    ]
    assert not [pattern for pattern in KNOWN if not any(fnmatchcase(name.lower(), pattern) for name in names)]
    assert WORDS.keys() <= set(config.WORDS)


def test_what_is_embedded_is_bundled() -> None:
    bundled = {out["path"] for out in config.read_yaml((ROOT / "data.dvc").read_text())["outs"]}
    named = {path if path in EMBEDDED else Path(path).parent.as_posix() for path in bundled - {"data/scenes/validation.jsonl"}}
    assert named == EMBEDDED


def test_a_licence_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="register.licences names 'dta'; did you mean 'data'?"):
        RegisterConfig(licences={"dta": "x"})
