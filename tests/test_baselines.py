"""Other objectives: by hand, and as properties on a tiny real policy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CAPTIONS
from test_naive import TUNE, flat_gradient, problem
from torch import Tensor

from vapi import baselines, grpo, rewards
from vapi import objective as objectives
from vapi.baselines import Contrastive, FreeRunning, StraightThrough
from vapi.config import ModelConfig, TuneConfig
from vapi.objective import DRAW, Batch, Objective, optimizer_of, update


def made(kind: str, model: ModelConfig, **changes: object) -> tuple[Objective, Batch]:
    tune = TuneConfig(**{**vars(TUNE), "objective": kind, **KNOBS[kind], **changes})
    objective, batch, near = problem(model, torch.float32)
    reward = rewards.Reward(tune.rewards, functions={"near": near, "bright": rewards.OfRequest(bright)})
    asked = batch.condition if objective.policy.num_classes else [*CAPTIONS, *CAPTIONS[:2]]
    return baselines.OBJECTIVES[kind](objective.policy, tune, reward), replace(batch, asked=asked)


def flat_weights(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def bright(images: Tensor, asked: rewards.Asked) -> Tensor:
    """The more is asked for, the brighter: of classes by number, of captions by length."""
    wanted = asked.float() / 5 - 1 if isinstance(asked, Tensor) else torch.tensor([len(words) / 20 - 1 for words in asked])
    return -(images.mean((1, 2, 3)) - wanted).abs()


KNOBS: dict[str, dict[str, Any]] = {
    "va_pi": {},
    "ste": {},
    "cca": {},
    "ar_grpo": {"prior": "kl", "rewards": {"bright": 1.0}, "context_noise": 0.0},
    "tokenizer": {"prior_weight": 0.0},
}


def gradient(objective: Objective, batch: Batch, step: int = 1) -> tuple[Tensor, dict[str, float]]:
    objective.trained.zero_grad()
    totals: dict[str, float] = {}
    for share, loss, terms in objective.pieces(batch, step):
        (share * loss).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + share * float(value)
    return torch.cat([p.grad.flatten() for p in objective.trained.parameters() if p.grad is not None]), totals


def test_contrast_by_hand() -> None:
    own, other = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    terms = [4 * log_sigmoid(0.0), log_sigmoid(0.5 * 2.0) + 3 * log_sigmoid(0.5 * 1.0)]
    assert float(baselines.contrast(own, other, 0.5, 3.0)) == pytest.approx(-sum(terms) / 2 / 4, rel=1e-6)


@pytest.mark.parametrize("kind", list(baselines.OBJECTIVES))
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


# --- free draws --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_model", "captioned_model", "janus_model"])
def test_free_draws_by_hand(request: pytest.FixtureRequest, kind: str) -> None:
    """The gradient is that of the formula, written out with ``logits`` on the draws, at a temperature; the first divergence is 0."""
    objective, batch = made("ar_grpo", request.getfixturevalue(kind), temperature=0.8, prior_weight=0.5)
    assert isinstance(objective, FreeRunning)
    found, numbers = gradient(objective, batch)
    policy, tune = objective.policy, objective.tune
    codes = objective.sampled(batch, tune.group_size, grpo.keys(batch.rows, tune.seed, DRAW, 1))
    assert len(codes.flatten(0, 1).unique(dim=0)) > len(codes), "an image's draws differ"
    values, _ = objective.score(codes, batch.images, asked=batch.asked)
    policy.generator.zero_grad()
    condition = batch.condition.repeat_interleave(tune.group_size, 0)
    log_probs = (policy.logits(condition, codes.flatten(0, 1)) / 0.8).log_softmax(-1)
    taken = log_probs.gather(-1, codes.flatten(0, 1)[..., None])[..., 0].unflatten(0, codes.shape[:2])
    (-(taken * grpo.advantages(values, tune.advantage_clip)[..., None]).mean()).backward()
    expected = flat_gradient(policy)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-3
    assert numbers["reward"] == pytest.approx(float(values.mean()), rel=1e-5) and abs(numbers["kl"]) < 1e-6


def test_free_draws_raise_the_reward_and_leave_the_base(tiny_model: ModelConfig) -> None:
    objective, batch = made("ar_grpo", tiny_model, prior_weight=0.01)
    optimizer = torch.optim.Adam(objective.policy.generator.parameters(), lr=2e-2)
    seen = [update(objective, optimizer, batch, step) for step in range(1, 31)]
    assert np.mean([one["reward"] for one in seen[-5:]]) > np.mean([one["reward"] for one in seen[:5]]) + 0.001
    assert seen[-1]["kl"] > 1e-3 and "ce" not in seen[-1], "free draws have no true codes"
    looked = objective.look(batch, 30)
    assert looked == objective.look(batch, 31) and {"reward", "reward_bright", "ce"} <= looked.keys()


def test_free_draws_follow_guidance(tiny_model: ModelConfig) -> None:
    plain, batch = made("ar_grpo", tiny_model)
    guided, _ = made("ar_grpo", tiny_model, rollout_guidance=3.0)
    assert isinstance(plain, FreeRunning) and isinstance(guided, FreeRunning)
    keys = grpo.keys(batch.rows, 0)
    assert torch.equal(plain.sampled(batch, 2, keys), plain.sampled(batch, 2, keys))
    assert not torch.equal(plain.sampled(batch, 2, keys), guided.sampled(batch, 2, keys))


def test_free_draws_have_no_image_to_compare_with(tiny_model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="no image that mse could compare them with; set their weights to 0"):
        made("ar_grpo", tiny_model, rewards={"mse": 1.0, "bright": 1.0})


# --- the tokenizer -----------------------------------------------------------------------------


def test_the_decoder_alone_is_trained_and_paints_better(tiny_model: ModelConfig) -> None:
    objective, batch = made("tokenizer", tiny_model, context_noise=0.0)
    policy = objective.policy
    before = {name: weight.clone() for name, weight in [*policy.generator.state_dict().items(), *policy.tokenizer.state_dict().items()]}
    codes = policy.encode(batch.images)
    optimizer = optimizer_of(objective.trained, replace(objective.tune, lr=3e-3))
    seen = [update(objective, optimizer, batch, step) for step in range(1, 21)]
    assert np.mean([one["reward"] for one in seen[-3:]]) > np.mean([one["reward"] for one in seen[:3]])
    assert seen[0]["loss"] == pytest.approx(-seen[0]["reward"])
    after = {**policy.generator.state_dict(), **policy.tokenizer.state_dict()}
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    assert torch.equal(policy.encode(batch.images), codes), "images still have the codes that are cached"


@pytest.mark.parametrize("kind", ["ste", "tokenizer"])
def test_rewards_without_a_gradient_are_refused(tiny_model: ModelConfig, kind: str) -> None:
    class Blind(rewards.OfRequest):
        gradient = False

    objective, _, _ = problem(tiny_model, torch.float32)
    tune = TuneConfig(objective=kind, rewards={"blind": 1.0}, **KNOBS[kind])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no gradient passes through the reward blind"):
        baselines.OBJECTIVES[kind](objective.policy, tune, rewards.Reward(tune.rewards, functions={"blind": Blind(bright)}))


# --- several updates of one rollout ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["va_pi", "ar_grpo"])
def test_updates_of_one_rollout(tiny_model: ModelConfig, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are made and rewarded once. The first update is that of a single one; in the second the ratio has left 1, and is clipped."""
    after: dict[int, list[Tensor]] = {}
    clipped, rewarded = {}, {}
    for updates in (1, 2):
        objective, batch = made(kind, tiny_model, updates_per_rollout=updates, ratio_clip=0.01, images_per_forward=2)
        optimizer = torch.optim.SGD(objective.policy.generator.parameters(), lr=0.5)
        calls: list[int] = []
        score = objective.score
        monkeypatch.setattr(objective, "score", lambda *a, _score=score, _calls=calls, **k: (_calls.append(1), _score(*a, **k))[1])
        states: list[Tensor] = []
        optimizer.register_step_post_hook(lambda *_, _of=objective.trained, _to=states: _to.append(flat_weights(_of)))
        clipped[updates] = update(objective, optimizer, batch, 1)["clip_fraction"]
        after[updates], rewarded[updates] = states, len(calls)
    assert torch.equal(after[1][0], after[2][0]) and len(after[2]) == 2 and not torch.equal(after[2][0], after[2][1])
    assert rewarded[1] == rewarded[2] == 3 and clipped[1] == 0 < clipped[2]


