"""The shared step is the released algorithm: same gradient, same loss, an eighth of the work."""

from __future__ import annotations

import pytest
import torch
from conftest import CAPTIONS
from torch import Tensor

from vapi import grpo, models, rewards
from vapi.bench import naive
from vapi.config import ModelConfig, TuneConfig
from vapi.models import features
from vapi.objective import Batch, Objective

TUNE = TuneConfig(rewards={"mse": 1.0, "near": 1.0}, group_size=8, context_noise=0.3, images_per_forward=4, images_per_reward=12)


def problem(model: ModelConfig, dtype: torch.dtype, tune: TuneConfig = TUNE) -> tuple[Objective, Batch, rewards.Lpips]:
    """A tiny policy and six images, everything in ``dtype``."""
    policy = models.load(model)
    policy.generator.to(dtype)
    policy.tokenizer.to(dtype)
    near = rewards.Lpips(features.random_twin(1).to(dtype).features)
    reward = rewards.Reward(tune.rewards, functions={"near": near})
    random = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=random).to(dtype) * 2 - 1
    asked = policy.condition([0, 3, 9, 3, 1, 7] if policy.num_classes else [*CAPTIONS, *CAPTIONS[:2]])
    asked = asked.to(dtype) if asked.is_floating_point() else asked
    batch = Batch(torch.arange(6), images, policy.encode(images), asked)
    return Objective(policy, tune, reward), batch, near


def exact_norm(self: torch.nn.Module, x: Tensor) -> Tensor:
    """transformers' norm without its float32."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def flat_gradient(policy: models.Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.generator.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["tiny_model", "captioned_model", "janus_model"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_gradient_and_loss_equal_the_naive_step(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    if dtype == torch.float64:  # networks compute some things in float32 whatever the weights; here nothing may round
        monkeypatch.setattr(Tensor, "float", Tensor.double)
        monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)
    tune = TuneConfig(**{**vars(TUNE), "temperature": temperature})
    objective, batch, near = problem(request.getfixturevalue(kind), dtype, tune)
    policy, totals = objective.policy, dict.fromkeys(("loss", "ce", "policy", "clip_fraction"), 0.0)
    for share, loss, terms in objective.pieces(batch, step=3):
        (share * loss).backward()
        totals = {name: value + share * terms[name].item() for name, value in totals.items()}
    shared = flat_gradient(policy)

    policy.generator.zero_grad()
    context = objective.context(batch, 3)
    actions = objective.draw(objective.predict(policy, batch.condition, context), 8, grpo.keys(batch.rows, tune.seed, 2, 3))
    functions = {rewards.mse: 1.0, near: 1.0}
    values = naive.rewards(policy, actions, batch.images, functions)
    torch.testing.assert_close(values, objective.score(actions, batch.images)[0], rtol=10 * tolerance, atol=10 * tolerance)
    # the same rewards for both: an advantage divides by their small spread, and would magnify the rounding of another chunk size
    values = torch.cat([objective.score(actions[part], batch.images[part])[0] for part in (slice(0, 4), slice(4, 6))])
    expected = naive.step(policy, batch.images, batch.codes, batch.condition, functions, temperature=temperature,
                          context=context, actions=actions, values=values)  # fmt: skip
    released = flat_gradient(policy)
    assert ((shared - released).norm() / released.norm()).item() < tolerance
    assert totals == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert totals["clip_fraction"] == 0


@pytest.mark.parametrize("kind", ["tiny_model", "janus_model"])
def test_credit_of_everything_around_is_that_of_the_image(request: pytest.FixtureRequest, kind: str) -> None:
    """Where every code answers for all places, token by token is image by image; where it answers for its own, it is something else."""
    found = {}
    for name, credit in {"image": {}, "around": {"credit": "token", "credit_radius": 3}, "own": {"credit": "token"}}.items():
        objective, batch, _ = problem(request.getfixturevalue(kind), torch.float32, TuneConfig(**{**vars(TUNE), **credit}))
        pieces = list(objective.pieces(batch, step=3))
        sum(share * loss for share, loss, _ in pieces).backward()
        found[name] = flat_gradient(objective.policy), pieces[-1][2]
    (image, numbers), (around, same), (own, others) = found.values()
    assert ((image - around).norm() / image.norm()).item() < 1e-4 and ((image - own).norm() / image.norm()).item() > 0.1
    for name in ("reward", "reward_mse", "reward_std", "ce"):
        assert float(same[name]) == pytest.approx(float(numbers[name]), rel=1e-5) == float(others[name])


def test_naive_runs_alone(tiny_model: ModelConfig) -> None:
    """As the authors run it: own draws, own rewards, dropout on, an unused base model."""
    objective, batch, near = problem(tiny_model, torch.float32)
    torch.manual_seed(0)
    terms = naive.step(objective.policy, batch.images, batch.codes, batch.condition, {rewards.mse: 1.0, near: 1.0},
                       base=models.load(tiny_model), train=True)  # fmt: skip
    assert terms["clip_fraction"] > 0 and flat_gradient(objective.policy).isfinite().all() and not objective.policy.generator.training


def test_naive_draws_follow_the_prediction() -> None:
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(1, 2, 3)
    torch.manual_seed(0)
    drawn = naive.sample(logits, 5000, 1.0)
    assert drawn.shape == (1, 5000, 2)
    assert torch.allclose(torch.bincount(drawn.flatten()) / 10_000, torch.tensor([0.7, 0.2, 0.1]), atol=0.02)


def test_naive_takes_G_forwards_where_the_shared_step_takes_one(tiny_model: ModelConfig) -> None:
    objective, batch, _ = problem(tiny_model, torch.float32)
    rows: list[int] = []
    objective.policy.blocks[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    list(objective.pieces(batch, 1))
    assert sum(rows) == 6
    rows.clear()
    naive.step(objective.policy, batch.images, batch.codes, batch.condition, {rewards.mse: 1.0})
    assert sum(rows) == 6 + 6 * 8


def test_naive_sampling_follows_the_prediction(tiny_policy: models.Policy) -> None:
    """Greedy, its codes are those that the teacher-forced prediction of the same codes finds likeliest."""
    labels = tiny_policy.condition([0, 3, 9])
    for how in ({"top_k": 1}, {"top_p": 1e-9}):
        codes = naive.generate(tiny_policy.generator, labels, **how)  # type: ignore[arg-type]
        assert torch.equal(tiny_policy.logits(labels, codes).argmax(-1), codes)
    none = torch.full_like(labels, 10)
    guided = naive.generate(tiny_policy.generator, labels, top_k=1, guidance=2.5)  # type: ignore[arg-type]
    with_class, without = tiny_policy.logits(labels, guided), tiny_policy.logits(none, guided)
    assert torch.equal((without + 2.5 * (with_class - without)).argmax(-1), guided)


def test_naive_sampling_of_captions_follows_the_prediction(captioned_policy: models.Policy) -> None:
    policy, captions = captioned_policy, captioned_policy.condition(CAPTIONS)
    codes = naive.generate(policy.generator, captions, top_k=1, guidance=2.5)
    assert torch.equal(codes, policy.generate(captions, [0] * 4, top_k=1, guidance=2.5))
