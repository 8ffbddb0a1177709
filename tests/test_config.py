"""The configuration survives every road it travels, and what is wrong with it is said in words."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import typing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from vapi import config, recipes
from vapi.config import Config

FIELDS = [
    (section.name, field.name, hint)
    for section in dataclasses.fields(Config)
    for kind in [typing.get_type_hints(Config)[section.name]]
    for field, hint in zip(dataclasses.fields(kind), typing.get_type_hints(kind).values(), strict=True)
]


def with_value(section: str, name: str, value: Any) -> dict[str, Any]:
    values = config.plain(Config())
    values[section][name] = value
    return values


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_survives_its_own_text(name: str) -> None:
    assert config.build(Config, config.read_yaml(recipes.text(name))) == recipes.recipe(name)


PAPER = {
    "model.image_size": 384, "model.precision": "bfloat16", "tune.steps": 100, "tune.images_per_step": 128, "tune.group_size": 8,
    "tune.lr": 1e-6, "tune.weight_decay": 1e-4, "tune.beta1": 0.9, "tune.beta2": 0.999, "tune.max_grad_norm": 1.0,
    "tune.policy_weight": 1.0, "tune.prior": "ce", "tune.prior_weight": 0.1, "tune.context_noise": 0.0, "tune.ratio_clip": 0.2,
    "tune.advantage_clip": 5.0, "tune.temperature": 1.0, "tune.rewards.mse": 1.0, "tune.rewards.lpips": 1.0,
    "tune.perceptual": "vgg", "tune.seed": 0,
    "evaluate.samples": 50_000, "evaluate.resize": 256, "evaluate.temperature": 1.0, "evaluate.top_k": 0, "evaluate.top_p": 1.0,
    "evaluate.guidance": 1.0, "evaluate.protocol": "adm-256-50k", "evaluate.labels": "random",
}  # fmt: skip


@pytest.mark.parametrize("size", ["xl", "xxl"])
def test_the_papers_class_conditional_runs(size: str) -> None:
    """Table 7 and section 4.1 (arXiv 2512.19680); every image of the 12,800 is seen once."""
    ours, official = (recipes.recipe(f"llamagen-{size}-c2i{twin}") for twin in ("", "-official"))
    values = config.flat(ours)
    assert {name: values[name] for name in PAPER} == PAPER
    assert ours.subset.images - ours.tune.holdout_images == ours.tune.steps * ours.tune.images_per_step == 12_800
    assert ours.evaluate.guided == {"xl": 2.0, "xxl": 1.75}[size]
    assert recipes.changes(ours, official) == {"tune.policy_dropout": ("none", "official")}


def test_params_yaml_is_the_default_recipe() -> None:
    text = (Path(__file__).parents[1] / "params.yaml").read_text()
    assert text == recipes.text("digits"), "refresh it: vapi recipe digits --write --force"


@pytest.mark.parametrize("reader", ["pyyaml", "ruamel"])
def test_other_readers_of_params_yaml_see_the_same_values(reader: str) -> None:
    """DVC reads it with ruamel, a user's script with PyYAML: what we write is quoted and pointed for both."""
    for name in recipes.RECIPES:
        text = recipes.text(name)
        values = yaml.safe_load(text) if reader == "pyyaml" else YAML(typ="safe").load(text)
        assert config.build(Config, values) == recipes.recipe(name)
        assert values == config.plain(recipes.recipe(name))


@settings(max_examples=50, deadline=None)
@given(
    number=st.floats(min_value=1e-300, max_value=1e300),
    word=st.sampled_from(["off", "on", "no", "yes", "y", "null", "~", "1e-6", "007", "a: b", ""]),
)
def test_floats_and_words_survive_the_file(number: float, word: str) -> None:
    ours = dataclasses.replace(
        Config(), tune=dataclasses.replace(Config().tune, ratio_clip=number), track=dataclasses.replace(Config().track, uri=word)
    )
    assert config.build(Config, config.read_yaml(config.dump(ours, comments=False))) == ours
    assert config.build(Config, yaml.safe_load(config.dump(ours, comments=False))) == ours


@pytest.mark.parametrize("text", ["2e-06", "2E-6", "1e-6", "2.0e-06", "1e3", ".5", "1.", "-1e5"])
def test_every_way_to_write_a_float_is_one(text: str) -> None:
    assert config.read_yaml(f"lr: {text}") == {"lr": float(text)}


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "y", "n", "Off", "NO"])
def test_a_word_stays_a_word(word: str) -> None:
    assert config.read_yaml(f"uri: {word}") == {"uri": word}


