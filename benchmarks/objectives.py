"""What objectives cost, and where a gradient of eight draws points, on the embedded digits.

    python benchmarks/objectives.py gradients > benchmarks/results/gradients.json     # half a minute on two cores
    python benchmarks/objectives.py costs [--device cuda] [--rounds 5]

gradients: on images of their own, the direction that G = 8 draws give, against that of thousands of draws with one reward an image,
which is what VA-pi's objective asks for (eq. 4). Rewards of places leave out what a code does elsewhere, so that even thousands of
draws point a little aside; eight of them scatter less. costs: a step of each objective, in turns. (What comes of them is
``vapi experiment objectives`` and ``credit``.)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi import data, grpo, images, models, recipes, tokens
from vapi.baselines import OBJECTIVES
from vapi.bench import meter, world
from vapi.config import Config
from vapi.objective import Objective, optimizer_of, update
from vapi.rewards import Reward
from vapi.subset import subset

Scores = dict[str, Any]
CREDITS = {"image": ("image", 0), "token": ("token", 0), "token, radius 1": ("token", 1), "token, radius 2": ("token", 2)}
TIMED = {
    **recipes.ARMS,
    "VA-pi, 2 updates a rollout": {"tune.updates_per_rollout": 2},
    "VA-pi, dropout as released": {"tune.policy_dropout": "official"},
}


def costs(params: Config, device: torch.device, rounds: int) -> Scores:
    """Seconds of a step by objective: medians, and their ratio to VA-pi's."""
    ways = {}
    for name, changes in TIMED.items():
        tune = recipes.changed(params, changes).tune
        policy = models.load(dataclasses.replace(params.model, device=device.type))
        objective = OBJECTIVES[tune.objective](policy, tune, Reward.of(tune, device), params.model.precision)
        batch, optimizer = world.batch(policy, tune.images_per_step), optimizer_of(objective.trained, tune)
        ways[name] = functools.partial(update, objective, optimizer, batch, 1)
    found = meter.take_turns(device, ways, rounds)
    rows = {name: {"seconds": round(took, 5), "of VA-pi's": round(took / found["VA-pi"], 2)} for name, took in found.items()}
    return {"device": models.device_name(device), "images": params.tune.images_per_step, "rounds": rounds, "steps": rows}


def gradients(params: Config, shown: int = 4, many: int = 2048, groups: int = 8) -> Scores:
    """Cosines of gradients of the policy term, mean over images: of all draws, and of eight, to that of all draws with one reward
    an image (which itself agrees with another such gradient by ``ceiling``)."""
    policy, tune = models.load(params.model), params.tune
    objective = Objective(policy, dataclasses.replace(tune, credit="token"), Reward.of(tune))
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in CREDITS}
    ceiling = []
    made = data.state_dir("benchmarks") / "objectives"
    if not (made / "tokens").exists():
        with contextlib.redirect_stdout(sys.stderr):  # what is printed here is JSON
            subset(params.subset, made / "subset")
            tokens.tokens(params.model, params.tokens, made / "subset", made / "tokens")
    picked, cached = data.read_subset(made / "subset"), data.read_tokens(made / "tokens")
    for row in range(shown):
        target = images.to_float(picked.pixels(row, params.model.image_size)[None], policy.device)
        codes = torch.from_numpy(cached.codes[row : row + 1].astype(int))
        condition = policy.condition([int(picked.labels[row])])
        with torch.no_grad():
            predicted = objective.predict(policy, condition, codes)
            draws = objective.draw(predicted, many, grpo.keys(torch.tensor([row]), 0))
            places = torch.cat([objective.score(part, target, objective.side)[0] for part in draws.split(64, dim=1)], dim=1)
        gradient = functools.partial(_gradient, policy, condition, codes)
        halves = [gradient(draws[:, half], ("image", 0), places[:, half]) for half in _parts(many, many // 2)]
        ceiling.append(_cosine(*halves))
        best = gradient(draws, ("image", 0), places)
        for name, credit in CREDITS.items():
            every = _cosine(gradient(draws, credit, places), best)
            few = list(_parts(groups * tune.group_size, tune.group_size))
            some = [_cosine(gradient(draws[:, part], credit, places[:, part]), best) for part in few]
            rows[name].append((every, statistics.fmean(some)))
    found = {name: {"all draws": round(_mean(cosines, 0), 4), "eight draws": round(_mean(cosines, 1), 4)} for name, cosines in rows.items()}
    return {"draws": many, "images": shown, "ceiling": round(statistics.fmean(ceiling), 4), "credit": found}


def _parts(count: int, size: int) -> Iterator[slice]:
    yield from (slice(start, start + size) for start in range(0, count, size))


def _gradient(policy: Any, condition: Tensor, codes: Tensor, draws: Tensor, credit: tuple[str, int], places: Tensor) -> Tensor:
    """Of the policy term, flat, from draws (1, G, T) and their rewards by place; advantages centred and not scaled."""
    kind, radius = credit
    rewards = places.mean(-1, keepdim=True) if kind == "image" else grpo.around(places, radius)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gradients", "costs"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    params = recipes.recipe("digits")
    print(json.dumps(gradients(params) if given.what == "gradients" else costs(params, torch.device(given.device), given.rounds), indent=1))


if __name__ == "__main__":
    main()
