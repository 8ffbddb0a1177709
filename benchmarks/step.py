"""How much faster one shared step is than the released algorithm, at the embedded world's sizes.

    python benchmarks/step.py                     # JSON on standard output, about a minute on 2 cores

``transformer``: forward, draws, loss and backward, rewards given; ``with_unused_base``: the same against
the released C2I run, which also forwards a frozen base model; ``whole``: decoding and reward as well
(they dominate here, and both need G of them per image). Shared and naive take turns, so that a busy
machine slows both; medians. Weights are random: no figure depends on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import naive
import torch

from vapi import rewards
from vapi.config import TuneConfig
from vapi.digits.build import WORLD
from vapi.models import features, gpt, llamagen, vq
from vapi.objective import Batch, Objective


def world(images: int, group: int) -> tuple[Objective, Batch, dict[naive.RewardFunction, float]]:
    """A policy of the embedded world's sizes, random images and the demo's reward."""
    torch.manual_seed(0)
    tokenizer = vq.VQModel(WORLD.tokenizer).eval().requires_grad_(False)
    policy = llamagen.LlamaGen(gpt.Transformer(WORLD.generator).eval(), tokenizer, 32)
    tune = TuneConfig(images_per_step=images, images_per_forward=images, group_size=group)
    near = rewards.Lpips(features.random_twin().features)
    reward = rewards.Reward(tune.rewards, functions={"lpips": near})
    pixels = torch.rand(images, 3, 32, 32) * 2 - 1
    batch = Batch(torch.arange(images), pixels, policy.encode(pixels), policy.condition(torch.arange(images) % policy.num_classes))
    return Objective(policy, tune, reward), batch, {rewards.mse: 1.0, near: 1.0}


def ways(images: int, group: int) -> dict[str, Callable[[], object]]:
    """Name -> one step of that kind, gradient included."""
    objective, batch, functions = world(images, group)
    policy, values = objective.policy, torch.randn(images, group)

    def shared() -> None:
        for share, loss, _ in objective.pieces(batch, 1):
            (share * loss).backward()

    def shared_transformer() -> None:
        score, objective.score = objective.score, lambda codes, targets: (values, {})  # type: ignore[method-assign]
        shared()
        objective.score = score  # type: ignore[method-assign]

    def released(**given: object) -> Callable[[], object]:
        return lambda: naive.step(policy, batch.images, batch.codes, batch.condition, functions, group=group, **given)  # type: ignore[arg-type]

    return {
        "shared transformer": shared_transformer,
        "naive transformer": released(values=values),
        "naive transformer with_unused_base": released(values=values, base=policy),
        "shared whole": shared,
        "naive whole": released(),
    }


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; one unmeasured round first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="images per step")
    parser.add_argument("--group", type=int, default=8, help="draws per image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seconds = measure(ways(given.images, given.group), given.rounds)
    ratios = {
        "transformer": seconds["naive transformer"] / seconds["shared transformer"],
        "with_unused_base": seconds["naive transformer with_unused_base"] / seconds["shared transformer"],
        "whole": seconds["naive whole"] / seconds["shared whole"],
    }
    report = {**vars(given), "ratio": {k: round(v, 2) for k, v in ratios.items()}, "seconds": {k: round(v, 4) for k, v in seconds.items()}}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
