"""What VA-pi is compared with: other losses on the same policy and images, in the same loop.

    ste        the reward's own gradient, past the draws: codes are decoded as drawn, and differentiated as if their
               expected codebook vector had been decoded (straight-through; the paper's table 2)
    cca        condition contrastive alignment (arXiv 2410.09347): an image becomes likelier under its class, and
               less likely under another one, against the base
    ar_grpo    GRPO on free draws (AR-GRPO, arXiv 2508.06924), rewarded for what was asked and not for an image
    tokenizer  the generator stays, and the tokenizer's decoder learns to paint its teacher-forced draws

The cross-entropy alone (fine-tuning on the images) is VA-pi with ``policy_weight`` 0.

Of the released straight-through baseline differ: vectors are the tokenizer's, of length one (it multiplies with the raw codebook);
the softmax that is differentiated has no Gumbel noise (it would take a random number for every code of the codebook); one draw an
image, so ``group_size`` does not matter. Of CCA is left out that it drops a tenth of the classes to keep a model without condition;
it draws nothing, so that sizes, temperature and weights of draws, reward and prior do not matter to it. AR-GRPO's own rewards (six
networks of others) are not part of this package; its guidance while drawing is, and the ratio is that of the predictions without it.
The tokenizer's adversarial loss is left out, as in the paper.

Shapes: B images, G group, T codes, V codebook, K code width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi import grpo, models
from vapi.config import TUNED, TuneConfig
from vapi.launch import ALONE, World
from vapi.models import Policy, vq, weights
from vapi.objective import (
    DRAW,
    HOLDOUT_DRAWS,
    OTHER,
    Batch,
    Draws,
    Objective,
    Rollout,
    Rollouts,
    Terms,
    finite,
    frozen_copy,
    named_means,
)
from vapi.prediction import Prediction
from vapi.rewards import Reward


class StraightThrough(Objective):
    """L = -reward(decode(h + p - stop(p))) + beta * cross-entropy, h the drawn codes one-hot and p their probabilities."""

    def pieces(self, batch: Batch, step: int, made: Rollouts | None = None) -> Iterator[tuple[float, Tensor, Terms]]:
        tune = self.tune
        for share, part in self.parts(batch):
            predicted = self.predict(self.policy, part.condition, self.context(part, step))
            terms = self.surety(predicted, part.codes, step)
            keys = grpo.keys(part.rows, tune.seed, DRAW, step).to(part.codes.device)
            uniforms = grpo.uniforms(keys, 1, part.codes.shape[1])
            true, vectors = predicted.ask(self.drawn, part.codes[..., None], uniforms.mT)
            with models.autocast(self.precision, self.policy.device):
                rewards, parts = self.reward.score(self.policy.paint(vectors)[:, None], part.images, asked=part.asked)
            loss = tune.prior_weight * grpo.prior_ce(true) - tune.policy_weight * rewards.mean()
            found = {**terms, **named_means(parts), "reward": rewards.mean(), "loss": loss}
            yield share, loss, finite({name: value.detach() for name, value in found.items()}, step)

    def drawn(self, log_probs: Tensor, codes: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the true codes (N, 1), and codebook vectors (N, K) of one draw, with the gradient of their expectation."""
        book = self.policy.codebook
        expected = grpo.tempered(log_probs, self.tune.temperature).exp() @ book.to(log_probs.dtype)
        hard = book[grpo.draw(log_probs, self.tune.temperature, uniforms)[:, 0]]
        return grpo.chosen(log_probs, codes), hard + expected - expected.detach()


