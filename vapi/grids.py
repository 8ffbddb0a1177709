"""The tables and figures of the paper, and some of ours, as named grids: one row each, as what it changes in a recipe.

A point says which fields differ from the grid's recipe, and what the paper (arXiv 2512.19680) prints for it; numbers are taken
from there and nowhere else. A row that does not go with a recipe stays in its table, and is shown as not run.
``experiment.py`` runs them. A new ablation is a new grid here and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vapi import config, recipes
from vapi.config import Config, TuneConfig

SEEDS = ("tune.seed", "evaluate.seeds")
"""Fields that a run's seed decides, in every grid."""
SWEPT = {"evaluate.temperatures": "evaluate.temperature", "evaluate.guidances": "evaluate.guidance"}
"""Fields of the sweep, each with that of the only point which is left of it in a grid that does not show what comes of it."""


@dataclass(frozen=True)
class Point:
    """A row: ``changes`` of the recipe, the paper's numbers by metric, and whose numbers ours are."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    side: Literal["base", "tuned"] = "tuned"
    about: bool = False  # the paper's numbers are read off a plot


@dataclass(frozen=True)
class Grid:
    """A table. ``metrics`` are names in metrics.json, alone (the plain comparison), or as guided/NAME (evaluate.guided), best/NAME (each
    model at its best temperature and guidance), task/NAME (GenEval, by evaluate.detector) and held/NAME (on images held out of tuning,
    before and after it)."""

    doc: str
    source: str
    metrics: tuple[str, ...]
    points: tuple[Point, ...]
    recipe: str = "digits"
    full_size: str = "llamagen-xxl-c2i"  # the recipe of the paper's own run
    settings: dict[str, Any] = field(default_factory=dict)  # what it takes of a recipe that leaves these fields at their defaults
    curve: str = ""  # of what was measured on held-out images while tuning, what is drawn over the steps

    @property
    def varied(self) -> list[str]:
        """The fields that some of its points change."""
        return list(dict.fromkeys(name for point in self.points for name in point.changes))

    @property
    def sweeps(self) -> bool:
        """Whether it shows what comes of sweeping temperature and guidance."""
        return any(metric.startswith("best/") for metric in self.metrics)

    @property
    def holds(self) -> bool:
        """Whether it shows what tuning did to images that were held out of it."""
        return any(metric.startswith("held/") for metric in self.metrics)


QUALITY = ("fid", "inception_score", "precision", "recall")
BOTH = (*QUALITY, *(f"guided/{name}" for name in QUALITY))
TASKS = ("position", "colors", "color_attr", "counting", "single_object", "two_object")  # in the order of the paper
GENEVAL = (*(f"task/{name}" for name in TASKS), "geneval")
HELD = ("held/reward", "held/reward_mse", "held/reward_lpips", "held/ce")
OURS = "ours, beyond the paper"
_SIDES: tuple[tuple[str, Literal["base", "tuned"]], ...] = (("base", "base"), ("VA-pi", "tuned"))


PUBLISHED = {"tune.cca_beta": 0.02, "tune.cca_weight": 300.0}
"""CCA's weights for LlamaGen, whose images have nine times as many codes."""
CONTRASTS = (
    (0.02, 1.0, (0.1, 0.3, 1.0, 3.0)),
    (0.02, 10.0, (0.3, 1.0)),
    (0.02, 300.0, (0.1,)),  # as PUBLISHED; at higher rates: ``rates``
    (0.2, 1.0, (0.3, 1.0, 3.0)),
)
"""CCA's beta and lambda, and at how many times VA-pi's learning rate each was tried."""


def _quality(*numbers: float) -> dict[str, float]:
    """FID, IS, precision, recall without guidance, then with."""
    return dict(zip(BOTH, numbers))


def _geneval(*numbers: float) -> dict[str, float]:
    return dict(zip(GENEVAL, numbers, strict=True))


def _figure5(of: str, recipe: str, full_size: str) -> Grid:
    """No number is printed: the curves of all three rise."""
    rows = tuple(Point(name, side=side) for name, side in _SIDES)
    return Grid(f"The reward while tuning {of}, on held-out images.", f"figure 5: {of}", HELD, rows, recipe, full_size, curve="reward")


