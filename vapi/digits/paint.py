"""Painting: a glyph, a place, a pose, an ink and a textured ground make an image of 32 x 32.

Everything follows from (seed, index) in float64, so that the images are the same bytes everywhere.
Glyphs are split at random, class by class, into disjoint sets: what trains a network is never what
measures it.

N images, S side in pixels.
"""

from __future__ import annotations

import functools

import numpy as np

SIDE = 32
GLYPHS = 1797
# Share of the glyphs of each class, in this order; the remainder goes to the last.
SPLITS = {"reward": 0.14, "metric": 0.20, "validation": 0.12, "reference": 0.14, "train": 0.40}
SMALL_POSE = 0.35
# Luminance of red, green, blue (Rec. 601), to keep ink and ground apart.
LUMA = np.array([0.299, 0.587, 0.114])


@functools.cache
def glyphs() -> tuple[np.ndarray, np.ndarray]:
    """All glyphs (1797, 8, 8) in [0, 1] and their labels."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return bundle.images / 16.0, bundle.target.astype(np.int64)


@functools.cache
def split(name: str) -> np.ndarray:
    """Indices of the glyphs of a split; stratified by class, disjoint from every other split."""
    _, labels = glyphs()
    order = np.argsort(np.random.default_rng(0).random(GLYPHS), kind="stable")
    picked: list[np.ndarray] = []
    for digit in range(10):
        members = order[labels[order] == digit]
        edges = np.round(np.cumsum(list(SPLITS.values())) * len(members)).astype(int)
        part = list(SPLITS).index(name)
        picked.append(members[edges[part - 1] if part else 0 : edges[part]])
    return np.sort(np.concatenate(picked))


def uniforms(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) for each image, from (seed, index) alone: (N, count)."""
    return np.stack([np.random.Generator(np.random.PCG64([seed, int(i)])).random(count) for i in indices])


def colour(u: np.ndarray) -> np.ndarray:
    """A colour (..., 3), neither black nor white."""
    return 0.05 + 0.9 * u


def ground(u: np.ndarray) -> np.ndarray:
    """Two colours, mixed by a smooth wave: u (N, 14) -> (N, S, S, 3) in [0, 1]."""
    first, second = colour(u[:, 0:3]), colour(u[:, 3:6])
    mix = np.clip(0.5 + 0.5 * waves(u[:, 6:], SIDE, slowest=0.4, strengths=(0.75, 0.35)), 0, 1)[..., None]
    return first[:, None, None] * (1 - mix) + second[:, None, None] * mix


def waves(u: np.ndarray, side: int, slowest: float, strengths: tuple[float, float]) -> np.ndarray:
    """A slow wave and a faster, fainter one across the picture: u (N, 8) -> (N, side, side)."""
    y, x = np.meshgrid(np.arange(side) / side, np.arange(side) / side, indexing="ij")
    field = np.zeros((len(u), side, side))
    for k, strength in enumerate(strengths):
        angle, phase, speed = (u[:, 4 * k + i, None, None] for i in range(3))
        frequency = (slowest + 2 * slowest * speed) * (1 + 1.5 * k)
        wave = np.cos(2 * np.pi * (frequency * (np.cos(2 * np.pi * angle) * x + np.sin(2 * np.pi * angle) * y) + phase))
        field += wave * strength
    return field


def masks(shapes: np.ndarray, u: np.ndarray, pose: float) -> np.ndarray:
    """Glyphs (N, 8, 8) posed by u (N, 5) -> ink coverage (N, S, S) in [0, 1]. ``pose`` scales how far
    they turn, shift, shear and grow from the middle of what is possible."""
    u = 0.5 + pose * (u - 0.5)
    angle, scale = (u[:, 0] - 0.5) * 0.5, 2.6 + 0.7 * u[:, 1]  # radians; pixels per glyph cell
    shear, dx, dy = (u[:, 2] - 0.5) * 0.3, (u[:, 3] - 0.5) * 5, (u[:, 4] - 0.5) * 5
    y, x = np.meshgrid(np.arange(SIDE) - 15.5, np.arange(SIDE) - 15.5, indexing="ij")
    x, y = x[None] - dx[:, None, None], y[None] - dy[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    gx = (cos * x + sin * y) / scale[:, None, None]
    gy = (-sin * x + cos * y) / scale[:, None, None]
    value = bilinear(np.pad(shapes, ((0, 0), (2, 2), (2, 2))), gy + 5.5, gx + shear[:, None, None] * gy + 5.5)
    edge = np.clip((value - 0.3) / 0.35, 0, 1)
    return edge * edge * (3 - 2 * edge)


def bilinear(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Read images (N, h, w) at fractional places (N, S, S)."""
    n, h, w = images.shape
    rows, columns = np.clip(rows, 0, h - 1.001), np.clip(columns, 0, w - 1.001)
    r, c = rows.astype(int), columns.astype(int)
    fr, fc = rows - r, columns - c
    i = np.arange(n)[:, None, None]
    top = images[i, r, c] * (1 - fc) + images[i, r, c + 1] * fc
    bottom = images[i, r + 1, c] * (1 - fc) + images[i, r + 1, c + 1] * fc
    return top * (1 - fr) + bottom * fr


def inks(u: np.ndarray, grounds: np.ndarray) -> np.ndarray:
    """A colour (N, 3) that stands out: light on a dark ground, dark on a light one. u (N, 3)."""
    light = (grounds.mean(axis=(1, 2)) @ LUMA < 0.5)[:, None]
    return np.where(light, 0.75 + 0.25 * u, 0.25 * u)


def paint(
    name: str, count: int, seed: int, first: int = 0, pose: float = SMALL_POSE, textured: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``first`` .. ``first + count`` of a split: uint8 (N, S, S, 3) and labels int64 (N,).

    Classes are balanced: image i shows class i mod 10. What a generator learns and is compared with keeps
    to small poses; tokenizer and feature networks learn from full ones (``pose`` 1). Without texture the
    ground has one colour, and of an image's entropy the class is a large share.
    """
    shapes, labels = glyphs()
    members = split(name)
    by_class = [members[labels[members] == digit] for digit in range(10)]
    indices = np.arange(first, first + count)
    u = uniforms(seed, indices, 24)
    chosen = np.array([by_class[i % 10][int(v * len(by_class[i % 10]))] for i, v in zip(indices, u[:, 23], strict=True)])
    base = ground(u[:, :14]) if textured else np.broadcast_to(colour(u[:, None, None, :3]), (count, SIDE, SIDE, 3))
    ink = inks(u[:, 14:17], base)[:, None, None]
    cover = masks(shapes[chosen], u[:, 17:22], pose)[..., None]
    image = base * (1 - cover) + ink * cover
    return np.floor(image * 255 + 0.5).astype(np.uint8), labels[chosen]
