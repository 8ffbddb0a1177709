"""GenEval (Ghosh et al. 2023): is on a picture what its prompt asks for? A pure function of what a detector saw.

A prompt is a list of demands ("clauses"): so many objects of a class, in a colour, left of the objects of an earlier
clause; and none too many (``exclude``, for counting). The rules are the official evaluation's, its oddities included:
colours are asked of the surest objects only, positions only where the colour was right, "left of" and "above" may both
hold or neither. Sizes, thresholds and the order of float32 operations follow it too, so that ``correct`` and the
reasons come out the same (tests/golden/geneval.json.gz holds what the official function answered).

The overall score is the plain mean over the six tasks, which have different numbers of prompts. Prompts are what is
random here: pictures of one prompt succeed and fail together, so standard errors resample prompts within their task,
and two runs are compared prompt by prompt.

Left out: the detector (``detections.py`` says what it owes), and the official command's options that nobody reports.

Shapes: P prompts, S seeds (whole runs), I images per prompt and seed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vapi.config import nearest
from vapi.metrics.detections import Detections, Detector, Identity, Objects, Rules, hint

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,"
    "horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,"
    "computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush"
)
CLASSES = tuple(_NAMES.split(","))
"""COCO's 80 in COCO's order, by the names of GenEval's prompts, which are not COCO's everywhere (computer mouse, tv remote)."""

OFFICIAL = "8cb147ebbae11812255100aa3793a8290f7a886ffbdabdd92a8d08f0dce85427"
"""``list_digest`` of the official 553 prompts."""
OFFICIAL_PROMPTS, OFFICIAL_IMAGES = 553, 4
RESAMPLES, BOOTSTRAP_SEED = 10_000, 0


# --- prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clause:
    """One demand: ``count`` objects of a class, perhaps all in a colour, perhaps all in a relation to those of an earlier clause."""

    name: str
    count: int
    colour: str = ""
    relation: str = ""
    target: int = 0  # number of the clause that ``relation`` refers to


@dataclass(frozen=True)
class Prompt:
    """A caption and what must be on its picture."""

    text: str
    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as it was read

    @property
    def key(self) -> str:
        """The same for two prompts that ask the same, however their lines were written."""
        return json.dumps(dataclasses.astuple(self)[:-1])


Names = Sequence[str] | None
"""Classes or colours that a detector knows; None: whatever a prompt may say."""


def read_prompts(path: Path | str, classes: Names = CLASSES, colours: Names = COLOURS) -> list[Prompt]:
    """The prompts of a file of JSON lines: tag, include, perhaps exclude, prompt.

    Raises ValueError that names the line for whatever is no prompt that a detector of these classes and colours can judge.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not here; it should hold prompts as GenEval's evaluation_metadata.jsonl does")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    prompts = [parse_prompt(line, f"{path} line {number}", classes, colours) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty; it should hold one prompt a line, as JSON")
    return prompts