def _each(name: str, values: Iterable[Any], title: str) -> tuple[Point, ...]:
    """The base, and a point for each value of a field."""
    return (Point("base", side="base"), *(Point(title.format(value), {name: value}) for value in values))


def _figure4() -> tuple[Point, ...]:
    """Only beta 0, 0.1 with cross-entropy, and the base are printed; the others are read off the plot."""
    read = {
        "ce": ((0.01, 22.2, 72.6), (0.1, 7.65, 116.70), (1.0, 10.9, 100.4)),
        "kl": ((0.01, 22.5, 71.7), (0.1, 8.5, 110.6), (1.0, 12.7, 94.6)),
    }
    points = [Point("base", {}, _quality(14.36, 86.55), "base"), Point("beta 0", {"tune.prior_weight": 0.0}, _quality(38.63, 48.14))]
    for prior, rows in read.items():
        for beta, *numbers in rows:
            about = (prior, beta) != ("ce", 0.1)
            changes = {"tune.prior_weight": beta, "tune.prior": prior}
            points.append(Point(f"beta {beta:g}, {prior.upper()}", changes, _quality(*numbers), about=about))
    return tuple(points)


GRIDS = {
    "table1": Grid(
        "Scores of pictures for their prompts.",
        "table 1: LlamaGen-XL on DrawBench",
        ("clipscore", "hpsv2"),
        (
            Point("base", {}, {"clipscore": 0.245, "hpsv2": 0.153}, "base"),
            Point("AR-GRPO", recipes.BY_CLIP, {"clipscore": 0.274, "hpsv2": 0.208}),
            Point("VA-pi", {}, {"clipscore": 0.291, "hpsv2": 0.211}),
        ),
        recipe="digits-t2i",
        full_size="llamagen-xl-drawbench",
        settings={"evaluate.clip": "data/models/scenes-clip", "evaluate.text_metrics": ["clipscore"]},
    ),
    "table2": Grid(
        "Post-training of LlamaGen-XXL, with and without guidance.",
        "table 2: LlamaGen-XXL on ImageNet; guidance 1.75",
        BOTH,
        (
            Point("base", {}, _quality(14.36, 86.55, 0.63, 0.69, 2.37, 252.16, 0.81, 0.59), "base"),
            Point("tokenizer post-trained", recipes.AT_BEST["tokenizer"], _quality(14.26, 86.70, 0.63, 0.68, 2.72, 246.97, 0.80, 0.59)),
            Point(
                "tokenizer post-trained, 1,000 steps (paper: 10,000)",
                recipes.AT_BEST["tokenizer"] | {"tune.steps": 1000},
                _quality(22.99, 72.49, 0.56, 0.68, 4.31, 221.57, 0.75, 0.58),
            ),
            Point("straight-through", recipes.AT_BEST["straight-through"], _quality(11.46, 102.21, 0.68, 0.61, 4.17, 267.34, 0.83, 0.51)),
            Point("VA-pi", {}, _quality(7.65, 116.70, 0.71, 0.64, 2.28, 273.53, 0.83, 0.56)),
        ),
        settings={"evaluate.guided": 1.75},
    ),
    "table2-xl": Grid(
        "Post-training of LlamaGen-XL, with and without guidance.",
        "table 2: LlamaGen-XL on ImageNet; guidance 2.0",
        BOTH,
        (
            Point("base", {}, _quality(15.55, 79.16, 0.62, 0.69, 2.79, 286.88, 0.84, 0.54), "base"),
            Point("AR-GRPO", recipes.AT_BEST["AR-GRPO"], dict(zip(BOTH[4:], (3.63, 293.07, 0.86, 0.48)))),
            Point("VA-pi", {}, _quality(9.23, 111.59, 0.71, 0.59, 2.94, 299.63, 0.84, 0.53)),
        ),
        full_size="llamagen-xl-c2i",
        settings={"evaluate.guided": 2.0},
    ),
    "table3": Grid(
        "GenEval of LlamaGen-XL.",
        "table 3: LlamaGen-XL from captions",
        GENEVAL,
        (
            Point("base", {}, _geneval(0.042, 0.550, 0.032, 0.197, 0.750, 0.263, 0.306), "base"),
            Point("AR-GRPO", recipes.BY_CLIP, _geneval(0.040, 0.593, 0.030, 0.228, 0.791, 0.263, 0.324)),
            Point("VA-pi", {}, _geneval(0.050, 0.606, 0.040, 0.238, 0.769, 0.328, 0.339)),
        ),
        recipe="digits-t2i",
        full_size="llamagen-xl-t2i",
    ),
    "table3-janus": Grid(
        "GenEval of Janus-Pro 1B.",
        "table 3: Janus-Pro 1B",
        GENEVAL,
        (
            Point("base", {}, _geneval(0.605, 0.902, 0.540, 0.531, 0.972, 0.801, 0.725), "base"),
            Point("VA-pi", {}, _geneval(0.600, 0.912, 0.585, 0.540, 0.988, 0.835, 0.744)),
        ),
        recipe="digits-janus",
        full_size="janus-pro-1b",
    ),
    "table4": Grid(
        "The parts of the reward, and the prior.",
        "table 4: LlamaGen-XXL on ImageNet, without guidance",
        QUALITY,
        (
            Point("base", {}, _quality(14.36, 86.55, 0.63, 0.69), "base"),
            Point("LPIPS alone", {"tune.rewards.mse": 0.0, "tune.prior_weight": 0.0}, _quality(38.76, 49.78, 0.48, 0.46)),
            Point("reward alone (MSE, LPIPS)", {"tune.prior_weight": 0.0}, _quality(38.63, 48.14, 0.49, 0.46)),
            Point("prior alone", {"tune.policy_weight": 0.0}, _quality(14.17, 88.78, 0.63, 0.69)),
            Point("VA-pi", {}, _quality(7.65, 116.70, 0.68, 0.64)),
        ),
    ),
    "figure4": Grid(
        "The prior's weight beta, as cross-entropy and as KL.",
        "figure 4: LlamaGen-XXL on ImageNet, without guidance",
        ("fid", "inception_score"),
        _figure4(),
    ),
    "table5": Grid(
        "Noise in the context, xi.",
        "table 5: LlamaGen-XL from captions",
        GENEVAL,
        (
            Point("base", {}, _geneval(0.042, 0.550, 0.032, 0.197, 0.750, 0.263, 0.306), "base"),
            Point("xi 0", {"tune.context_noise": 0.0}, _geneval(0.048, 0.566, 0.023, 0.159, 0.688, 0.326, 0.302)),
            Point("xi 0.25", {"tune.context_noise": 0.25}, _geneval(0.043, 0.598, 0.025, 0.215, 0.700, 0.306, 0.315)),
            Point("xi 0.5", {"tune.context_noise": 0.5}, _geneval(0.050, 0.606, 0.040, 0.238, 0.769, 0.328, 0.339)),
            Point("xi 0.75", {"tune.context_noise": 0.75}, _geneval(0.075, 0.641, 0.028, 0.163, 0.750, 0.333, 0.332)),
            Point("xi 0.95", {"tune.context_noise": 0.95}, _geneval(0.043, 0.652, 0.040, 0.181, 0.728, 0.328, 0.329)),
        ),
        recipe="digits-t2i",
        full_size="llamagen-xl-t2i",
    ),
    "figure5": _figure5("LlamaGen from classes", "digits", "llamagen-xxl-c2i"),
    "figure5-t2i": _figure5("LlamaGen from captions", "digits-t2i", "llamagen-xl-t2i"),
    "figure5-janus": _figure5("Janus-Pro", "digits-janus", "janus-pro-1b"),
    "objectives": Grid(
        "Other objectives in VA-pi's loop, each at a learning rate of its own (RATES).",
        OURS,
        QUALITY,
        (Point("base", side="base"), *(Point(name, changes) for name, changes in recipes.AT_BEST.items())),
    ),
    "rates": Grid(
        "Learning rates of each objective, to choose by: --seeds 1000 --evaluate.reference data/digits/validation.parquet",
        OURS,
        QUALITY,
        (
            Point("base", side="base"),
            *(
                Point(f"{name}, x {factor:g}", changes | {"tune.lr": recipes.Times(factor)})
                for name, changes in (recipes.ARMS | {"CCA": recipes.ARMS["CCA"] | PUBLISHED}).items()
                for factor in (0.3, 1.0, 3.0, 10.0)
            ),
        ),
    ),
    "cca": Grid(
        "CCA's two weights and its learning rate, to choose by: --seeds 1000 --evaluate.reference data/digits/validation.parquet",
        OURS,
        QUALITY,
        (
            Point("base", side="base"),
            *(
                Point(
                    f"beta {beta:g}, lambda {weight:g}, x {factor:g}",
                    recipes.ARMS["CCA"] | {"tune.cca_beta": beta, "tune.cca_weight": weight, "tune.lr": recipes.Times(factor)},
                )
                for beta, weight, factors in CONTRASTS
                for factor in factors
            ),
        ),
    ),
    "updates": Grid(
        "Optimizer steps made of one rollout.",
        OURS,
        QUALITY,
        _each("tune.updates_per_rollout", (1, 2, 4), "{} a rollout"),
    ),
    "baseline": Grid(
        "What a draw's reward is compared with.",
        OURS,
        QUALITY,
        (
            Point("base", side="base"),
            Point("group, by its spread", {}),
            *(
                Point(f"leave one out, x {weight:g}", {"tune.baseline": "leave_one_out", "tune.policy_weight": weight})
                for weight in (20.0, 40.0)  # digits' rewards scatter by 1/40 within a group
            ),
        ),
    ),
    "group-size": Grid("Draws from one prediction, G.", OURS, QUALITY, _each("tune.group_size", (2, 4, 8, 16, 32), "G {}")),
    "steps": Grid("Optimizer steps.", OURS, QUALITY, _each("tune.steps", (25, 50, 100, 200), "{} steps")),
    "images": Grid("Different images to tune on.", OURS, QUALITY, _each("subset.images", (256, 512, 1024, 2048), "{} images")),
    "reward-weights": Grid(
        "LPIPS beside MSE in the reward.",
        OURS,
        QUALITY,
        _each("tune.rewards.lpips", (0.0, 1.0, 10.0, 100.0), "LPIPS x {:g}"),
    ),
    "ratio-clip": Grid(
        "Where the ratio is clipped, epsilon; only dropout in the update makes it differ from 1.",
        OURS,
        QUALITY,
        _each("tune.ratio_clip", (0.05, 0.2, 1.0), "epsilon {:g}"),
        settings={"tune.policy_dropout": "official"},
    ),
    "policy-dropout": Grid(
        "Dropout in the update: none, or as released.",
        OURS,
        QUALITY,
        _each("tune.policy_dropout", ("none", "official"), "{}"),
    ),
    "guidance": Grid(
        "Guidance of base and tuned.",
        OURS,
        ("fid", "guided/fid", "guided/inception_score", "guided/precision", "guided/recall"),
        tuple(
            Point(f"{name}, guidance {guidance:g}", {"evaluate.guided": guidance}, side=side)
            for guidance in (1.25, 1.5, 2.0, 3.0)
            for name, side in _SIDES
        ),
    ),
    "temperature": Grid(
        "Base and tuned, each at its best temperature and guidance, which sharpening alone would reach too.",
        OURS,
        (*QUALITY, "best/temperature", "best/guidance", *(f"best/{name}" for name in QUALITY)),
        (Point("base", side="base"), Point("VA-pi")),
    ),
    "credit": Grid(
        "One advantage for a draw, or one for each code from the reward around its place.",
        OURS,
        QUALITY,
        (
            Point("base", side="base"),
            Point("image", {"tune.credit": "image"}),
            *(Point(f"token, radius {radius}", recipes.AT_BEST["token credit"] | {"tune.credit_radius": radius}) for radius in (0, 1, 2)),
        ),
    ),
}