def test_every_update_has_dropout_masks_of_its_own(tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[int]] = {}
    masks = objectives._dropout
    for updates in (1, 2):
        of_this: list[int] = []
        monkeypatch.setattr(objectives, "_dropout", lambda policy, seed, _to=of_this: (_to.append(seed), masks(policy, seed))[1])
        objective, batch = made("va_pi", tiny_model, updates_per_rollout=updates, policy_dropout="official", group_size=2)
        update(objective, torch.optim.SGD(objective.policy.generator.parameters(), lr=0.1), batch, 1)
        seen[updates] = of_this
    assert seen[2][: len(batch)] == seen[1] and len(set(seen[2])) == 2 * len(batch)


def test_leave_one_out_weighs_images_by_their_spread(tiny_model: ModelConfig) -> None:
    objective, _ = made("va_pi", tiny_model, baseline="leave_one_out")
    values = torch.tensor([[0.0, 0.1], [0.0, 1.0]])
    assert torch.equal(objective.advantages(values), torch.tensor([[-0.1, 0.1], [-1.0, 1.0]]))
    local, _ = made("va_pi", tiny_model, baseline="leave_one_out", credit="token", rewards={"mse": 1.0})
    torch.testing.assert_close(local.advantages(values[..., None].expand(2, 2, 16))[..., 3], objective.advantages(values))


@pytest.mark.parametrize("changes", [{"policy_dropout": "official"}, {"credit": "token"}, {"prior": "kl"}])
def test_what_straight_through_does_not_know_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"tune.{next(iter(changes))} is .*, which objective ste knows nothing of"):
        TuneConfig(objective="ste", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "changes", "name"),
    [
        ("ar_grpo", {}, "prior"),
        ("ar_grpo", {"prior": "kl", "context_noise": 0.3}, "context_noise"),
        ("ar_grpo", {"prior": "kl", "sharding": "full"}, "sharding"),
        ("tokenizer", {}, "prior_weight"),
        ("tokenizer", {"prior_weight": 0.0, "activation_checkpointing": True}, "activation_checkpointing"),
        ("cca", {"updates_per_rollout": 2}, "updates_per_rollout"),
        ("ste", {"baseline": "leave_one_out"}, "baseline"),
        ("va_pi", {"rollout_guidance": 2.0}, "rollout_guidance"),
    ],
)
def test_what_an_objective_does_not_know_is_refused(objective: str, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"tune.{name} is .*, which objective {objective} knows nothing of; set it to"):
        TuneConfig(objective=objective, **changes)  # type: ignore[arg-type]


def test_updates_without_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="tune.policy_weight 0 draws nothing"):
        TuneConfig(policy_weight=0.0, updates_per_rollout=2)
