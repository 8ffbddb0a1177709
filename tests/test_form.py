"""The run form: what its fields mean, and that a mistake is named as the form names it."""

from __future__ import annotations

import pytest

from vapi import config, recipes
from vapi.cluster import form
from vapi.cluster.config import ClusterConfig

BASE = config.plain(recipes.recipe("digits"))


def test_a_filled_form_makes_a_configuration() -> None:
    made = form.resolve(
        BASE, {"tune_lr": 2e-6, "tune_steps": 7.0, "evaluate_seeds": [0.0, 1.0], "register_model_name": "mine", "tune_gpus": "8"}
    )
    assert (made.tune.lr, made.tune.steps, made.evaluate.seeds, made.register.model_name) == (2e-6, 7, [0, 1], "mine")
    assert recipes.changes(recipes.recipe("digits"), made).keys() == {"tune.lr", "tune.steps", "evaluate.seeds", "register.model_name"}


@pytest.mark.parametrize("overrides", [{"tune.temperature": 0.9}, {"tune": {"temperature": 0.9}}])
def test_overrides_reach_every_other_field(overrides: dict[str, object]) -> None:
    assert form.resolve(BASE, {"tune_lr": 2e-6, "overrides": overrides}).tune.temperature == 0.9


def test_a_mapping_is_replaced_whole() -> None:
    assert form.resolve(BASE, {"tune_rewards": {"l1": 1.0}}).tune.rewards == {"l1": 1.0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tune_lr": "quick"}, "tune_lr is 'quick'; it must be a float"),
        ({"tune_steps": 0}, "tune_steps is 0; it must be at least 1"),
        ({"tune_images_per_step": 8.5}, "tune_images_per_step is 8.5; it must be an int"),
        ({"subset_images": -1}, "subset_images is -1; give a number of images"),
        ({"evaluate_guidance": -1.0}, "evaluate_guidance is -1.0; 1.0 is none"),
        ({"evaluate_protocol": "adm"}, "evaluate_protocol is 'adm'; it must be one of"),
        ({"overrides": {"tune.temprature": 1}}, "tune has no field 'temprature'; did you mean 'temperature'?"),
        ({"overrides": {"tunes.temperature": 1}}, "overrides names 'tunes.temperature'; did you mean 'tune'?"),
        ({"overrides": {"tune.lr": 1}, "tune_lr": 1.0}, "overrides names tune.lr, which has a field of its own on the form: tune_lr"),
        ({"overrides": {"tune.temperature": -1}, "tune_lr": 1.0}, "tune.temperature is -1"),
        ({"overrides": "tune.lr"}, "overrides is 'tune.lr'; write {tune.temperature: 0.9}"),
    ],
)
def test_a_mistake_is_named_as_the_form_names_it(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        form.resolve(BASE, values)
    assert words in str(error.value)


@pytest.mark.parametrize("name", [*form.OTHERS, "tune_lr", "evaluate_images_per_batch"])
def test_every_field_has_a_default_and_a_sentence(name: str) -> None:
    cluster, recipe = ClusterConfig(), recipes.recipe("llamagen-xxl-c2i")
    for gpu in (True, False):
        assert form.default(name, recipe, cluster, gpu) is not None
    assert form.doc(name).endswith((".", ")"))


def test_fields_beside_the_configuration_do_not_shadow_it() -> None:
    assert not [name for name in form.OTHERS if name != "track_uri" and form.stands_for(name)]