def grid(name: str) -> Grid:
    """A grid by its name. Raises ValueError that names the nearest known one."""
    if name not in GRIDS:
        raise ValueError(f"no experiment is called {name!r}; {config.nearest(name, GRIDS)}")
    return GRIDS[name]


def under(made: Grid, recipe: Config) -> Config:
    """A recipe with the grid's settings in the fields that it leaves at their defaults."""
    own, defaults = config.flat(recipe), config.flat(Config())
    return recipes.changed(recipe, {name: value for name, value in made.settings.items() if own[name] == defaults[name]})


def settings(made: Grid, base: Config, point: Point, seed: int) -> Config:
    """What a point runs with: the grid's base with its changes and a seed, which tunes and draws. Temperature and guidance are swept
    only where the grid shows what comes of it. Raises ValueError that names the point."""
    how: dict[str, Any] = {"tune.seed": seed, "evaluate.seeds": [seed]}
    if not made.sweeps:
        own = config.flat(base)
        how |= {field: [own[plain]] for field, plain in SWEPT.items()}
    try:
        found = recipes.changed(base, point.changes | how)
        _require_measured(made, found)
    except ValueError as error:
        raise ValueError(f"{point.name}: {error}") from error
    return found


def _require_measured(made: Grid, how: Config) -> None:
    """Raises ValueError where nobody would measure what a grid shows."""
    judged = {name for name in made.metrics if name.startswith("task/") or name == "geneval"}
    if judged and not how.evaluate.detector:
        raise ValueError("evaluate.detector is empty, and this table shows GenEval; name a detector, or take another recipe")
    scored = config.TEXT_METRICS.keys() & made.metrics
    if scored and not scored.intersection(how.evaluate.text_metrics):
        raise ValueError(f"evaluate.text_metrics has none of {', '.join(sorted(scored))}, which this table shows; name one")


