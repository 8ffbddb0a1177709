"""Scenes: one to four coloured digits on a grey textured ground, and GenEval's six tasks about them.

A prompt says what must be there, a layout makes places, poses and glyphs of it, and a picture of 40 x 40 follows: from
(seed, index) alone, in float64, so that the pictures are the same bytes everywhere. A picture fits its caption exactly:
nothing is on it that the prompt does not name, objects are whole and never touch.

What is learned from shares neither glyphs (``paint.split``) nor combinations of what is asked for with what is measured:
training, validation and test each have their own pairs of classes, counts of a class, colours of a class and relations.
``single_object`` has ten of them, which all three ask for. Six pairs of colour and digit are painted nowhere but where a
test prompt asks for them. Glyphs that their own class does not claim clearly are left out (three in ten).

Left out: objects that hide each other, and scenes with more on them than the prompt says.

N pictures, S side in pixels.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vapi.digits import paint

SIDE = 40
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
COLOURS = {
    "red": (225, 35, 45),
    "orange": (245, 135, 20),
    "yellow": (240, 225, 40),
    "green": (40, 185, 65),
    "blue": (60, 100, 245),
    "purple": (180, 60, 215),
}
OPENINGS = (
    "a photo of", "a picture of", "an image of", "a drawing of", "a painting of", "a sketch of", "a scan of", "a print of",
    "a snapshot of", "a view of", "a poster of", "a postcard of",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# (colour, digit) that no picture shows but those of test prompts that ask for it.
UNSEEN = {("red", 2), ("orange", 7), ("yellow", 5), ("green", 9), ("blue", 0), ("purple", 4)}
# Share of a task's combinations; the remainder is for training.
SHARES = {"test": 0.3, "validation": 0.1}
NUMBERS = ("zero", "one", "two", "three", "four")
MARGIN = 0.052  # of correlation, by which a glyph must be more like its own class than like any other


@dataclass(frozen=True)
class Thing:
    """What a prompt asks for: so many of a digit, in a colour or in any."""

    digit: int
    colour: str = ""
    count: int = 1

    @property
    def words(self) -> str:
        if self.count > 1:
            return f"{NUMBERS[self.count]} {PLURALS[self.digit]}"
        name = f"{self.colour} {DIGITS[self.digit]}".strip()
        return f"{'an' if name[0] in 'aeiou' and not name.startswith('one') else 'a'} {name}"


@dataclass(frozen=True)
class Prompt:
    """A task, what it asks for, and how the caption begins."""

    task: str
    things: tuple[Thing, ...]  # for position: first the one that the caption names first
    relation: str = ""
    opening: int = 0

    @property
    def text(self) -> str:
        between = f" {self.relation} " if self.relation else " and "
        return f"{OPENINGS[self.opening]} {between.join(thing.words for thing in self.things)}"

    @property
    def unseen(self) -> bool:
        """Whether it asks for a colour of a digit that no training picture shows."""
        return any((thing.colour, thing.digit) in UNSEEN for thing in self.things)

    def metadata(self) -> dict[str, Any]:
        """As GenEval's files have it. Of a position, the second thing comes first: the one that the other is placed by."""
        things = self.things[::-1] if self.relation else self.things
        include: list[dict[str, Any]] = []
        for thing in things:
            include.append({"class": DIGITS[thing.digit], "count": thing.count} | ({"color": thing.colour} if thing.colour else {}))
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        row: dict[str, Any] = {"tag": self.task, "include": include}
        if self.task == "counting":
            row["exclude"] = [{"class": DIGITS[thing.digit], "count": thing.count + 1} for thing in self.things]
        return row | {"prompt": self.text} | ({"unseen": True} if self.unseen else {})


# --- prompts -----------------------------------------------------------------------------------


