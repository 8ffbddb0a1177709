"""components/<name>/README.md, made from a component's signature and its documentation; a test keeps them fresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docstring_parser

from components.branches.component import branches
from components.collect.component import collect
from components.evaluate.component import evaluate
from components.expand.component import expand
from components.preflight.component import preflight
from components.register.component import register
from components.subset.component import subset
from components.tokens.component import tokens
from components.trainjob.component import trainjob
from components.tune.component import tune
from components.verdict.component import verdict
from vapi.cluster import form

COMPONENTS: dict[str, Any] = {
    "preflight": preflight,
    "subset": subset,
    "tokens": tokens,
    "tune": tune,
    "trainjob": trainjob,
    "evaluate": evaluate,
    "register": register,
    "expand": expand,
    "branches": branches,
    "collect": collect,
    "verdict": verdict,
}
KINDS = {"String": "text", "Integer": "integer", "Float": "number", "Boolean": "true or false", "List": "list", "Dict": "mapping"}
HEAD = "What goes in and comes out, from [component.py](component.py)'s signature (`python -m pipelines compile` writes this page)."


def text(name: str) -> str:
    """The page of a component."""
    spec, documented = COMPONENTS[name].component_spec, docstring_parser.parse(COMPONENTS[name].python_func.__doc__)
    docs = {one.arg_name: " ".join((one.description or "").split()) for one in documented.params}
    if documented.returns:
        docs["Output"] = " ".join((documented.returns.description or "").split())
    lines = [f"# {name}", "", (spec.description or "").strip(), "", HEAD, ""]
    lines += _table("input", {field: (one.type, docs.get(field) or form.doc(field)) for field, one in spec.inputs.items()})
    if spec.outputs:
        rows = {field: (one.type, docs.get(field) or f"The plan of the stage {field}.") for field, one in spec.outputs.items()}
        lines += ["", *_table("output", rows)]
    return "\n".join(lines) + "\n"


def _table(head: str, rows: dict[str, tuple[str, str]]) -> list[str]:
    lines = [f"| {head} | type | |", "|---|---|---|"]
    return [*lines, *(f"| `{name}` | {_kind(kind)} | {doc.replace('|', '/')} |" for name, (kind, doc) in rows.items())]


def _kind(kind: str) -> str:
    return KINDS.get(kind) or kind.removeprefix("system.").partition("@")[0]


def files(folder: Path) -> dict[Path, str]:
    """Every page by its place below components/."""
    return {folder / name / "README.md": text(name) for name in COMPONENTS}
