"""Two judges of the embedded scenes (``vapi/digits/scenes.py``), for GenEval's scoring. They share no code and no glyphs.

    classical    ink from ground by its chroma, connected parts, nearest palette colour, nearest glyph; no weights
    learned      a small network that marks the middles of digits, trained on renders that were damaged

Either brings its own thresholds, since GenEval's do not transfer: fixed on renders of validation glyphs (``thresholds``
in ``vapi/digits/judges.py``) and frozen here. Neither is part of a reward.

Left out: objects that touch. The classical judge takes them for one, which is no digit.

N pictures, M objects, S side in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from vapi.digits import paint, scenes
from vapi.digits.scenes import COLOURS, DIGITS
from vapi.metrics.detections import Detections, Identity, Objects, Rules

# --- classical ---------------------------------------------------------------------------------

TEMPLATES = "metric"  # glyphs that no generator saw
INK = 45  # of chroma, the largest less the smallest of red, green, blue; grounds reach 16
SMALLEST = 12  # pixels
CANVAS = 18  # side of a crop
NEIGHBOURS = 3
POSES = [
    (1.53, 0.0, 0.0),
    (1.67, 0.0, 0.0),
    (1.6, -0.08, 0.0),
    (1.6, 0.08, 0.0),
    (1.6, 0.0, -0.08),
    (1.6, 0.0, 0.08),
    (1.6, -0.06, -0.06),
    (1.6, 0.06, 0.06),
]


class Classical:
    """Parts of the picture that are coloured, named after the glyph and the palette's colour that each is nearest to."""

    identity = Identity(name="classical", title="GenEval (scenes, classical judge)")
    rules = Rules(threshold=0.0, counting_threshold=0.0)
    classes = DIGITS
    colours = tuple(COLOURS)

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Score: how like its nearest glyphs a part is, times the share of it that has one colour."""
        parts = [_parts(picture) for picture in pictures]
        crops = np.array([_crop(picture, mask) for picture, masks in zip(pictures, parts, strict=True) for mask in masks])
        digits, likeness = _nearest(crops.reshape(-1, CANVAS * CANVAS))
        found: list[Detections] = []
        done = 0
        for picture, masks in zip(pictures, parts, strict=True):
            here = slice(done, done + len(masks))
            scores = likeness[here] * np.array([_named(picture, mask)[1] for mask in masks])
            found.append(_by_class(masks, digits[here], scores))
            done += len(masks)
        return found

    def colour(self, picture: np.ndarray, objects: Objects) -> list[str]:
        assert objects.masks is not None
        return [_named(picture, mask)[0] for mask in objects.masks]


@functools.cache
def classical() -> Classical:
    return Classical()


def chroma(picture: np.ndarray) -> np.ndarray:
    """(S, S): how far from grey each pixel of uint8 (S, S, 3) is, 0 .. 255."""
    pixels = picture.astype(np.int16)
    return pixels.max(axis=-1) - pixels.min(axis=-1)


def _parts(picture: np.ndarray) -> list[np.ndarray]:
    """Masks bool (S, S) of connected ink."""
    labelled, count = ndimage.label(chroma(picture) > INK, np.ones((3, 3)))
    masks = [labelled == i + 1 for i in range(count)]
    return [mask for mask in masks if mask.sum() >= SMALLEST]


def _named(picture: np.ndarray, mask: np.ndarray) -> tuple[str, float]:
    """The palette's colour that most of a part's well-coloured pixels are nearest to, by direction from grey, and their share."""
    strength = np.where(mask, chroma(picture), 0)
    pixels = _from_grey(picture[strength > 0.6 * strength.max()].astype(float))
    votes = np.bincount((pixels @ _from_grey(np.array(list(COLOURS.values()), float)).T).argmax(axis=1), minlength=len(COLOURS))
    return list(COLOURS)[int(votes.argmax())], float(votes.max() / votes.sum())


def _from_grey(pixels: np.ndarray) -> np.ndarray:
    """Unit vectors (M, 3) without the grey part."""
    pixels = pixels - pixels.mean(axis=1, keepdims=True)
    return pixels / np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-9)


def _crop(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A part's ink in [0, 1], with its centre of mass in the middle: (CANVAS, CANVAS)."""
    strength = np.where(ndimage.binary_dilation(mask, np.ones((3, 3))), chroma(picture), 0).astype(float)
    return _centred(np.clip(strength / np.percentile(strength[mask], 80), 0, 1))


def _centred(ink: np.ndarray) -> np.ndarray:
    middle = np.array(ndimage.center_of_mass(ink)) - (CANVAS - 1) / 2
    return ndimage.shift(ink, -middle, order=1)[:CANVAS, :CANVAS]


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Unit rows (K, CANVAS * CANVAS) of the judge's glyphs in nine poses, and their digits (K,)."""
    _, digits = paint.glyphs()
    placed = [
        scenes.Placed(int(digits[glyph]), "red", int(glyph), 19.5, 19.5, scale, angle, shear, (0, 0, 0))
        for glyph in paint.split(TEMPLATES)
        for scale, angle, shear in POSES
    ]
    crops = np.array([_centred(ink) for ink in scenes.coverage(placed)])
    return _unit(crops.reshape(len(crops), -1)), np.array([glyph.digit for glyph in placed])


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _nearest(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits (M,) of crops (M, CANVAS * CANVAS), and mean correlation in [0, 1] with the nearest templates of that digit."""
    templates, digits = _templates()
    if not len(crops):
        return np.zeros(0, int), np.zeros(0)
    alike = _unit(crops) @ templates.T
    by_digit = [np.partition(alike[:, digits == digit], -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:].mean(axis=1) for digit in range(10)]
    likeness = np.stack(by_digit, axis=1)  # (M, 10)
    return likeness.argmax(axis=1), np.clip(likeness.max(axis=1), 0, 1)


def _by_class(masks: Sequence[np.ndarray], digits: np.ndarray, scores: np.ndarray) -> Detections:
    found = {}
    for digit in np.unique(digits):
        here = np.flatnonzero(digits == digit)
        here = here[np.argsort(-scores[here], kind="stable")]
        boxes = np.array([[*_box(masks[i]), scores[i]] for i in here])
        found[DIGITS[digit]] = Objects(boxes, np.array([masks[i] for i in here]))
    return found


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 with the ends beyond the last pixel."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
