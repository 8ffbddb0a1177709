"""One optimizer step: the shared one (``vapi.objective``) against the released algorithm (``naive``).

    seconds_per_step, naive_seconds_per_step, speedup        the whole step, draws and rewards and update
    transformer_*                                            forward, draws, loss, backward; rewards given
    parts                                                    share of time, measured piece by piece
    *_utilisation                                            counted operations over what the device can do

The released algorithm goes image by image, so it is timed on at most ``NAIVE_IMAGES`` and scaled to a step.
It runs in the same precision, uncompiled, in the memory layout of the released code; its unused base model is
left out of the times and reported in the operations.

Shapes: B images, G group, T codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from vapi import grpo, models, parallelize
from vapi.bench import meter, naive, world
from vapi.bench.meter import Stopwatch, Work
from vapi.config import Measured
from vapi.launch import ALONE
from vapi.objective import DRAW, Batch, Draws, Objective, optimizer_of, update
from vapi.rewards import Asked

NAIVE_IMAGES = 4
STEP = 1  # noise and draws are those of a run's first step


def tune(settings: Measured) -> dict[str, Any]:
    """Time a step with the recipe's sizes. Raises ValueError where torch.compile finds no compiler, and for another objective."""
    if settings.tune.objective != "va_pi":
        raise ValueError(f"vapi bench tune compares va_pi with its released step, not {settings.tune.objective}; leave tune.objective out")
    built = world.world(settings)
    policy, device, precision = built.policy, built.device, settings.model.precision
    tune = replace(settings.tune, policy_dropout="none", sharding="none", updates_per_rollout=1)
    parallelize.require_compiler(tune, device)
    reward = world.reward(settings, device)
    batch = world.batch(policy, tune.images_per_step)
    operations = world.count(policy, reward)
    released, functions = world.as_released(policy, reward)  # before anything is compiled
    released.generator.to("cpu")  # so that it does not count as ours
    objective = Objective(policy, tune, reward, precision)
    parallelize.speed_up(policy, reward, tune)
    parallelize.parallelize(policy, tune, ALONE)
    optimizer = optimizer_of(policy.generator, tune)

    def step() -> None:
        update(objective, optimizer, batch, STEP)

    step()  # compiles, and makes the optimizer's state
    memory = meter.peak_memory(device, step)
    shares = parts(objective, optimizer, batch)
    released.generator.to(device)
    few = batch[: min(NAIVE_IMAGES, len(batch))]
    scale = len(batch) / len(few)
    values = torch.randn(len(batch), tune.group_size, device=device)
    ways = {
        "shared": step,
        "naive": _released(released, few, functions, objective),
        "shared transformer": _transformer(objective, batch, values),
        "naive transformer": _released(released, few, functions, objective, values[: len(few)]),
    }
    took = meter.take_turns(device, ways, settings.bench.rounds)
    took |= {name: took[name] * scale for name in took if name.startswith("naive")}
    ours, theirs = operations.shared(tune.group_size), operations.released(tune.group_size)
    peak = meter.peak(device, precision)
    return {
        "weights": built.weights,
        "parameters": sum(p.numel() for p in policy.generator.parameters()),
        "image_size": policy.image_size,
        "precision": precision,
        "compile": tune.compile,
        "activation_checkpointing": tune.activation_checkpointing,
        "group_size": tune.group_size,
        "images_per_step": len(batch),
        "images_per_forward": tune.images_per_forward,
        "images_per_reward": tune.images_per_reward,
        "naive_images_timed": len(few),
        "seconds_per_step": took["shared"],
        "naive_seconds_per_step": took["naive"],
        "speedup": took["naive"] / took["shared"],
        "images_per_second": len(batch) / took["shared"],
        "transformer_seconds_per_step": took["shared transformer"],
        "naive_transformer_seconds_per_step": took["naive transformer"],
        "transformer_speedup": took["naive transformer"] / took["shared transformer"],
        "parts": shares,
        "operations_per_image": {"shared": ours, "naive": theirs},
        "operations_ratio": sum(theirs.values()) / sum(ours.values()),
        "operations_ratio_with_unused_base": sum(operations.released(tune.group_size, base=True).values()) / sum(ours.values()),
        "model_flops_utilisation": len(batch) * sum(ours.values()) / took["shared"] / peak.flops,
        "transformer_flops_utilisation": len(batch) * ours["transformer"] / took["shared transformer"] / peak.flops,
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "peak_memory_bytes": memory,
    }


def _released(policy: models.Policy, batch: Batch, functions: Any, objective: Objective, values: torch.Tensor | None = None) -> Work:
    def step() -> None:
        with models.autocast(objective.precision, policy.device):
            naive.step(policy, batch.images, batch.codes, batch.condition, functions, objective.tune.group_size, values=values)
        policy.generator.zero_grad(set_to_none=True)

    return step


def _transformer(objective: Objective, batch: Batch, values: torch.Tensor) -> Work:
    """The shared step without decoding and reward."""

    class Given(Objective):
        def score(
            self, codes: torch.Tensor, targets: torch.Tensor, side: int = 0, asked: Asked = ()
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            given = values[: len(codes)]
            return given[..., None].expand(-1, -1, side * side) if side else given, {}

    given = Given(objective.policy, objective.tune, objective.reward, objective.precision)

    def step() -> None:
        for share, loss, _ in given.pieces(batch, STEP):
            (share * loss).backward()
        objective.policy.generator.zero_grad(set_to_none=True)

    return step


def parts(objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """Shares of a step's time: the work of ``update``, one piece after the other, each waited for."""
    tune, watch = objective.tune, Stopwatch(objective.policy.device)
    parameters = list(objective.policy.generator.parameters())
    optimizer.zero_grad(set_to_none=True)
    for share, part in objective.parts(batch):
        with watch("forward"):
            predicted = objective.predict(objective.policy, part.condition, objective.context(part, STEP))
        with watch("draw"):
            keys = grpo.keys(part.rows, tune.seed, DRAW, STEP).to(part.codes.device)
            codes = objective.draw(predicted, tune.group_size, keys)
        blocks = objective.blocks(*codes.shape[:2])
        with watch("decode"):
            images = list(objective.map(objective.decoded, [codes[block] for block in blocks]))
        with watch("reward features"):
            targets = [part.images[block[0]] for block in blocks]
            scored = list(objective.map(objective.reward_of, images, targets, [objective.side] * len(blocks)))
        with watch("loss"):
            rewards = torch.cat([total.flatten(0, 1) for total, _ in scored]).unflatten(0, codes.shape[:2])
            loss, _ = objective.loss(predicted, part.codes, Draws(codes, objective.advantages(rewards)), STEP, {})
        with watch("backward"):
            (share * loss).backward()
    with watch("optimizer"):
        clip_grad_norm_(parameters, tune.max_grad_norm or float("inf"))
        optimizer.step()
    return watch.shares()
