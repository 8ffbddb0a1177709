"""What VA-pi is compared with: other losses on the same policy, images and reward, in the same loop.

    ste   the reward's own gradient, past the draws: codes are decoded as drawn, and differentiated as if their
          expected codebook vector had been decoded (straight-through; the paper's table 2)
    cca   condition contrastive alignment (arXiv 2410.09347): an image becomes likelier under its class, and
          less likely under another one, against the base

The cross-entropy alone (fine-tuning on the images) is VA-pi with ``policy_weight`` 0.

Of the released straight-through baseline differ: vectors are the tokenizer's, of length one (it multiplies with the raw codebook);
the softmax that is differentiated has no Gumbel noise (it would take a random number for every code of the codebook); one draw an
image, so ``group_size`` does not matter. Of CCA is left out that it drops a tenth of the classes to keep a model without condition;
it draws nothing, so that sizes, temperature and weights of draws, reward and prior do not matter to it.

Shapes: B images, T codes, V codebook, K code width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi import grpo, models
from vapi.config import TuneConfig
from vapi.launch import ALONE, World
from vapi.models import Policy
from vapi.objective import DRAW, OTHER, Batch, Objective, Terms, finite, frozen_copy, named_means
from vapi.rewards import Reward


class StraightThrough(Objective):
    """L = -reward(decode(h + p - stop(p))) + beta * cross-entropy, h the drawn codes one-hot and p their probabilities."""

    def pieces(self, batch: Batch, step: int) -> Iterator[tuple[float, Tensor, Terms]]:
        tune = self.tune
        for share, part in self.parts(batch):
            predicted = self.predict(self.policy, part.condition, self.context(part, step))
            terms = self.surety(predicted, part.codes, step)
            keys = grpo.keys(part.rows, tune.seed, DRAW, step).to(part.codes.device)
            uniforms = grpo.uniforms(keys, 1, part.codes.shape[1])
            true, vectors = predicted.ask(self.drawn, part.codes[..., None], uniforms.mT)
            with models.autocast(self.precision, self.policy.device):
                rewards, parts = self.reward.score(self.policy.paint(vectors)[:, None], part.images)
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
        """Raises ValueError for a policy of captions."""
        super().__init__(policy, tune, reward, precision, world)
        if not policy.num_classes:
            raise ValueError("tune.objective cca contrasts classes, and this model draws from captions; take another objective")
        self.base = self.base or frozen_copy(policy)

    def pieces(self, batch: Batch, step: int) -> Iterator[tuple[float, Tensor, Terms]]:
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


OBJECTIVES: dict[str, type[Objective]] = {"va_pi": Objective, "ste": StraightThrough, "cca": Contrastive}
"""What ``tune.objective`` names."""
