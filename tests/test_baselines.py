"""Other objectives: by hand, and as properties on a tiny real policy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_naive import TUNE, flat_gradient, problem
from torch import Tensor

from vapi import baselines, rewards
from vapi.baselines import Contrastive, StraightThrough
from vapi.config import ModelConfig, TuneConfig
from vapi.objective import Batch, Objective


def made(kind: str, model: ModelConfig, **changes: object) -> tuple[Objective, Batch]:
    tune = TuneConfig(**{**vars(TUNE), "objective": kind, **changes})  # type: ignore[arg-type]
    objective, batch, near = problem(model, torch.float32)
    reward = rewards.Reward(tune.rewards, functions={"near": near})
    return baselines.OBJECTIVES[kind](objective.policy, tune, reward), batch


def gradient(objective: Objective, batch: Batch, step: int = 1) -> tuple[Tensor, dict[str, float]]:
    objective.policy.generator.zero_grad()
    totals: dict[str, float] = {}
    for share, loss, terms in objective.pieces(batch, step):
        (share * loss).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + share * float(value)
    return flat_gradient(objective.policy), totals


def test_contrast_by_hand() -> None:
    own, other = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    terms = [4 * log_sigmoid(0.0), log_sigmoid(0.5 * 2.0) + 3 * log_sigmoid(0.5 * 1.0)]
    assert float(baselines.contrast(own, other, 0.5, 3.0)) == pytest.approx(-sum(terms) / 2 / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["ste", "cca"])
def test_parts_of_a_batch_are_the_batch(tiny_model: ModelConfig, kind: str) -> None:
    objective, batch = made(kind, tiny_model, images_per_forward=6)
    whole, numbers = gradient(objective, batch)
    objective.tune = replace(objective.tune, images_per_forward=2)
    parts, again = gradient(objective, batch)
    assert ((whole - parts).norm() / whole.norm()).item() < 1e-4 and again == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_contrast_begins_at_the_base_and_tells_classes_apart(tiny_model: ModelConfig) -> None:
    """At the first step both ratios are 0; steps along the gradient raise the own class's over the others'."""
    objective, batch = made("cca", tiny_model, cca_beta=0.5, cca_weight=2.0, context_noise=0.0)
    assert isinstance(objective, Contrastive)
    _, first = gradient(objective, batch)
    assert first["ratio"] == first["ratio_other"] == 0 and first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    others = objective.others(batch, 1)
    assert (others != batch.condition).all() and others.min() >= 0 and others.max() < objective.policy.num_classes
    assert not torch.equal(others, objective.others(batch, 2)), "another step, other classes"
    optimizer = torch.optim.SGD(objective.policy.generator.parameters(), lr=0.05)
    for _ in range(20):
        _, last = gradient(objective, batch, step=1)
        optimizer.step()
    assert last["loss"] < first["loss"] and last["ratio"] > 0 > last["ratio_other"] and last["told_apart"] == 1


def test_contrast_needs_classes(captioned_model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="draws from captions"):
        made("cca", captioned_model)


def test_straight_through_decodes_what_is_drawn(tiny_model: ModelConfig) -> None:
    """The reward is that of the drawn codes, and its gradient reaches the generator; with another beta, only the prior's part moves."""
    objective, batch = made("ste", tiny_model, prior_weight=0.0, context_noise=0.0)
    assert isinstance(objective, StraightThrough)
    policy = objective.policy
    seen: list[Tensor] = []
    paint = policy.paint
    policy.paint = lambda vectors: seen.append(vectors.detach()) or paint(vectors)  # type: ignore[method-assign, func-returns-value]
    found, numbers = gradient(objective, batch)
    nearest = torch.cdist(torch.cat(seen), policy.codebook[None]).min(-1)
    assert nearest.values.max() < 1e-3, "decoded vectors are the codebook's"
    total, _ = rewards.Reward.score(objective.reward, policy.decode(nearest.indices)[:, None], batch.images)
    assert numbers["reward"] == pytest.approx(float(total.mean()), rel=1e-4)
    assert found.norm() > 0 and numbers["loss"] == pytest.approx(-numbers["reward"], rel=1e-5)


def test_straight_through_raises_the_reward(tiny_model: ModelConfig) -> None:
    objective, batch = made("ste", tiny_model, prior_weight=0.0, context_noise=0.0)
    optimizer = torch.optim.Adam(objective.policy.generator.parameters(), lr=1e-2)
    seen = []
    for step in range(60):
        seen.append(gradient(objective, batch, step)[1]["reward"])
        optimizer.step()
    assert sum(seen[-10:]) > sum(seen[:10]), seen


@pytest.mark.parametrize("changes", [{"policy_dropout": "official"}, {"credit": "token"}, {"prior": "kl"}])
def test_what_an_objective_does_not_know_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"tune.{next(iter(changes))} is .*, which objective ste knows nothing of"):
        TuneConfig(objective="ste", **changes)  # type: ignore[arg-type]
