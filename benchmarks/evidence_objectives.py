"""VA-pi, VA-pi with a reward for each code, and other objectives, on the digits, a hundred steps each.

    python benchmarks/evidence_objectives.py [--out artifacts/evidence-objectives] [--samples 2500] [--workers 0] [--arms token ste ...]

First gradients: on images of their own, the direction that G = 8 draws give, against that of thousands of draws with one
reward an image, which is what VA-pi's objective asks for (eq. 4). Rewards of places leave out what a code does elsewhere, so that
even thousands of draws point a little aside; eight of them scatter less. Then runs: learning rates searched alike on the
validation images with a tuning seed of its own (VA-pi's is that of evidence.py, where it was searched among four; that of rewards
with neighbours is that of rewards without), then three tuning seeds against the reference images. Resumable, as evidence.py.
Prints JSON on the last line, and writes evidence.json and evidence.md beside the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import torch
import torch.nn.functional as F
from torch import Tensor

from vapi import config, data, grpo, images, models
from vapi.baselines import OBJECTIVES
from vapi.bench import meter, world
from vapi.objective import Objective, optimizer_of, update
from vapi.recipes import recipe
from vapi.rewards import Reward

Scores = dict[str, Any]
CREDITS: dict[str, dict[str, Any]] = {
    "image": {},
    "token": {"credit": "token"},
    "token, radius 1": {"credit": "token", "credit_radius": 1},
    "token, radius 2": {"credit": "token", "credit_radius": 2},
}


@dataclass(frozen=True)
class Plan(evidence.Plan):
    """How much is run."""

    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    pretraining_seeds: tuple[int, ...] = (0,)
    samples: int = 2500


class Evidence(evidence.Evidence):
    """The runs under one folder."""

    arms = {
        "va-pi": {},
        "token": CREDITS["token"],
        "token, radius 1": CREDITS["token, radius 1"],
        "ste": {"objective": "ste"},
        "cca": {"objective": "cca"},
    }
    searched: tuple[str, ...] = ("token", "ste", "cca")
    same = {"token, radius 1": "token"}
    known = {"va-pi": 1e-4}

    def only(self, names: set[str]) -> None:
        """Run some of the arms."""
        self.arms = {name: changes for name, changes in self.arms.items() if name in names}
        self.searched = tuple(name for name in self.searched if name in names | {self.same.get(name, "") for name in names})


# --- gradients ---------------------------------------------------------------------------------


def agreement(made: Evidence, shown: int = 4, many: int = 2048, groups: int = 8) -> Scores:
    """Cosines of gradients of the policy term, mean over images: of all draws, and of eight, to that of all draws with one reward
    an image (which itself agrees with another such gradient by ``ceiling``)."""
    params = made.params
    policy, tune = models.load(params.model), params.tune
    reward = Reward.of(tune)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in CREDITS}
    ceiling = []
    subset, tokens = data.read_subset(made.subset), data.read_tokens(made.tokens)
    for row in range(shown):
        target = images.to_float(subset.pixels(row, params.model.image_size)[None], policy.device)
        codes = torch.from_numpy(tokens.codes[row : row + 1].astype(int))
        condition = policy.condition([int(subset.labels[row])])
        objective = Objective(policy, dataclasses.replace(tune, credit="token"), reward)
        with torch.no_grad():
            predicted = objective.predict(policy, condition, codes)
            keys = grpo.keys(torch.tensor([row]), 0)
            draws = objective.draw(predicted, many, keys)
            places = torch.cat([objective.score(part, target, objective.side)[0] for part in draws.split(64, dim=1)], dim=1)
        halves = [_gradient(policy, condition, codes, draws[:, half], "image", 0, places[:, half]) for half in _parts(many, many // 2)]
        ceiling.append(_cosine(*halves))
        best = _gradient(policy, condition, codes, draws, "image", 0, places)
        for name, credit in CREDITS.items():
            how = credit.get("credit", "image"), credit.get("credit_radius", 0)
            every = _cosine(_gradient(policy, condition, codes, draws, *how, places), best)
            few = list(_parts(groups * tune.group_size, tune.group_size))
            some = [_cosine(_gradient(policy, condition, codes, draws[:, part], *how, places[:, part]), best) for part in few]
            rows[name].append((every, statistics.fmean(some)))
    found = {name: {"all draws": _mean(cosines, 0), "eight draws": _mean(cosines, 1)} for name, cosines in rows.items()}
    return {"draws": many, "images": shown, "ceiling": statistics.fmean(ceiling), "credit": found}


def _parts(count: int, size: int) -> Iterator[slice]:
    yield from (slice(start, start + size) for start in range(0, count, size))


def _gradient(policy: Any, condition: Tensor, codes: Tensor, draws: Tensor, credit: str, radius: int, places: Tensor) -> Tensor:
    """Of the policy term, flat, from draws (1, G, T) and their rewards by place; advantages centred and not scaled."""
    rewards = places.mean(-1, keepdim=True) if credit == "image" else grpo.around(places, radius)
    advantages = rewards - rewards.mean(1, keepdim=True)
    policy.generator.zero_grad()
    predicted = grpo.log_probs(policy.logits(condition, codes))  # (1, T, V)
    weights = torch.zeros_like(predicted).scatter_add_(-1, draws.mT, advantages.expand(draws.shape).mT)
    (predicted * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.generator.parameters() if p.grad is not None])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def _mean(pairs: list[tuple[float, float]], which: int) -> float:
    return statistics.fmean(pair[which] for pair in pairs)


def costs(made: Evidence, rounds: int = 3) -> Scores:
    """Seconds of a step by arm, in turns: medians."""
    params = made.params
    ways = {}
    for name, changes in made.arms.items():
        tune = dataclasses.replace(params.tune, **changes)
        policy = models.load(params.model)
        objective = OBJECTIVES[tune.objective](policy, tune, Reward.of(tune), params.model.precision)
        batch, optimizer = world.batch(policy, tune.images_per_step), optimizer_of(policy.generator, tune)
        ways[name] = functools.partial(update, objective, optimizer, batch, 1)
    return meter.take_turns(torch.device("cpu"), ways, rounds)


# --- runs --------------------------------------------------------------------------------------


def run(made: Evidence, workers: int = 1) -> Scores:
    """Gradients, search, repeat, summarise; evidence.json and evidence.md in the folder."""
    plan = made.plan
    made.prepare()
    gradients, seconds = agreement(made), costs(made)
    sweep = [("search", arm, lr) for arm in made.searched for lr in plan.rates]
    searched: dict[str, dict[str, Scores]] = {arm: {} for arm in made.searched}
    for (_, arm, lr), score in zip(sweep, evidence.share(made, sweep, workers), strict=True):
        searched[arm][f"{lr:g}"] = score
    best = {arm: float(min(by_lr, key=lambda lr: by_lr[lr]["fid"])) for arm, by_lr in searched.items()}
    chosen = {arm: made.known.get(arm) or best[made.same.get(arm, arm)] for arm in made.arms}
    grid = [("report", arm, chosen[arm], 0, seed) for arm in made.arms for seed in plan.tuning_seeds]
    found: dict[str, list[Scores]] = {arm: [] for arm in made.arms}
    for job, row in zip(grid, evidence.share(made, grid, workers), strict=True):
        found[job[1]].append(row)
    rows: Scores = {"base": {name: evidence.spread(found["va-pi"], "base", name) for name in evidence.SHOWN}}
    for arm, runs in found.items():
        rows[arm] = {name: evidence.spread(runs, "tuned", name) for name in evidence.SHOWN}
        rows[arm]["fid minus base"] = evidence.interval([one["tuned"]["fid"] - one["base"]["fid"] for one in runs])
        if arm != "va-pi":
            pairs = zip(runs, found["va-pi"], strict=True)
            rows[arm]["fid minus va-pi"] = evidence.interval([one["tuned"]["fid"] - other["tuned"]["fid"] for one, other in pairs])
    summary = {"gradients": gradients, "seconds_per_step": seconds, "chosen": chosen, "summary": rows}
    everything = {"plan": dataclasses.asdict(plan), **summary, "searched": searched, "runs": found}
    config.write_text(made.out / "evidence.json", json.dumps(everything, indent=1) + "\n")
    config.write_text(made.out / "evidence.md", markdown(summary, searched, plan))
    return summary


def markdown(summary: Scores, searched: dict[str, dict[str, Scores]], plan: evidence.Plan) -> str:
    """The tables that the documentation quotes."""
    gradients = summary["gradients"]
    cosines = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in gradients["credit"].items()]
    words = f"{gradients['images']} images, {gradients['draws']:,} draws each; two halves of them agree by {gradients['ceiling']:.2f}"
    lines = [f"Cosine to the gradient of all draws with one reward an image ({words}):", ""]
    lines += evidence._table(["credit", "all draws", "eight draws"], cosines)
    times = ", ".join(f"{name} {value:.2f}" for name, value in summary["seconds_per_step"].items())
    return "\n".join([*lines, "", f"Seconds of a step, in turns: {times}.", "", evidence.markdown(summary["summary"], searched, plan)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("artifacts/evidence-objectives"))
    parser.add_argument("--samples", type=int, default=Plan.samples)
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0: one per core")
    parser.add_argument("--arms", nargs="+", default=[*Evidence.arms], choices=[*Evidence.arms], help="which to run beside va-pi")
    arguments = parser.parse_args()
    made = Evidence(arguments.out, recipe("digits"), Plan(samples=arguments.samples), None)
    made.only({"va-pi", *arguments.arms})
    result = run(made, arguments.workers)
    print((arguments.out / "evidence.md").read_text())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
