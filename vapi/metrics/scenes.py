"""Two judges of the embedded scenes (``vapi/digits/scenes.py``), for GenEval's scoring. They share no code and no glyphs.

    classical    ink from ground by its chroma, connected parts, nearest palette colour, nearest glyph; no weights
    learned      a small network that marks the middles of digits, trained on renders that were damaged

Either brings its own thresholds, since GenEval's do not transfer: fixed on renders of validation glyphs (``threshold``
in ``vapi/digits/judges.py``) and frozen here. Neither is part of a reward.

Left out: objects that touch. The classical judge takes them for one, which is no digit.

N pictures, M objects, S side in pixels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn

from vapi.digits import paint, scenes
from vapi.digits.scenes import COLOURS, DIGITS
from vapi.images import to_float
from vapi.metrics.detections import Detections, Identity, Objects, Rules

# --- classical ---------------------------------------------------------------------------------

TEMPLATES = "metric"  # glyphs that no generator saw
INK = 45  # of chroma, the largest less the smallest of red, green, blue; grounds reach 16
SMALLEST = 12  # pixels
CANVAS = 18  # side of a crop
NEIGHBOURS = 3
POSES = (  # scale, angle, shear
    (1.53, 0.0, 0.0), (1.67, 0.0, 0.0), (1.6, -0.08, 0.0), (1.6, 0.08, 0.0), (1.6, 0.0, -0.08), (1.6, 0.0, 0.08), (1.6, -0.06, -0.06),
    (1.6, 0.06, 0.06),
)  # fmt: skip
SHARPNESS, RIDGE = 4.0, 1e-3  # of the kernel regression on the templates


class Classical:
    """Parts of the picture that are coloured, named after the glyph and the palette's colour that each is nearest to."""

    identity = Identity(name="classical", title="GenEval (scenes, classical judge)")
    rules = Rules(threshold=0.77, counting_threshold=0.77)
    classes: Sequence[str] = DIGITS
    colours: Sequence[str] = tuple(COLOURS)

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Score: how like its nearest glyphs a part is, times the share of it that has one colour."""
        parts = [_parts(picture) for picture in pictures]
        crops = np.array([_crop(picture, mask) for picture, masks in zip(pictures, parts, strict=True) for mask in masks])
        digits, likeness = _nearest(crops.reshape(-1, CANVAS * CANVAS))
        found: list[Detections] = []
        done = 0
        for picture, masks in zip(pictures, parts, strict=True):
            here = slice(done, done + len(masks))
            named = [_named(picture, mask) for mask in masks]
            boxes = [[*_box(mask), alike * share] for mask, alike, (_, share) in zip(masks, likeness[here], named, strict=True)]
            found.append(_by_class(digits[here], np.array(boxes), [colour for colour, _ in named], np.array(masks)))
            done += len(masks)
        return found

    def colour(self, picture: np.ndarray, objects: Objects) -> list[str]:
        return list(objects.colours)


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
    named = (np.exp(SHARPNESS * (alike - 1)) @ _weights()).argmax(axis=1)
    own = np.where(digits == named[:, None], alike, -1)
    return named, np.clip(np.partition(own, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:].mean(axis=1), 0, 1)


@functools.cache
def _weights() -> np.ndarray:
    """How much each template speaks for each digit (K, 10): kernel ridge regression on the templates' own digits."""
    templates, digits = _templates()
    kernel = np.exp(SHARPNESS * (templates @ templates.T - 1))
    return np.linalg.solve(kernel + RIDGE * np.eye(len(kernel)), np.eye(10)[digits])


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 with the ends beyond the last pixel."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# --- learned -----------------------------------------------------------------------------------

CELL = 4  # pixels
WIDTHS = (16, 24, 48)
FAINT = 0.1  # what is less sure to be a digit is not reported


class Marks(nn.Module):
    """Pictures (B, 3, S, S) in [-1, 1] to a grid of cells of 4 x 4 pixels: is the middle of a digit here, which digit, in which
    colour, and how far from the cell's middle its box reaches to the left, up, right and down."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        into = 3
        for width, stride in zip((WIDTHS[0], WIDTHS[1], WIDTHS[1], WIDTHS[2], WIDTHS[2], WIDTHS[2]), (1, 2, 1, 2, 1, 1), strict=True):
            layers += [nn.Conv2d(into, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            into = width
        self.body = nn.Sequential(*layers)
        self.here, self.digit = nn.Conv2d(into, 1, 1), nn.Conv2d(into, len(DIGITS), 1)
        self.colour, self.reach = nn.Conv2d(into, len(COLOURS), 1), nn.Conv2d(into, 4, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (B, h, w), (B, 10, h, w), (B, 6, h, w), and reaches in cells (B, 4, h, w)."""
        x = self.body(pictures)
        return self.here(x).squeeze(1), self.digit(x), self.colour(x), self.reach(x)


class Learned:
    """The cells of ``Marks`` that are surer than their neighbours. Score: that a digit's middle is there, times which it is."""

    classes: Sequence[str] = DIGITS
    colours: Sequence[str] = tuple(COLOURS)
    rules = Rules(threshold=0.46, counting_threshold=0.46)

    def __init__(self, network: Marks, digest: str = "") -> None:
        self.network = network.eval().requires_grad_(False)
        self.identity = Identity(name="learned", weights=digest, title="GenEval (scenes, learned judge)")

    @torch.no_grad()
    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        found: list[Detections] = []
        for start in range(0, len(pictures), 100):
            here, digit, colour, reach = self.network(to_float(np.stack(pictures[start : start + 100])))
            sure = here.sigmoid()
            peaks = (sure == F.max_pool2d(sure[:, None], 3, 1, 1)[:, 0]) & (sure > FAINT)
            for i in range(len(here)):
                rows, columns = (places.numpy() for places in peaks[i].nonzero(as_tuple=True))
                which = digit[i][:, rows, columns].softmax(dim=0).max(dim=0)
                score = (sure[i][rows, columns] * which.values).numpy()
                middle = np.stack([columns, rows, columns, rows], axis=1) + 0.5
                ends = CELL * (middle + reach[i][:, rows, columns].T.numpy() * [-1, -1, 1, 1])
                named = [self.colours[k] for k in colour[i][:, rows, columns].argmax(dim=0).tolist()]
                found.append(_by_class(which.indices.numpy(), np.concatenate([ends, score[:, None]], axis=1), named))
        return found

    def colour(self, picture: np.ndarray, objects: Objects) -> list[str]:
        return list(objects.colours)


def learned(path: Path | str) -> Learned:
    """The judge of these weights. Raises ValueError if they are not a judge's."""
    path = Path(path)
    network = Marks()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of the scenes' learned judge: {error}") from None
    return Learned(network, hashlib.sha256(path.read_bytes()).hexdigest())


# --- both --------------------------------------------------------------------------------------


def _by_class(digits: np.ndarray, boxes: np.ndarray, colours: Sequence[str], masks: np.ndarray | None = None) -> Detections:
    """Objects sorted into their classes: digits (M,), boxes (M, 5), masks (M, S, S)."""
    found = {}
    for digit in np.unique(digits).tolist():
        rows = np.flatnonzero(digits == digit).tolist()
        these = None if masks is None else masks[rows]
        found[DIGITS[digit]] = Objects(boxes[rows].astype(np.float32), these, colours=[colours[i] for i in rows])
    return found
