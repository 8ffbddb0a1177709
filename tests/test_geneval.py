"""GenEval: the official function's answers, every rule's place in them, statistics, folders of pictures and what is wrong with them."""

from __future__ import annotations

import functools
import gzip
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vapi.metrics import geneval as metric
from vapi.metrics.detections import Objects, Rules

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "geneval.json.gz"


# --- the official function ---------------------------------------------------------------------


@functools.cache
def golden() -> list[dict[str, Any]]:
    """Made by tests/golden/make_geneval.py: prompts and detections with the official outcome."""
    cases: list[dict[str, Any]] = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return cases


def seen(case: dict[str, Any]) -> dict[str, Objects]:
    return {
        name: Objects(np.array(rows, np.float32).reshape(-1, 5), colours=case["colours"][name]) for name, rows in case["objects"].items()
    }


def colours(objects: Objects) -> Sequence[str]:
    return list(objects.colours)


def differing(module: ModuleType) -> list[int]:
    """Cases in which a scoring does not come to the official outcome."""
    wrong = []
    for number, case in enumerate(golden()):
        prompt = module.parse_prompt(json.dumps(case["metadata"]), f"case {number}")
        objects = seen(case)
        found = module.score(prompt, objects, Rules(**case["rules"]), colours)
        details = {name: objects[name].boxes[rows].tolist() for name, rows in case["kept"].items()}
        if (found.correct, found.reasons, found.details) != (case["correct"], case["reasons"], details):
            wrong.append(number)
    return wrong


def test_scoring_equals_the_official_function() -> None:
    assert len(golden()) >= 300 and not differing(metric)
    tags = {case["metadata"]["tag"]: set() for case in golden()}
    for case in golden():
        tags[case["metadata"]["tag"]].add(case["correct"])
    assert tags == {tag: {True, False} for tag in metric.TASKS}


MUTANTS = {
    "a score at the threshold counts": ("scores[order] > threshold", "scores[order] >= threshold"),
    "counting has no threshold of its own": (
        'rules.counting_threshold if prompt.tag == "counting" else rules.threshold',
        "rules.threshold",
    ),
    "the limit of objects is 3": ("[: rules.max_objects]", "[:3]"),
    "objects without limit": ("[: rules.max_objects]", ""),
    "the least sure come first": ("[::-1]", ""),
    "overlapping objects stay": ("if rules.max_overlap == 1:", "if True:"),
    "overlap without the last pixel": (
        "box[2] - box[0] + 1, 0) * np.maximum(box[3] - box[1] + 1",
        "box[2] - box[0], 0) * np.maximum(box[3] - box[1]",
    ),
    "an overlap at the limit stays": ("< rules.max_overlap]", "<= rules.max_overlap]"),
    "colours of all objects": (
        "complaint = _complaint(clause, found,",
        "complaint = _complaint(clause, kept.get(clause.name, NOTHING) if clause.colour else found,",
    ),
    "one object of the colour is enough": ('    if count >= clause.count:\n        return ""', '    if count:\n        return ""'),
    "position after a failed colour": ("if clause.relation and not complaint:", "if clause.relation:"),
    "position of a target that failed": ("groups.append(NOTHING if complaint else found)", "groups.append(found)"),
    "the first object's position decides": ("for box in found.boxes:", "for box in found.boxes[:1]:"),
    "the first target decides": ("for other in target.boxes:", "for other in target.boxes[:1]:"),
    "another margin": ("np.abs(offset) - margin *", "np.abs(offset) - margin / 2 *"),
    "the margin of one object": ("(sizes[0] + sizes[1])", "sizes[0]"),
    "position over the distance beyond the margin": ("beyond / np.linalg.norm(offset)", "beyond / np.linalg.norm(beyond)"),
    "diagonals have one relation": ('"left of": x < -0.5', '"left of": x < -0.71'),
    "y upwards": ('"above": y < -0.5, "below": y > 0.5', '"above": y > 0.5, "below": y < -0.5'),
    "one too many is fine": (
        "        if count >= clause.count:\n            reasons",
        "        if count > clause.count:\n            reasons",
    ),
    "nothing is one too many": ("for clause in prompt.exclude:", "for clause in ():"),
    "one demand is enough": ("Outcome(not reasons,", "Outcome(len(reasons) < len(prompt.include),"),
}


def mutant(old: str, new: str) -> ModuleType:
    source = inspect.getsource(metric)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the scoring"
    module = ModuleType("mutant")
    sys.modules["mutant"] = module  # where dataclasses look for annotations
    try:
        exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    finally:
        del sys.modules["mutant"]
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_every_rule_shows_in_the_golden_cases(name: str) -> None:
    assert differing(mutant(*MUTANTS[name])), "no case would notice"
