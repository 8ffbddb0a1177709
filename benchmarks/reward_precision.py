"""What the reward loses in bfloat16: advantages against those of float32, for the same draws.

    python benchmarks/reward_precision.py > benchmarks/results/reward_precision.json       # some minutes on 2 cores

``digits``: the embedded model, its own teacher-forced draws of real images. ``published``: the shapes of VQ-16 and
VGG-16 with random weights and random codes. There nothing makes one draw better than another, so rewards of a group lie
closer together than any trained network's would, and rounding weighs most.

An advantage is a reward in units of its group's spread, so the correlation compares exactly what the gradient sees;
``ranking`` counts what changes its order: pairs of draws within a group, and groups with any such pair.

Shapes: B images, G group, T codes.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vapi import data, grpo, images, models
from vapi.bench import meter, world
from vapi.config import Measured, TuneConfig
from vapi.objective import Objective
from vapi.rewards import Reward


def compared(low: Tensor, full: Tensor, clip: float = 5.0) -> dict[str, float]:
    """Rewards (B, G) in low precision against the same in float32."""
    ours, theirs = grpo.advantages(low, clip), grpo.advantages(full, clip)
    pairs = torch.combinations(torch.arange(low.shape[1]))  # (P, 2)
    swapped = (low[:, pairs[:, 0]] - low[:, pairs[:, 1]]).sign() != (full[:, pairs[:, 0]] - full[:, pairs[:, 1]]).sign()  # (B, P)
    found = {
        "advantage_correlation": torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]).double())[0, 1].item(),
        "advantage_largest_error": (ours - theirs).abs().max().item(),
        "advantage_root_mean_square_error": (ours - theirs).square().mean().sqrt().item(),
        "pairs_that_change_order": swapped.float().mean().item(),
        "groups_with_a_changed_ranking": swapped.any(1).float().mean().item(),
        "groups_with_another_best_draw": (low.argmax(1) != full.argmax(1)).float().mean().item(),
        "reward_relative_error": ((low - full).abs().mean() / full.abs().mean()).item(),
        "reward_spread_within_group": (full.std(1).mean() / full.abs().mean()).item(),
    }
    return {name: round(value, 6) for name, value in found.items()}


def case(policy: models.Policy, tune: TuneConfig, reward: Reward, codes: Tensor, targets: Tensor) -> dict[str, object]:
    """The whole reward, and each part of it, on draws (B, G, T) of images (B, 3, H, W)."""
    total, parts = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for precision in ("float32", "bfloat16"):
        total[precision], parts[precision] = Objective(policy, tune, reward, precision).score(codes, targets)
    found: dict[str, object] = {"images": len(codes), "group_size": codes.shape[1], **compared(total["bfloat16"], total["float32"])}
    by_part = {name: compared(parts["bfloat16"][name], parts["float32"][name])["advantage_correlation"] for name in parts["float32"]}
    return found | {"advantage_correlation_by_part": by_part}


def digits(count: int) -> dict[str, object]:
    """The embedded world."""
    settings = Measured()
    policy, tune = models.load(replace(settings.model, device="cpu")), settings.tune
    pixels, labels, _ = data.read_images(Path(settings.evaluate.validation))
    targets = images.to_float(pixels[:count])
    reward = Reward.of(tune)
    objective = Objective(policy, tune, reward)
    with torch.no_grad():
        codes = policy.encode(targets)
        predicted = objective.predict(policy, policy.condition(torch.as_tensor(labels[:count]).long()), codes)
    drawn = objective.draw(predicted, tune.group_size, grpo.keys(torch.arange(count), tune.seed))
    return case(policy, tune, reward, drawn, targets)


def published(count: int, image_size: int) -> dict[str, object]:
    """VQ-16's and VGG-16's shapes with random weights."""
    model = replace(Measured().model, image_size=image_size)
    policy = world.random_policy("GPT-B", model, "cpu")
    tune = replace(TuneConfig(), rewards={"mse": 1.0, "lpips": 1.0}, images_per_reward=8)
    batch = world.batch(policy, count)
    random = torch.Generator().manual_seed(1)
    drawn = torch.randint(policy.vocab, (count, tune.group_size, policy.num_codes), generator=random)
    reward = Reward(tune.rewards, functions={"lpips": world.random_lpips("cpu")})
    return {"image_size": image_size, **case(policy, tune, reward, drawn, batch.images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=512, help="images of the embedded world")
    parser.add_argument("--published", type=int, default=12, help="images for the published shapes")
    parser.add_argument("--image-size", type=int, default=64, help="their side in pixels")
    given = parser.parse_args()
    about = {"date": datetime.date.today().isoformat(), "command": "python benchmarks/reward_precision.py", "machine": meter.machine()}
    cases = {"digits": digits(given.digits), "published": published(given.published, given.image_size)}
    print(json.dumps({**about, **cases}, indent=1))


if __name__ == "__main__":
    main()
