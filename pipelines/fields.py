"""Values for a form, from words: ``tune_lr=2e-6`` on a command line, checked against a package's fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vapi import config

KINDS = {
    **{"String": str, "Integer": int, "Float": float, "Boolean": bool, "List": list, "Dict": dict},
    **{"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": float, "BOOLEAN": bool, "LIST": list, "STRUCT": dict},
}
"""Types of a form's fields, as kfp calls them in a signature and in a compiled file."""


def parse(words: Iterable[str]) -> dict[str, Any]:
    """``["tune_lr=2e-6", "evaluate_seeds=[0, 1]"]`` as values. Raises ValueError for a word of another form."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"{word!r} is no field and value; write tune_lr=2e-6")
        found[name.replace("-", "_")] = value
    return found


def checked(pipeline: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the types of the package's fields. Raises ValueError that names the field."""
    fields = pipeline.component_spec.inputs
    made = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"the form has no field {name!r}; {config.nearest(name, fields)}; others go into overrides={{tune.temperature: 0.9}}"
            )
        made[name] = _converted(name, value, KINDS[fields[name].type])
    return made


def _converted(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, str) and kind in (list, dict):
        value = config.read_yaml(value)
    if kind in (list, dict):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}; it must be a {'list: [0, 1]' if kind is list else 'mapping: {name: value}'}")
        return value
    return config.convert(value, kind, name)