@functools.cache
def combinations(task: str, name: str) -> tuple[Prompt, ...]:
    """What ``name`` (train, validation or test) may ask for in a task, in a fixed random order, with the first opening."""
    families = _families(task)
    order = np.argsort(np.random.default_rng([7, TASKS.index(task)]).random(len(families)), kind="stable").tolist()
    if task == "counting":  # every count in the same proportion
        order = sorted(order, key=lambda i: families[i][0].things[0].count)
        order = [order[10 * count + i] for i in range(10) for count in range(3)]
    unseen = [family for family in families if family[0].unseen]
    ordered = [families[i] for i in order if not families[i][0].unseen]
    if task == "single_object":
        chosen = ordered
    else:
        test, validation = (round(share * len(ordered)) for share in SHARES.values())
        parts = {"test": ordered[:test], "validation": ordered[test : test + validation], "train": ordered[test + validation :]}
        chosen = parts[name]
        if name == "test" and unseen:  # one in five of what is asked for
            picked = [unseen[i] for i in np.argsort(np.random.default_rng(8).random(len(unseen)), kind="stable")]
            few = itertools.islice(picked, len(chosen) // 4)
            chosen = _interleaved(chosen, list(few))
    return tuple(itertools.chain.from_iterable(itertools.zip_longest(*chosen))) if task == "two_object" else tuple(f[0] for f in chosen)


def _families(task: str) -> list[tuple[Prompt, ...]]:
    """All combinations of a task; those that say the same in another order stand together."""
    pairs = list(itertools.permutations(range(10), 2))
    if task == "single_object":
        return [(Prompt(task, (Thing(digit),)),) for digit in range(10)]
    if task == "two_object":
        return [tuple(Prompt(task, (Thing(first), Thing(second))) for first, second in ((a, b), (b, a))) for a, b in pairs if a < b]
    if task == "counting":
        return [(Prompt(task, (Thing(digit, count=count),)),) for digit in range(10) for count in (2, 3, 4)]
    if task == "colors":
        return [(Prompt(task, (Thing(digit, colour),)),) for digit in range(10) for colour in COLOURS]
    if task == "position":
        return [(Prompt(task, (Thing(a), Thing(b)), relation),) for a, b in pairs for relation in RELATIONS]
    painted = list(itertools.permutations(COLOURS, 2))
    return [(Prompt(task, (Thing(a, one), Thing(b, other))),) for a, b in pairs for one, other in painted]


def _interleaved(many: list[Any], few: list[Any]) -> list[Any]:
    """One of the few after every four of the many."""
    rows = itertools.zip_longest(*(many[i::4] for i in range(4)), few)
    return [item for row in rows for item in row if item is not None]


def prompts(name: str, per_task: int) -> list[Prompt]:
    """The first ``per_task`` prompts of every task, all different: the combinations, then again with the next opening.

    Raises ValueError if there are fewer."""
    found = []
    for task in TASKS:
        known = combinations(task, name)
        if per_task > len(known) * len(OPENINGS):
            raise ValueError(f"{task} has {len(known) * len(OPENINGS)} prompts, not {per_task}")
        # every combination begins elsewhere, so that few prompts know all openings where there are few combinations
        found += [_opened(known[i % len(known)], i // len(known)) for i in range(per_task)]
    return found


def _opened(prompt: Prompt, opening: int) -> Prompt:
    return Prompt(prompt.task, prompt.things, prompt.relation, opening)


def captions(name: str, count: int, seed: int) -> list[Prompt]:
    """Prompts for pictures to learn from: tasks in turn, combinations and openings at random, from (seed, index)."""
    u = paint.uniforms(seed + 10**6, np.arange(count), 2)  # other numbers than the layout's
    known = [combinations(task, name) for task in TASKS]
    chosen = [known[i % len(TASKS)] for i in range(count)]
    return [_opened(c[int(a * len(c))], int(b * len(OPENINGS))) for c, (a, b) in zip(chosen, u, strict=True)]


def jsonl(asked: Sequence[Prompt]) -> str:
    """GenEval's metadata, one prompt a line."""
    return "".join(json.dumps(prompt.metadata()) + "\n" for prompt in asked)


# --- layouts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A glyph on the picture."""

    digit: int
    colour: str
    glyph: int  # its place in paint.glyphs()
    x: float  # centre, in pixels
    y: float
    scale: float  # pixels per glyph cell
    angle: float  # radians
    shear: float
    ink: tuple[int, int, int]


@functools.cache
def legible() -> np.ndarray:
    """Which glyphs (1797,), as they are painted, their own class claims clearly: upright and turned to either side, the three of
    it that are most alike are more so, by ``MARGIN``, than those of any other class. Sums of whole numbers, so that every
    machine says the same."""
    _, labels = paint.glyphs()
    upright = _whole_pixels(0.0)
    margins = []
    for angle in (-0.1, 0.0, 0.1):
        alike = _whole_pixels(angle) @ upright.T / np.sqrt((upright * upright).sum(axis=1))
        np.fill_diagonal(alike, -np.inf)  # not with itself
        same = labels[:, None] == labels
        own, other = (np.sort(np.where(mask, alike, -np.inf), axis=1)[:, -3:].sum(axis=1) / 3 for mask in (same, ~same))
        margins.append((own - other) / np.sqrt((_whole_pixels(angle) ** 2).sum(axis=1)))
    return np.min(margins, axis=0) > MARGIN


def _whole_pixels(angle: float) -> np.ndarray:
    """Every glyph as it is painted, less its mean: whole numbers (1797, 576)."""
    images, _ = paint.glyphs()
    cover = coverage([Placed(0, "", glyph, 19.5, 19.5, 1.6, angle, 0.0, (0, 0, 0)) for glyph in range(len(images))])
    pixels = np.floor(255 * cover[:, 8:-8, 8:-8] + 0.5).reshape(len(images), -1)
    return pixels * pixels.shape[1] - pixels.sum(axis=1, keepdims=True)


@functools.cache
def glyphs(name: str) -> tuple[np.ndarray, ...]:
    """The legible glyphs of a split, by digit, as places in ``paint.glyphs()``."""
    _, labels = paint.glyphs()
    members = paint.split(name)
    members = members[legible()[members]]
    return tuple(members[labels[members] == digit] for digit in range(10))


UNIFORMS = 14 + 5 + 4 * 11  # ground, arrangement, four glyphs (each with one to spare)


def layout(prompt: Prompt, name: str, u: np.ndarray, pose: float = 1.0, any_colour: bool = False) -> list[Placed]:
    """Place what a prompt asks for, with glyphs of a split, by u (UNIFORMS,). ``pose`` scales how far they turn, shear and grow;
    where the prompt names no colour, ``any_colour`` allows those that are not to be seen."""
    wanted = [Thing(thing.digit, thing.colour) for thing in prompt.things for _ in range(thing.count)]
    centres = _centres(len(wanted), prompt.relation, u[14:19])
    placed = []
    for thing, (x, y), v in zip(wanted, centres, u[19:].reshape(4, 11), strict=False):
        members = glyphs(name)[thing.digit]
        free = [colour for colour in COLOURS if any_colour or (colour, thing.digit) not in UNSEEN]
        colour = thing.colour or free[int(v[0] * len(free))]
        red, green, blue = (int(np.clip(c + int(25 * j) - 12, 0, 255)) for c, j in zip(COLOURS[colour], v[1:4], strict=True))
        glyph, (grow, turn, slant) = int(members[int(v[4] * len(members))]), pose * (v[5:8] - 0.5)
        place = {"x": x + 1.4 * (v[8] - 0.5), "y": y + 1.4 * (v[9] - 0.5)}
        placed.append(
            Placed(thing.digit, colour, glyph, **place, scale=1.6 + 0.2 * grow, angle=0.2 * turn, shear=0.2 * slant, ink=(red, green, blue))
        )
    return placed


LOW, HIGH = 10.0, 29.0  # where two glyphs are side by side


def _centres(count: int, relation: str, u: np.ndarray) -> list[tuple[float, float]]:
    """Places of so many glyphs: one anywhere; two side by side or one above the other; more in quarters."""
    if count == 1:
        return [(LOW + u[0] * (HIGH - LOW), LOW + u[1] * (HIGH - LOW))]
    if count > 2:
        quarters = [(LOW, LOW), (HIGH, LOW), (LOW, HIGH), (HIGH, HIGH)]
        return [quarters[i] for i in np.argsort(u[:4], kind="stable")[:count]]
    across = relation in ("left of", "right of") if relation else u[0] < 0.5
    first_is_low = relation in ("left of", "above") if relation else u[1] < 0.5
    along = (LOW, HIGH) if first_is_low else (HIGH, LOW)
    other = [LOW + u[2] * (HIGH - LOW) + 4 * (v - 0.5) for v in u[3:5]]
    other = [min(max(place, LOW), HIGH) for place in other]
    both = list(zip(along, other, strict=True))
    return both if across else [(y, x) for x, y in both]


# --- pictures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Painted scenes and what is on them."""

    images: np.ndarray  # uint8 (N, S, S, 3)
    prompts: list[Prompt]
    layouts: list[list[Placed]]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def captions(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]


def paint_prompts(
    asked: Sequence[Prompt], name: str, seed: int, textured: bool = True, pose: float = 1.0, any_colour: bool = False
) -> Pictures:
    """One picture for each prompt, with glyphs of a split; picture i follows from its prompt and (seed, i) alone.

    Without texture every ground is the same grey, and of a picture's entropy the digits are a larger share."""
    images = np.empty((len(asked), SIDE, SIDE, 3), np.uint8)
    layouts: list[list[Placed]] = []
    for start in range(0, len(asked), 500):
        some = asked[start : start + 500]
        u = paint.uniforms(seed, np.arange(start, start + len(some)), UNIFORMS)
        placed = [layout(prompt, name, row, pose, any_colour) for prompt, row in zip(some, u, strict=True)]
        images[start : start + len(some)] = _render(ground(u[:, :14], textured), placed)
        layouts += placed
    return Pictures(images, list(asked), layouts)


def ground(u: np.ndarray, textured: bool = True) -> np.ndarray:
    """Dark grey, lightly tinted, in smooth waves: u (N, 14) -> whole numbers (N, S, S, 3)."""
    if not textured:
        return np.full((len(u), SIDE, SIDE, 3), 68.0)
    low, high = 20 + 40 * u[:, 0, None, None], 70 + 50 * u[:, 1, None, None]
    mix = 0.5 + 0.5 * paint.waves(u[:, 6:], SIDE, slowest=0.5, strengths=(0.7, 0.3))
    grey = np.floor(low + (high - low) * mix + 0.5)
    tint = np.floor(17 * u[:, 2:5]) - 8
    return grey[..., None] + tint[:, None, None]


def _render(base: np.ndarray, layouts: Sequence[Sequence[Placed]]) -> np.ndarray:
    """Glyphs onto grounds (N, S, S, 3): uint8."""
    which = [i for i, placed in enumerate(layouts) for _ in placed]
    cover = coverage([glyph for placed in layouts for glyph in placed])
    for i, glyph, mask in zip(which, itertools.chain.from_iterable(layouts), cover, strict=True):
        base[i] += (np.array(glyph.ink) - base[i]) * mask[..., None]
    return np.floor(np.clip(base, 0, 255) + 0.5).astype(np.uint8)


EDGE = 0.2, 0.6  # of ink, where a glyph begins to cover, and over how much it comes to cover all
REACH = 11  # pixels around a centre that a glyph may colour


def coverage(placed: Sequence[Placed]) -> np.ndarray:
    """How far each glyph covers each pixel: (M, S, S) in [0, 1]."""
    images, _ = paint.glyphs()
    x0 = np.array([int(g.x) - REACH for g in placed])
    y0 = np.array([int(g.y) - REACH for g in placed])
    columns, rows = (np.array([getattr(g, name) for g in placed])[:, None, None] for name in ("x", "y"))
    scale, angle, shear = (np.array([getattr(g, name) for g in placed])[:, None, None] for name in ("scale", "angle", "shear"))
    window = np.arange(2 * REACH + 1)
    x = x0[:, None, None] + window[None, None, :] - columns
    y = y0[:, None, None] + window[None, :, None] - rows
    gx, gy = (np.cos(angle) * x + np.sin(angle) * y) / scale, (-np.sin(angle) * x + np.cos(angle) * y) / scale
    shapes = np.pad(images[[g.glyph for g in placed]], ((0, 0), (2, 2), (2, 2)))
    value = paint.bilinear(shapes, gy + 5.5, gx + shear * gy + 5.5)
    edge = np.clip((value - EDGE[0]) / EDGE[1], 0, 1)
    edge = edge * edge * (3 - 2 * edge)
    whole = np.zeros((len(placed), SIDE + 2 * REACH, SIDE + 2 * REACH))  # with a border, for windows that reach beyond
    for mask, patch, left, top in zip(whole, edge, x0 + REACH, y0 + REACH, strict=True):
        mask[top : top + len(window), left : left + len(window)] = patch
    return whole[:, REACH:-REACH, REACH:-REACH]
