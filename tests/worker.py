"""What the tests of ``launch`` run in several processes: ``python worker.py gradient|tokens|tune|evaluate FILE.json``."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from vapi import evaluate, launch, models, objective, parallelize, prediction, tokens
from vapi import tune as stage
from vapi.baselines import OBJECTIVES
from vapi.config import Config, build
from vapi.rewards import Reward


def gradient(given: dict[str, Any], settings: Config) -> None:
    """The gradient and the numbers of one step, and what the held-out images showed."""
    model, tune = settings.model, settings.tune
    prediction.MOST = int(given.get("most", prediction.MOST))
    world = launch.world()
    policy = models.load(model)
    if model.precision == "float32":
        policy.generator.double()  # or it would be rounding that is compared
        policy.tokenizer.to(torch.float64 if tune.objective == "tokenizer" else torch.float32)
    target = OBJECTIVES[tune.objective](policy, tune, Reward.of(tune), model.precision, world)
    parallelize.parallelize(policy, tune, world)
    examples = stage.Examples(model, tune, Path(given["subset"]), Path(given["tokens"]))
    batch = examples.load(examples.order(1)[world.part(tune.images_per_step)], policy)
    trained = [p for p in target.trained.parameters() if p.requires_grad]
    values = objective.update(target, torch.optim.SGD(trained, 0.0), batch, 1)
    gradients = {name: p.grad for name, p in target.trained.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    looked = target.look(examples.load(examples.held[world.part(tune.holdout_images)], policy), 1)
    if world.first:
        save_file(whole, given["out"])
        Path(given["out"]).with_suffix(".json").write_text(json.dumps({**values, **looked}))
    launch.leave()


def tokenize(given: dict[str, Any], settings: Config) -> None:
    tokens.tokens(settings.model, settings.tokens, Path(given["subset"]), Path(given["out"]))
    launch.leave()


def tune(given: dict[str, Any], settings: Config) -> None:
    if "memory" in given:  # bytes beyond what is taken by now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(given["memory"]),) * 2)
    stage.tune(settings.model, settings.tune, Path(given["subset"]), Path(given["tokens"]), Path(given["out"]))
    launch.leave()


def judge(given: dict[str, Any], settings: Config) -> None:
    evaluate.evaluate(settings.model, settings.evaluate, Path(given["tune"]), Path(given["out"]))
    launch.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch.end_with_starter()
    given = json.loads(Path(sys.argv[2]).read_text())
    {"gradient": gradient, "tokens": tokenize, "tune": tune, "evaluate": judge}[sys.argv[1]](given, build(Config, given["config"]))
