"""Detections that were made elsewhere, from a file of JSON lines: GenEval's own environment can write one.

    {"detector": {"name": "mmdet 2.28", "weights": "<sha256>"}}                               optional, the first line
    {"filename": "00000/samples/0000.png", "objects": {"bench": [[x0, y0, x1, y1, score]]}, "colours": {"bench": ["red"]}}

One line a picture, named by the last three parts of its path. ``objects`` holds every box whose score is above GenEval's
thresholds (more do no harm); ``colours`` one name for each of them, of those classes whose colour a prompt asks for.
``detector`` may name "classes" and "colours" too, where they are not GenEval's.

Nobody here has seen the network, so the scores are called "GenEval (detections from a file)".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vapi.config import nearest
from vapi.metrics.detections import Detections, Identity, Objects, Rules, hint

TITLE = "GenEval (detections from a file)"


@dataclass(frozen=True)
class Recorded:
    """What a detector that is not here saw on pictures of certain names."""

    identity: Identity
    classes: Sequence[str]
    colours: Sequence[str]
    seen: Mapping[str, Detections]
    rules: Rules = Rules()

    def of(self, name: str) -> Detections:
        """What is on the picture of this name (``picture_name``). Raises ValueError where nothing was recorded."""
        if name not in self.seen:
            raise ValueError(f"{self.identity.name} has no line for {name}; {nearest(name, list(self.seen)[:1000])}")
        return self.seen[name]

    def colour(self, picture: np.ndarray, objects: Objects) -> list[str]:
        """The recorded colours. Raises ValueError where none were."""
        if len(objects.colours) != len(objects):
            raise ValueError(f"{self.identity.name} has no colours of a {objects.name} whose prompt asks for one; record them, too")
        return list(objects.colours)


def picture_name(path: str | Path) -> str:
    """``00000/samples/0000.png`` of any path that ends so."""
    return "/".join(PurePosixPath(path).parts[-3:])


def read(path: str | Path, sha256: str, classes: Sequence[str], colours: Sequence[str]) -> Recorded:
    """A file's detections; ``sha256``: of the file. Raises ValueError that names the line for whatever cannot be used."""
    path = Path(path)
    seen: dict[str, Detections] = {}
    told: dict[str, Any] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise ValueError("it is no mapping")
                if number == 1 and "detector" in values:
                    told = values["detector"]
                    classes, colours = told.get("classes", classes), told.get("colours", colours)
                    continue
                name, detections = _line(values, classes, colours)
            except (ValueError, AttributeError) as error:  # JSONDecodeError is a ValueError
                raise ValueError(f"{path} line {number} is no picture's detections: {error}") from None
            if name in seen:
                raise ValueError(f"{path} line {number}: {name} has a line already")
            seen[name] = detections
    if not seen:
        raise ValueError(f"{path} holds no detections; one line a picture is expected")
    more = {"network's weights": str(told["weights"])} if "weights" in told else {}
    return Recorded(Identity(str(told.get("name", path.name)), sha256, TITLE, more=more), tuple(classes), tuple(colours), seen)


def _line(values: dict[str, Any], classes: Sequence[str], colours: Sequence[str]) -> tuple[str, Detections]:
    for name in ("filename", "objects"):
        if name not in values:
            raise ValueError(f"it lacks {name}")
    told, said = values["objects"], values.get("colours", {})
    if not isinstance(told, dict) or not isinstance(said, dict):
        raise ValueError("objects and colours are mappings by class")
    for name in {**told, **said}:
        if name not in classes:
            raise ValueError(f"class {name!r} is unknown; {hint(name, classes)}")
    return picture_name(values["filename"]), {name: _objects(name, rows, said.get(name, []), colours) for name, rows in told.items()}


def _objects(name: str, rows: Any, said: Any, colours: Sequence[str]) -> Objects:
    try:
        boxes = np.array(rows, np.float32).reshape(-1, 5)  # the type that the official evaluation computes in
    except (ValueError, TypeError):
        raise ValueError(f"the boxes of {name} are not rows of x0, y0, x1, y1, score") from None
    if not np.isfinite(boxes).all():
        raise ValueError(f"a box of {name} is not finite")
    if said and len(said) != len(boxes):
        raise ValueError(f"{name} has {len(boxes)} boxes and {len(said)} colours")
    for colour in said:
        if colour not in colours:
            raise ValueError(f"colour {colour!r} of {name} is unknown; {hint(str(colour), colours)}")
    return Objects(boxes, colours=tuple(said))
