"""Named points in the configuration space: one row each, as what differs from the defaults.

``config.py`` holds the defaults, and they are the recipe ``digits``. A row says in a line what it is
for, what to expect of it (a number that somebody measured, and where), and which fields differ. A new
base model, data set or ablation is a new row here and nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapi import config
from vapi.config import Config


@dataclass(frozen=True)
class Recipe:
    """One row: what it is, what to expect, and ``{"section.field": value}`` where it leaves the defaults."""

    doc: str
    expect: str
    changes: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "digits": Recipe(
        "VA-pi on painted handwritten digits, everything embedded, minutes on a CPU.",
        "the table that opens the README",
    ),
    "digits-prior-alone": Recipe(
        "Control: the same steps on the cross-entropy prior, without any reward.",
        "FID 0.92 to 1.00 (docs/embedded-world.md); the paper, table 4: 14.36 to 14.17",
        {"tune.policy_weight": 0.0},
    ),
    "digits-reward-alone": Recipe(
        "Control: the same steps on the reward, without the prior that holds the model.",
        "FID 0.92 to 1.04 (docs/embedded-world.md); the paper, table 4: 14.36 to 38.63",
        {"tune.prior_weight": 0.0},
    ),
}


def recipe(name: str) -> Config:
    """The configuration of a recipe. Raises ValueError that names the nearest known one."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; {config.nearest(name, RECIPES)}")
    changes: dict[str, dict[str, Any]] = {}
    for dotted, value in RECIPES[name].changes.items():
        section, _, knob = dotted.partition(".")
        changes.setdefault(section, {})[knob] = value
    defaults = Config()
    sections = {section: dataclasses.replace(getattr(defaults, section), **knobs) for section, knobs in changes.items()}
    return dataclasses.replace(defaults, **sections)


def text(name: str) -> str:
    """The recipe as the text of a complete ``params.yaml``."""
    made = recipe(name)
    return f"# Made by `vapi recipe {name} --write`: {RECIPES[name].doc}\n\n{config.dump(made)}"


def changes(ours: Config, theirs: Config | dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations differ: ``{"tune.lr": (ours, theirs)}``; a name that one lacks is None.
    ``theirs`` may be plain values that no longer, or not yet, make a configuration."""
    left, right = config.flat(ours), config.flat(theirs)
    return {name: (left.get(name), right.get(name)) for name in [*left, *(right.keys() - left)] if left.get(name) != right.get(name)}


def closest(values: Config | dict[str, Any]) -> str:
    """The recipe that differs from a configuration in the fewest fields."""
    return min(RECIPES, key=lambda name: len(changes(recipe(name), values)))


def write(name: str, path: Path = config.PARAMS, force: bool = False) -> None:
    """Write a recipe to ``params.yaml``, whole or not at all.

    Raises ValueError when the file there is no recipe as written: somebody's edits would be lost.
    """
    made = text(name)
    if path.exists() and not force and path.read_text() not in {text(known) for known in RECIPES}:
        raise ValueError(f"{path} has edits that would be lost (see: vapi recipe diff); keep a copy, then add --force")
    config.write_text(path, made)