def parse_prompt(text: str, where: str, classes: Names = CLASSES, colours: Names = COLOURS) -> Prompt:
    """One prompt from its JSON. Raises ValueError that begins with ``where``."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    try:
        return _prompt(values, classes, colours)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _prompt(values: Any, classes: Names, colours: Names) -> Prompt:
    names = ("tag", "include", "exclude", "prompt")
    if not isinstance(values, dict):
        raise ValueError(f"a prompt is a mapping with {', '.join(names)}, not {values!r}")
    for name in values.keys() - set(names):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.75):  # other fields are somebody's notes
            raise ValueError(f"it has a field {name!r}; did you mean {close[0]!r}?")
    if missing := [name for name in names if name not in values and name != "exclude"]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    text, tag = values["prompt"], values["tag"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt is {text!r}; it must be a text")
    if tag not in TASKS:
        raise ValueError(f"tag {tag!r} is unknown; known: {', '.join(TASKS)}")
    parts: dict[str, tuple[Clause, ...]] = {}
    for name in ("include", "exclude"):
        clauses = values.get(name, [])
        if not isinstance(clauses, list) or (name == "include" and not clauses):
            raise ValueError(f"{name} is {clauses!r}; it must be a list of what is asked for")
        parts[name] = tuple(_clause(clause, f"{name}[{n}]", n, classes, colours) for n, clause in enumerate(clauses))
    return Prompt(text, tag, parts["include"], parts["exclude"], values)


def _clause(values: Any, where: str, number: int, classes: Names, colours: Names) -> Clause:
    names = ("class", "count") if where.startswith("exclude") else ("class", "count", "color", "position")
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it must be a mapping with class and count")
    for name in values:
        if name not in names:
            raise ValueError(f"{where} has an unknown field {name!r}; {nearest(str(name), names)}")
    if missing := [name for name in ("class", "count") if name not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    count = values["count"]
    if type(count) is not int or count < 1:
        raise ValueError(f"{where}.count is {count!r}; it must be a whole number above 0")
    _require_known(f"{where}.class", values["class"], classes)
    if "color" in values:
        _require_known(f"{where}.color", values["color"], colours)
    relation, target = "", 0
    if "position" in values:
        position = values["position"]
        if not isinstance(position, list) or len(position) != 2:
            raise ValueError(f'{where}.position is {position!r}; it must be a relation and the number of an earlier include: ["above", 0]')
        relation, target = position
        if relation not in RELATIONS:
            raise ValueError(f"{where}.position is {relation!r}; known: {', '.join(RELATIONS)}")
        if type(target) is not int or not 0 <= target < number:
            raise ValueError(f"{where}.position refers to include[{target}]; it must be an earlier one")
    return Clause(values["class"], count, values.get("color", ""), relation, target)


def _require_known(where: str, name: Any, known: Names) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} is {name!r}; it must be a name")
    if known is not None and name not in known:
        near = hint(name, known) if known else "it knows none (colours of Mask2Former's objects take --clip)"
        raise ValueError(f"{where} is {name!r}, which the detector does not know; {near}")


def list_digest(prompts: Iterable[Prompt]) -> str:
    """sha256 of a list of prompts, whatever their order and the spelling of their JSON."""
    return hashlib.sha256("\n".join(sorted(prompt.key for prompt in prompts)).encode()).hexdigest()


# --- one picture -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of one picture."""

    correct: bool
    reasons: list[str]  # sorted; none where it is correct
    details: dict[str, list[list[float]]]  # the boxes that counted, by class, the surest first


NOTHING = Objects(np.zeros((0, 5), np.float32))

ColourOf = Callable[[Objects], Sequence[str]]


def score(prompt: Prompt, objects: Detections, rules: Rules, colour_of: ColourOf) -> Outcome:
    """Judge one picture by what was seen on it; ``colour_of`` is asked for the colours of objects of one class.

    Equal to GenEval's ``evaluate_image`` from the detector's answer onwards.
    """
    threshold = rules.counting_threshold if prompt.tag == "counting" else rules.threshold
    kept = {name: dataclasses.replace(these, name=name) for name, all_ in objects.items() if len(these := keep(all_, threshold, rules))}
    reasons = []
    groups: list[Objects] = []  # what fulfilled each clause: nothing, if it was not
    for clause in prompt.include:
        found = kept.get(clause.name, NOTHING)[: clause.count]
        complaint = _complaint(clause, found, groups, rules, colour_of)
        groups.append(NOTHING if complaint else found)
        reasons += [complaint] if complaint else []
    for clause in prompt.exclude:
        count = len(kept.get(clause.name, NOTHING))
        if count >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {count}")
    return Outcome(not reasons, sorted(reasons), {name: these.boxes.tolist() for name, these in kept.items()})


def outcomes(detector: Detector, prompts: Sequence[Prompt], pictures: Sequence[np.ndarray], seen: Sequence[Detections]) -> list[Outcome]:
    """``score`` of several pictures, a prompt each, by what a detector saw on them."""
    rows = zip(prompts, pictures, seen, strict=True)
    return [score(prompt, objects, detector.rules, functools.partial(detector.colour, picture)) for prompt, picture, objects in rows]