class Contrastive(Objective):
    """L = -log s(b * r(x, c)) - w * log s(-b * r(x, c')), over 1 + w: r the log-ratio of policy and base for an image's codes x,
    c its class, c' another, s the logistic function, b ``cca_beta``, w ``cca_weight``."""

    def __init__(self, policy: Policy, tune: TuneConfig, reward: Reward, precision: str = "float32", world: World = ALONE) -> None:
        super().__init__(policy, tune, reward, precision, world)
        self.base = self.base or frozen_copy(policy)

    def pieces(self, batch: Batch, step: int, made: Rollouts | None = None) -> Iterator[tuple[float, Tensor, Terms]]:
        beta, weight = self.tune.cca_beta, self.tune.cca_weight
        for share, part in self.parts(batch):
            context = self.context(part, step)
            true, own = self.ratio(part.condition, context, part.codes)
            _, other = self.ratio(self.others(part, step), context, part.codes)
            loss = contrast(own, other, beta, weight)
            right = (own.detach() > other.detach()).float().mean()
            found = {"ce": grpo.prior_ce(true), "ratio": own.mean(), "ratio_other": other.mean(), "told_apart": right, "loss": loss}
            yield share, loss, finite({name: value.detach() for name, value in found.items()}, step)

    def others(self, batch: Batch, step: int) -> Tensor:
        """Another class for each image, any with the same probability."""
        classes = self.policy.num_classes
        keys = grpo.keys(batch.rows, self.tune.seed, OTHER, step).to(batch.condition.device)
        return (batch.condition + 1 + (grpo.uniforms(keys) * (classes - 1)).long()) % classes

    def ratio(self, condition: Tensor, context: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the codes (B, T), and how much likelier an image is to the policy than to the base, (B,)."""
        assert self.base is not None

        def chosen(policy: Policy) -> Tensor:
            predicted = self.predict(policy, condition, context)
            (found,) = predicted.ask(lambda log_probs, codes: (grpo.chosen(log_probs, codes),), codes[..., None])
            return found[..., 0]

        with torch.no_grad():
            before = chosen(self.base)
        now = chosen(self.policy)
        return now, (now - before).sum(1)


def contrast(own: Tensor, other: Tensor, beta: float, weight: float) -> Tensor:
    """CCA's loss of log-ratios (B,) under the own class and under another -> ()."""
    return -(F.logsigmoid(beta * own) + weight * F.logsigmoid(-beta * other)).mean() / (1 + weight)


class FreeRunning(Objective):
    """Equation 11's clipped term on G free draws of each condition, plus beta * k3 of KL(policy || base) on them."""

    def pieces(self, batch: Batch, step: int, made: Rollouts | None = None) -> Iterator[tuple[float, Tensor, Terms]]:
        made = {} if made is None else made
        for number, (share, part) in enumerate(self.parts(batch)):
            if number not in made:
                made[number] = self.free(part, step)
            draws = made[number].draws
            assert draws is not None
            count = len(draws.codes)
            for rows in torch.arange(count).split(self.tune.images_per_forward):
                one = part.condition[rows // self.tune.group_size]
                yield share * len(rows) / count, *self.loss_of(one, draws, slice(int(rows[0]), int(rows[-1]) + 1), step, made[number])

    @torch.no_grad()
    def free(self, batch: Batch, step: int) -> Rollout:
        """G free draws of each condition with what they were worth, each draw a row of its own: (B x G, 1, T)."""
        codes = self.sampled(batch, self.tune.group_size, grpo.keys(batch.rows, self.tune.seed, DRAW, step))
        draws, terms = self.judged(codes, batch, step)
        rows = codes.flatten(0, 1)[:, None]
        old = torch.zeros(rows.shape, device=rows.device)  # filled by the first update, which predicts them anyway
        return Rollout(Draws(rows, draws.advantages.flatten()[:, None], old, self.under_base(rows, batch.condition)), terms)

    def sampled(self, batch: Batch, group: int, keys: Tensor) -> Tensor:
        """Free draws (B, G, T), those of an image by its key (B,); as many at a time as are decoded."""
        seeds = (grpo.uniforms(keys.cpu(), group) * 2**32).long().flatten()
        temperature, guidance, found = self.tune.temperature, self.tune.rollout_guidance, []
        with models.autocast(self.precision, self.policy.device):
            for rows in torch.arange(len(seeds)).split(self.tune.images_per_reward):
                condition = batch.condition[rows // group]
                found.append(self.policy.generate(condition, seeds[rows].tolist(), temperature=temperature, guidance=guidance))
        return torch.cat(found).unflatten(0, (len(batch), group))

    def under_base(self, rows: Tensor, condition: Tensor) -> Tensor | None:
        """The base's log-probabilities of draws (B x G, 1, T), if the prior asks for them."""
        if self.base is None:
            return None
        found = []
        for few in torch.arange(len(rows)).split(self.tune.images_per_forward):
            codes = rows[few, 0]
            found.append(self.chosen(self.predict(self.base, condition[few // self.tune.group_size], codes), codes, rows[few])[1])
        return torch.cat(found)

    def loss_of(self, condition: Tensor, draws: Draws, few: slice, step: int, rollout: Rollout) -> tuple[Tensor, Terms]:
        """Of some draws under their conditions."""
        tune, codes = self.tune, draws.codes[few]
        predicted = self.predict(self.policy, condition, codes[:, 0])
        with torch.no_grad():
            (entropy,) = predicted.ask(lambda log_probs: (grpo.entropy(log_probs),))
        new = self.chosen(predicted, codes[:, 0], codes)[1]
        assert draws.old is not None
        if rollout.updates == 0:
            draws.old[few] = new.detach()
        policy, clipped = grpo.policy_term(new, draws.old[few], draws.advantages[few], tune.ratio_clip)
        loss = tune.policy_weight * policy
        terms = {**rollout.terms, "entropy": entropy.mean(), "policy": policy.detach(), "clip_fraction": clipped}
        if draws.base is not None:
            prior = grpo.prior_kl(new, draws.base[few])
            terms["kl"] = prior.detach()
            loss = loss + tune.prior_weight * prior
        return loss, finite({**terms, "loss": loss.detach()}, step)

    def tried(self, predicted: Prediction, batch: Batch, keys: Tensor) -> Tensor:
        return self.sampled(batch, HOLDOUT_DRAWS, keys)


class Decoder(Objective):
    """L = -reward(decode(x)) of one teacher-forced draw x of the frozen generator: what follows the codebook is trained."""

    def __init__(self, policy: Policy, tune: TuneConfig, reward: Reward, precision: str = "float32", world: World = ALONE) -> None:
        super().__init__(policy, tune, reward, precision, world)
        policy.generator.requires_grad_(False)
        for part in (policy.tokenizer.decoder, policy.tokenizer.post_quant_conv):
            part.requires_grad_(True)

    @property
    def trained(self) -> nn.Module:
        return self.policy.tokenizer

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        tokenizer: Any = self.policy.tokenizer
        weights.save(tokenizer, folder / TUNED["tokenizer"], vq.metadata(tokenizer.config), tensors)

    def pieces(self, batch: Batch, step: int, made: Rollouts | None = None) -> Iterator[tuple[float, Tensor, Terms]]:
        for share, part in self.parts(batch):
            with torch.no_grad():
                predicted = self.predict(self.policy, part.condition, self.context(part, step))
                terms = self.surety(predicted, part.codes, step)
                codes = self.draw(predicted, 1, grpo.keys(part.rows, self.tune.seed, DRAW, step).to(part.codes.device))
            with models.autocast(self.precision, self.policy.device):
                rewards, parts = self.reward.score(self.policy.decode(codes[:, 0])[:, None], part.images, asked=part.asked)
            loss = -self.tune.policy_weight * rewards.mean()
            found = {**terms, **named_means(parts), "reward": rewards.mean(), "loss": loss}
            yield share, loss, finite({name: value.detach() for name, value in found.items()}, step)


OBJECTIVES: dict[str, type[Objective]] = {
    "va_pi": Objective,
    "ste": StraightThrough,
    "cca": Contrastive,
    "ar_grpo": FreeRunning,
    "tokenizer": Decoder,
}
"""What ``tune.objective`` names."""
