"""What a detector of objects owes GenEval: where on a picture it sees which class, how surely, and in which colour.

The scoring (``geneval.py``) reads this and nothing else, so a detector may be a network, a classical one for the
embedded scenes, or a file that somebody else's environment wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vapi.config import nearest


@dataclass(frozen=True)
class Objects:
    """Objects of one class on one picture."""

    boxes: np.ndarray  # float (n, 5): x0, y0, x1, y1 in pixels (ends as the detector counts them), score in [0, 1]
    masks: np.ndarray | None = None  # bool (n, H, W)
    name: str = ""  # the class; the scoring fills it in, since a judge of colours may want to know ("a photo of a red bench")
    colours: Sequence[str] = ()  # one each, where a detector tells them along

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: slice | Sequence[int]) -> Objects:
        """Some of them, in the order given."""
        these = np.arange(len(self))[rows].tolist()
        masks = None if self.masks is None else self.masks[these]
        return Objects(self.boxes[these], masks, self.name, [self.colours[n] for n in these] if self.colours else ())


Detections = Mapping[str, Objects]  # by class name; a class that was not seen may be left out


@dataclass(frozen=True)
class Rules:
    """When an object counts, and where it lies: GenEval's, unless a detector brings its own (frozen on held-out pictures)."""

    threshold: float = 0.3  # a score must be above it
    counting_threshold: float = 0.9  # in its place for the task "counting"
    max_objects: int = 16  # of a class
    max_overlap: float = 1.0  # intersection over union at which the less sure of two goes; 1: none does
    position_margin: float = 0.1  # of both objects' sizes, which a distance must exceed


@dataclass(frozen=True)
class Identity:
    """What a result must say about its detector, since two detectors' numbers do not compare."""

    name: str
    weights: str = ""  # sha256, or empty where there are none
    title: str = "GenEval"  # what its numbers may be called
    licence: str = ""  # of the weights
    more: Mapping[str, str] = field(default_factory=dict)


class Detector(Protocol):
    """Pictures in, objects out."""

    @property
    def identity(self) -> Identity: ...

    @property
    def rules(self) -> Rules: ...

    @property
    def classes(self) -> Sequence[str]:
        """Names that prompts may use."""

    @property
    def colours(self) -> Sequence[str]: ...

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """uint8 (H, W, 3) each, to what is on it."""

    def colour(self, picture: np.ndarray, objects: Objects) -> list[str]:
        """The colour of each of these objects of one class, a name in ``colours``."""


def hint(name: str, known: Sequence[str]) -> str:
    """For an error about a class or colour: the known name that holds this one ("computer mouse" for "mouse"), else the nearest."""
    longer = [one for one in known if name and name in one]
    return f"did you mean {longer[0]!r}?" if longer else nearest(name, known)