def keep(objects: Objects, threshold: float, rules: Rules) -> Objects:
    """The objects that count, the surest first: those above the threshold, not too many, none in another's place."""
    scores = objects.boxes[:, 4]
    order = np.argsort(scores, kind="stable")[::-1]
    left = order[scores[order] > threshold][: rules.max_objects].tolist()
    if rules.max_overlap == 1:
        return objects[left]
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [other for other in left if overlap(objects.boxes[best], objects.boxes[other]) < rules.max_overlap]
    return objects[kept]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes; an end belongs to its box, which is one pixel longer for it."""
    shared = _area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4])]))
    united = _area(a) + _area(b) - shared
    return shared / united if united else 0.0


def _area(box: np.ndarray) -> float:
    return np.maximum(box[2] - box[0] + 1, 0) * np.maximum(box[3] - box[1] + 1, 0)


def relations(a: np.ndarray, b: np.ndarray, margin: float) -> set[str]:
    """Where box ``a`` lies seen from box ``b``: none, one or two of RELATIONS.

    Centres must be further apart than ``margin`` of both sizes together; what exceeds it, over the whole distance, must be
    more than half an axis.
    """
    corners = np.stack([a[:4], b[:4]]).reshape(2, 2, 2)
    centres, sizes = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - margin * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def _complaint(clause: Clause, found: Objects, groups: Sequence[Objects], rules: Rules, colour_of: ColourOf) -> str:
    """The first thing that is wrong with the objects found for a clause; empty if nothing is."""
    if len(found) < clause.count:
        return f"expected {clause.name}>={clause.count}, found {len(found)}"
    complaint = _wrong_colour(clause, colour_of(found)) if clause.colour else ""
    if clause.relation and not complaint:
        complaint = _wrong_place(clause, found, groups[clause.target], rules)
    return complaint


def _wrong_colour(clause: Clause, seen: Sequence[str]) -> str:
    count = seen.count(clause.colour)
    if count >= clause.count:
        return ""
    in_order = [*(colour for colour in COLOURS if colour in seen), *sorted(set(seen) - set(COLOURS))]
    list_ = ", ".join(f"{seen.count(colour)} {colour}" for colour in in_order)
    return f"expected {clause.colour} {clause.name}>={clause.count}, found {count} {clause.colour}; and {list_}"


def _wrong_place(clause: Clause, found: Objects, target: Objects, rules: Rules) -> str:
    if not len(target):
        return f"no target for {clause.name} to be {clause.relation}"
    for box in found.boxes:
        for other in target.boxes:
            held = relations(box, other, rules.position_margin)
            if clause.relation not in held:
                return f"expected {clause.name} {clause.relation} target, found {' and '.join(sorted(held))} target"
    return ""


# --- many pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Which pictures were what their prompts ask for."""

    prompts: Sequence[Prompt]  # P
    correct: np.ndarray  # bool (P, S, I)

    @classmethod
    def of(cls, prompts: Sequence[Prompt], correct: np.ndarray) -> Run:
        """Of one seed's outcomes (P, I), or several seeds' (P, S, I). Raises ValueError where there are none, or not as many prompts."""
        correct = np.asarray(correct, bool)
        correct = correct[:, None] if correct.ndim == 2 else correct
        if correct.ndim != 3 or len(correct) != len(prompts) or not correct.size:
            raise ValueError(f"outcomes of shape {correct.shape} do not belong to {len(prompts)} prompts with seeds and images")
        return cls(tuple(prompts), correct)

    @property
    def shares(self) -> np.ndarray:
        """Share of each prompt's pictures that are correct, over all seeds: (P,)."""
        return self.correct.mean(axis=(1, 2))

    @property
    def seeds(self) -> int:
        return self.correct.shape[1]

    @property
    def images(self) -> int:
        return self.correct.shape[2]

    def of_task(self) -> dict[str, np.ndarray]:
        """Numbers of each task's prompts, in the order of TASKS; tasks without prompts are left out."""
        tags = np.array([prompt.tag for prompt in self.prompts])
        return {task: rows for task in TASKS if len(rows := np.flatnonzero(tags == task))}