def test_numbers_of_ints_that_passed_through_a_double_are_ints_again() -> None:
    """Kubeflow turns every number inside a dict into a double."""
    doubled = {
        k: [float(x) for x in v] if k == "seeds" else float(v) if type(v) is int else v for k, v in config.plain(Config().evaluate).items()
    }
    assert config.build(config.EvaluateConfig, doubled, "evaluate") == Config().evaluate


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("tune", "steps", 8.5, "tune.steps is 8.5; it must be an int"),
        ("tune", "steps", True, "tune.steps is True; it must be an int"),
        ("tune", "steps", 0, "at least 1"),
        ("tune", "group_size", 1, "an advantage needs at least 2"),
        ("tune", "max_grad_norm", -1.0, "must not be negative"),
        ("tune", "advantage_clip", 0.0, "must be positive"),
        ("tune", "credit_radius", -1, "must not be negative"),
        ("tune", "credit_radius", 1, "with credit image no code has a reward of its own"),
        ("tune", "cca_weight", 0.0, "must be positive"),
        ("tune", "ratio_clip", -0.2, "must not be negative"),
        ("tune", "weight_decay", -1.0, "must not be negative"),
        ("tune", "beta1", 1.0, r"must lie in \[0, 1\)"),
        ("tune", "rewards", {"mse": -1.0}, "must not be negative"),
        ("tune", "seed", 2**32, "a seed lies in"),
        ("evaluate", "seeds", [-1], "a seed lies in"),
        ("evaluate", "seeds", [0, 0], "a seed counts once"),
        ("evaluate", "top_k", -3, "0 for all"),
        ("subset", "max_imbalance", 0.5, "1 is balanced"),
        ("register", "min_fid_drop", 0.0, "both 0"),
        ("register", "min_fid_drop", 1.0, "less than 1"),
        ("register", "allowances", {"kid": -1.0}, "must not be negative"),
        ("tune", "lr", "fast", "tune.lr is 'fast'; it must be a float"),
        ("tune", "lr", math.nan, "tune.lr is nan"),
        ("tune", "lr", math.inf, "tune.lr is inf"),
        ("tune", "lr", 1e38, r"tune.lr is 1e\+38; it must be positive, and at most 1"),
        ("tune", "prior", "cee", "it must be one of 'ce', 'kl'"),
        ("tune", "rewards", {"mse": "much"}, "tune.rewards.mse is 'much'"),
        ("tune", "rewards", 1.0, "it must be a mapping"),
        ("evaluate", "seeds", 0, "it must be a list"),
        ("evaluate", "seeds", ["a"], r"evaluate.seeds\[0\] is 'a'"),
        ("track", "uri", False, r"track.uri is False; it must be a str \(quote it in YAML\)"),
        ("register", "strict", "perhaps", "register.strict is 'perhaps'; it must be a bool"),
        ("subset", "images", None, "subset.images is None"),
        ("tune", "learning_rate", 1e-5, "tune has no field 'learning_rate'"),
        ("tune", "step", 1, "did you mean 'steps'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(section: str, name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.build(Config, with_value(section, name, value))


def test_nothing_is_filled_in_for_what_is_missing() -> None:
    values = config.plain(Config())
    del values["tune"]["lr"]
    with pytest.raises(ValueError, match="tune lacks lr"):
        config.build(Config, values)
    del values["model"]
    with pytest.raises(ValueError, match="the config lacks model"):
        config.build(Config, values)
    with pytest.raises(ValueError, match="must be a mapping"):
        config.build(Config, None)


def test_errors_in_the_file_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vapi recipe digits --write"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("tune: [")
    with pytest.raises(ValueError, match=r"params.yaml: not valid YAML"):
        config.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(("section", "name", "hint"), FIELDS)
def test_every_field_is_documented_and_of_a_kind_that_travels(section: str, name: str, hint: Any) -> None:
    kind = typing.get_type_hints(Config)[section]
    assert re.search(r"[.)]$", config.field_docs(kind)[name]), "each field has a sentence under it"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    plain_kinds = {str, int, float, bool}
    if origin is typing.Literal:
        assert all(isinstance(word, str) and yaml.safe_load(word) == word for word in arguments), "no YAML boolean in disguise"
    elif origin is dict:
        assert arguments[0] is str and arguments[1] in plain_kinds
    else:
        assert (arguments[0] if origin is list else hint) in plain_kinds


def test_a_section_is_called_as_its_stage_and_class() -> None:
    for section, kind in typing.get_type_hints(Config).items():
        assert kind.__name__ == f"{section.capitalize()}Config"
        assert section in {"model", "track", *config.STAGES}


def test_flat_names_every_value() -> None:
    values = config.flat(Config())
    assert values["tune.rewards.mse"] == 1.0 and values["evaluate.seeds"] == [0] and values["track.uri"] == ""


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    config.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        config.write_text(path, "new \ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["params.yaml"]


def test_ruamel_rewrites_are_read_back() -> None:
    """What `dvc exp run -S` does to the file: load with ruamel, set, dump."""
    writer = YAML()
    document = writer.load(recipes.text("digits"))
    document["tune"]["lr"], document["track"]["uri"] = 2e-6, "off"
    stream = StringIO()
    writer.dump(document, stream)
    assert "2e-06" in stream.getvalue() and "uri: off" in stream.getvalue()
    read = config.build(Config, config.read_yaml(stream.getvalue()))
    assert read.tune.lr == 2e-6 and read.track.uri == "off"


def test_the_configuration_loads_nothing_heavy() -> None:
    heavy = (
        "import sys, vapi.config, vapi.recipes, vapi.cli; print(sorted({'torch', 'mlflow', 'kfp', 'numpy', 'pandas'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