def runs(made: Grid, base: Config, seeds: Sequence[int]) -> dict[tuple[str, int], Config]:
    """What each point that can be run is run with, by its name and the seed; a whole table of one seed before the next seed's."""
    found = {(point.name, seed): settings(made, base, point, seed) for seed in seeds for point in made.points}
    # where the base itself does not fit, whoever looks at inputs says why
    return {run: how for run, how in found.items() if fits(how)} if fits(base) else found


def fits(how: Config) -> bool:
    """Whether an objective goes with what is drawn: contrast and classifier ask for classes, and the embedded classifier knows ten."""
    of_class = bool(how.tune.rewards.get("class"))
    if how.model.captions:
        return not of_class and how.tune.objective != "cca"
    return not of_class or how.subset.classes <= 10 or how.tune.classifier != TuneConfig().classifier


def title(point: str, seed: int) -> str:
    """What the run of a point with a seed is called."""
    return f"{point}, seed {seed}"


def tunings(made: Grid) -> int:
    """How many models its recipe tunes for each seed."""
    base = under(made, recipes.recipe(made.recipe))
    values = map(config.plain, runs(made, base, [0]).values())
    return len({json.dumps([run[section] for section in config.sections_so_far("tune")]) for run in values})


def seeds(words: Iterable[Any], field: str) -> list[int]:
    """Seeds from words or numbers. Raises ValueError that names the ``field`` they come from."""
    found = [config.convert(word, int, field) for word in words]
    config.require(bool(found), f"{field} names no seed; 0 is one")
    config.require(len(set(found)) == len(found), f"{field} are {', '.join(map(str, found))}; a seed counts once")
    return found


def require_free(made: Grid, fields: Sequence[str]) -> None:
    """Raises ValueError if flags name fields that the grid or its seeds decide: they would be overruled in silence."""
    for name in fields:
        if name in SEEDS:
            raise ValueError(f"--{name} is what --seeds decides here; say --seeds 0,1,2")
        if name in SWEPT and not made.sweeps:
            raise ValueError(f"--{name} is swept where a table shows what comes of it (temperature does); say --{SWEPT[name]} or nothing")
        for other in made.varied:
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ValueError(f"--{name} is what this experiment varies; leave it out, or take another experiment")