def overall(shares: np.ndarray, tasks: Mapping[str, np.ndarray]) -> float:
    """The plain mean of the tasks' means: GenEval's overall score."""
    return float(np.mean([shares[rows].mean() for rows in tasks.values()]))


def resampled(shares: np.ndarray, tasks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Means of tasks (and in a last row the overall score) of lists whose prompts were drawn anew, with replacement and
    within their task: (tasks + 1, RESAMPLES)."""
    random = np.random.default_rng(BOOTSTRAP_SEED)
    means = [
        random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES) @ shares[rows] / len(rows) for rows in tasks.values()
    ]
    return np.stack([*means, np.mean(means, axis=0)])


def standard_errors(shares: np.ndarray, tasks: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """By task and "overall": the standard deviation over resampled lists; None where a task has a single prompt."""
    found = dict(zip([*tasks, "overall"], resampled(shares, tasks).std(axis=1).tolist()))
    alone = {task for task, rows in tasks.items() if len(rows) < 2}
    return {name: None if name in alone or (alone and name == "overall") else value for name, value in found.items()}


def summary(run: Run, identity: Identity, rules: Rules, asked: Sequence[Prompt] = ()) -> dict[str, Any]:
    """GenEval's table as plain values: what detector, what list and whether all of it, scores by task, overall, standard errors.

    ``asked``: the list that the run should have answered; none: exactly the run's prompts. ``partial`` says in words what is
    missing, and is empty for a complete run. Raises ValueError for a prompt that was not asked for.
    """
    asked = asked or run.prompts
    missing = _missing(run.prompts, asked)
    official = list_digest(asked) == OFFICIAL
    partial = [f"{len(run.prompts):,} of {len(asked):,} prompts"] if missing else []
    if official and run.images != OFFICIAL_IMAGES:
        partial.append(f"{run.images} instead of {OFFICIAL_IMAGES} images per prompt")
    shares, tasks = run.shares, run.of_task()
    errors = standard_errors(shares, tasks)
    any_ = run.correct.any(axis=2).mean(axis=1)  # of a seed's pictures
    seeds = [overall(run.correct[:, seed].mean(axis=1), tasks) for seed in range(run.seeds)]
    return {
        "title": identity.title,
        "list": "GenEval" if official else "other",
        "partial": partial,
        "missing": missing,
        "prompts": len(run.prompts),
        "seeds": run.seeds,
        "images_per_prompt": run.images,
        "images": run.correct.size,
        "correct_images": float(run.correct.mean()),
        "correct_prompts": float(any_.mean()),
        "tasks": {
            task: {
                "score": float(shares[rows].mean()),
                "standard_error": errors[task],
                "correct": int(run.correct[rows].sum()),
                "images": run.correct[rows].size,
                "prompts": len(rows),
                "correct_prompts": float(any_[rows].mean()),
            }
            for task, rows in tasks.items()
        },
        "overall": overall(shares, tasks),
        "standard_error": errors["overall"],
        "by_seed": seeds,
        "detector": {**dataclasses.asdict(identity), "more": dict(identity.more)},
        "rules": dataclasses.asdict(rules),
        "bootstrap": {"resamples": RESAMPLES, "seed": BOOTSTRAP_SEED, "of": "prompts, within their task"},
    }


def _missing(found: Sequence[Prompt], asked: Sequence[Prompt]) -> list[str]:
    left = Counter(prompt.key for prompt in asked)
    left.subtract(prompt.key for prompt in found)
    if strange := [prompt.text for prompt in found if left[prompt.key] < 0]:
        raise ValueError(f"{len(strange)} prompts are not in the list that was asked for, the first: {strange[0]!r}")
    return [prompt.text for prompt in asked if left[prompt.key] > 0]


def table(found: Mapping[str, Any]) -> str:
    """A summary as text, in the form of the official one, with standard errors (S.E., in the unit before them)."""
    detector, weights = found["detector"]["name"], found["detector"]["weights"]
    list_ = "GenEval's prompts" if found["list"] == "GenEval" else "other prompts than GenEval's"
    lines = [f"{found['title']} by {detector}" + (f" (weights {weights[:12]})" if weights else "") + f", {list_}"]
    if found["partial"]:
        some = ", ".join(map(repr, found["missing"][:3])) + (", ..." if len(found["missing"]) > 3 else "")
        lines.append(f"PARTIAL: {'; '.join(found['partial'])}" + (f"; missing: {some}" if some else ""))
    lines += ["", "Summary", "======="]
    lines += [f"Total images: {found['images']}", f"Total prompts: {found['prompts']}"]
    lines += [f"% correct images: {found['correct_images']:.2%}", f"% correct prompts: {found['correct_prompts']:.2%}"]
    lines += ["", "Task breakdown", "=============="]
    for task, row in found["tasks"].items():
        error = "" if row["standard_error"] is None else f"  S.E. {row['standard_error']:.2%}"
        lines.append(f"{task:<16} = {row['score']:.2%} ({row['correct']} / {row['images']}){error}")
    error = "" if found["standard_error"] is None else f"  S.E. {found['standard_error']:.5f}"
    lines += ["", f"Overall score (avg. over tasks): {found['overall']:.5f}{error}"]
    if found["seeds"] > 1:
        lines.append("By seed: " + ", ".join(f"{score:.5f}" for score in found["by_seed"]))
    return "\n".join(lines)


# --- two runs ----------------------------------------------------------------------------------


def compare(a: Run, b: Run) -> dict[str, Any]:
    """What run ``b`` has gained on ``a``, prompt by prompt, each averaged over its seeds and images.

    By task and "overall": a, b, difference (b - a), its standard error and 95 % interval over resampled prompts. Seeds and images
    may be of different number. Raises ValueError where the prompts are not the same.
    """
    order = [np.argsort([prompt.key for prompt in run.prompts], kind="stable") for run in (a, b)]
    keys = [[run.prompts[n].key for n in rows] for run, rows in zip((a, b), order)]
    if keys[0] != keys[1]:
        ours, theirs = Counter(keys[0]), Counter(keys[1])
        raise ValueError(
            f"the two runs answer different prompts ({(ours - theirs).total()} are in the first alone, "
            f"{(theirs - ours).total()} in the second alone); only equal lists can be paired"
        )
    prompts = [a.prompts[n] for n in order[0]]
    shares = [run.shares[rows] for run, rows in zip((a, b), order)]
    tasks = Run(prompts, a.correct[order[0]]).of_task()
    draws = resampled(shares[1] - shares[0], tasks)
    rows = {task: [float(one[these].mean()) for one in shares] for task, these in tasks.items()}
    rows["overall"] = [overall(one, tasks) for one in shares]
    low, high = np.quantile(draws, [0.025, 0.975], axis=1)
    return {
        name: {
            "a": first,
            "b": second,
            "difference": second - first,
            "standard_error": float(draws[n].std()),
            "low": float(low[n]),
            "high": float(high[n]),
        }
        for n, (name, (first, second)) in enumerate(rows.items())
    }


def comparison_table(found: Mapping[str, Any]) -> str:
    """``compare``'s result as text."""
    lines = [f"{'':<16}  {'a':>8}  {'b':>8}  {'b - a':>8}  95 % interval"]
    for name, row in found.items():
        numbers = "  ".join(f"{row[key]:8.4f}" for key in ("a", "b"))
        lines.append(f"{name:<16}  {numbers}  {row['difference']:+8.4f}  {row['low']:+.4f} .. {row['high']:+.4f}")
    return "\n".join(lines)
