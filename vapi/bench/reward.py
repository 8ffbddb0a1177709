"""Decoding and reward, most of a step's work: images per second in each precision and memory layout.

``naive`` is the released way (``naive.rewards``): eight pictures at a time, the features of an image anew for each
of its draws. The headline is what ``vapi tune`` would do with this configuration; ``ways`` holds them all.

Shapes: B images, G group, T codes.
"""

from __future__ import annotations

from typing import Any

import torch

from vapi import models, parallelize
from vapi.bench import meter, naive, world
from vapi.bench.meter import Work
from vapi.config import Measured
from vapi.objective import Objective


def reward(settings: Measured) -> dict[str, Any]:
    """Time the reward of one forward's images, ``tune.images_per_forward``, each drawn ``tune.group_size`` times."""
    built = world.world(settings)
    policy, device, tune, precision = built.policy, built.device, settings.tune, settings.model.precision
    parallelize.require_compiler(tune, device)
    functions = world.reward(settings, device)
    operations = world.count(policy, functions)
    released, theirs = world.laid_out(policy, functions, torch.contiguous_format)
    weighted = {function: theirs.weights[name] for name, function in theirs.functions.items()}
    count, group = min(tune.images_per_forward, tune.images_per_step), tune.group_size
    batch = world.batch(policy, count)
    codes = torch.randint(policy.vocab, (count, group, policy.num_codes), device=device)

    def released_reward() -> None:
        with models.autocast(precision, device):
            naive.rewards(released, codes, batch.images, weighted)

    ways: dict[str, Work] = {"naive": released_reward}
    for name in ("float32", "bfloat16"):
        for last in (False, True):
            networks = world.laid_out(policy, functions, torch.channels_last if last else torch.contiguous_format)
            objective = Objective(networks[0], tune, networks[1], name)
            ways[f"{name} channels_last" if last else name] = lambda objective=objective: objective.score(codes, batch.images)  # type: ignore[misc]
    whole = Objective(policy, tune, functions, precision)
    parallelize.speed_up(policy, functions, tune)
    ways["ours"] = lambda: whole.score(codes, batch.images)
    ways["ours"]()
    memory = meter.peak_memory(device, ways["ours"])
    took = meter.take_turns(device, ways, settings.bench.rounds)
    pictures, peak = count * group, meter.peak(device, precision)
    return {
        "weights": built.weights,
        "image_size": policy.image_size,
        "precision": precision,
        "compile": tune.compile,
        "images": count,
        "group_size": group,
        "images_per_reward": tune.images_per_reward,
        "seconds_per_image": took["ours"] / pictures,
        "naive_seconds_per_image": took["naive"] / pictures,
        "speedup": took["naive"] / took["ours"],
        "images_per_second": pictures / took["ours"],
        "ways": {name: pictures / seconds for name, seconds in took.items()},
        "model_flops_utilisation": count * operations.shared(group)["reward"] / took["ours"] / peak.flops,
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "peak_memory_bytes": memory,
    }
