"""The loss of VA-pi on a batch (arXiv 2512.19680, section 3), and the optimizer step made of it.

    context    = corrupt(codes)                                # eq. 28
    logits     = generator(condition, context)                 # once per image, with gradient
    draws      = G token maps from softmax(logits)             # eq. 7, no rollout
    rewards    = -(MSE + LPIPS)(decode(draws), images)         # eq. 10, everything frozen
    advantages = rewards normalised within each image's group  # eq. 4
    loss       = clipped policy term + beta * prior            # eq. 11, eq. 9

The mathematics is in ``grpo``; here is what runs through a network, in pieces that fit. Among several
processes each has its own part of the batch, and gradient and numbers are sums over all of them.

Shapes: B images, G group, T codes, V codebook.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from vapi import grpo, models
from vapi.config import TUNED, TuneConfig
from vapi.launch import ALONE, World
from vapi.models import Policy
from vapi.prediction import Prediction
from vapi.rewards import Asked, Reward, require_fit

ORDER, NOISE, DRAW, DROPOUT, HOLDOUT, OTHER = range(6)  # what a random number is for
HOLDOUT_DRAWS = 1  # per held-out image; always from the same numbers, so that a change shows

Terms = dict[str, Tensor]


@dataclass
class Batch:
    """Images with what the frozen networks know about them."""

    rows: Tensor  # (B,) which images of the subset
    images: Tensor  # (B, 3, H, W) in [-1, 1]
    codes: Tensor  # (B, T)
    condition: Tensor  # (B, ...)
    asked: Asked = ()  # B classes, or captions in words

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.rows[part], self.images[part], self.codes[part], self.condition[part], self.asked[part])


@dataclass
class Draws:
    """G token maps of each image and how they fared."""

    codes: Tensor  # (B, G, T)
    advantages: Tensor  # (B, G), or (B, G, T)
    old: Tensor | None = None  # (B, G, T) log-probabilities when drawn; None: those of now
    base: Tensor | None = None  # (B, G, T) log-probabilities under the frozen base

    def of(self, image: int) -> Draws:
        """The draws of one image, each a row of its own: (G, 1, ...)."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[image, :, None]

        return Draws(self.codes[image, :, None], self.advantages[image, :, None], rows(self.old), rows(self.base))


@dataclass
class Rollout:
    """What was drawn for a part of a batch, and what that showed; it lasts for all updates made of it."""

    draws: Draws | None
    terms: Terms
    updates: int = 0  # that were made of it before


Rollouts = dict[int, Rollout]  # by number of the part


class Objective:
    """The loss of VA-pi on a batch, in pieces that fit through one forward and backward."""

    def __init__(self, policy: Policy, tune: TuneConfig, reward: Reward, precision: str = "float32", world: World = ALONE) -> None:
        """Raises ValueError for rewards that the objective cannot follow, or that this policy is not asked for."""
        require_fit(reward.functions, tune.objective, captions=not policy.num_classes)
        self.policy, self.tune, self.reward = policy, tune, reward
        self.precision, self.world = precision, world
        self.side = round(policy.num_codes**0.5) if tune.credit == "token" else 0  # of the grid whose places have rewards of their own
        if self.side and tune.policy_weight:
            reward.require_places()
        self.map = _parallel_map(policy.device)
        self.base = frozen_copy(policy) if tune.prior == "kl" and tune.prior_weight > 0 else None

    @property
    def trained(self) -> nn.Module:
        """The network that is trained: of its parameters those that want a gradient."""
        return self.policy.generator

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights of what was trained."""
        self.policy.save(folder / TUNED["generator"], tensors)

    def pieces(self, batch: Batch, step: int, made: Rollouts | None = None) -> Iterator[tuple[float, Tensor, Terms]]:
        """(share of all images, loss, its terms): the gradient of the step is that of sum(share * loss) over all processes.

        ``made``: the rollouts of this step, if it has had an update already; those made here are put there.
        """
        made = {} if made is None else made
        for number, (share, part) in enumerate(self.parts(batch)):
            if self.tune.policy_dropout == "none":
                yield share, *self.shared(part, step, made, number)
            else:
                for loss, terms in self.official(part, step, made, number):
                    yield share / len(part), loss, terms

    def parts(self, batch: Batch) -> Iterator[tuple[float, Batch]]:
        """Parts of at most ``images_per_forward`` images, each with its share of all processes' images. Every process has
        as many, because shards move when all are at the same place; one that has none left repeats an image for nothing."""
        sizes = self.world.gather(len(batch))
        count = math.ceil(max(sizes) / self.tune.images_per_forward)
        for i in range(count):
            part = batch[len(batch) * i // count : len(batch) * (i + 1) // count]
            yield (len(part) / sum(sizes), part) if len(part) else (0.0, batch[:1])

    def shared(self, batch: Batch, step: int, made: Rollouts, number: int) -> tuple[Tensor, Terms]:
        """One forward per image: its G draws share the context, so they share the prediction."""
        context = self.context(batch, step)
        predicted = self.predict(self.policy, batch.condition, context)
        if number not in made:
            made[number] = self.rollout(predicted, batch, context, step)
        return self.loss(predicted, batch.codes, made[number].draws, step, made[number].terms)

    def official(self, batch: Batch, step: int, made: Rollouts, number: int) -> Iterator[tuple[Tensor, Terms]]:
        """As released: draws from the network in eval mode, the update in train mode, where every draw is a
        forward of its own with its own dropout mask and class drop. The ratio leaves 1 for that reason alone."""
        context = self.context(batch, step)
        if number not in made:
            with torch.no_grad():
                predicted = self.predict(self.policy, batch.condition, context)
                made[number] = rollout = self.rollout(predicted, batch, context, step)
                if rollout.draws is not None:
                    rollout.draws.old = self.chosen(predicted, batch.codes, rollout.draws.codes)[1]
            del predicted
        draws, terms, again = made[number].draws, made[number].terms, made[number].updates
        for image in range(len(batch)):
            one = batch[image : image + 1]
            repeat = [0] * self.tune.group_size
            with _dropout(self.policy, int(grpo.keys(one.rows, self.tune.seed, DROPOUT, step, *([again] if again else [])))):
                rows = self.predict(self.policy, one.condition[repeat], context[image : image + 1][repeat])
            yield self.loss(rows, one.codes[repeat], None if draws is None else draws.of(image), step, terms)

    def context(self, batch: Batch, step: int) -> Tensor:
        """The noised codes that the generator reads (eq. 28)."""
        keys = grpo.keys(batch.rows, self.tune.seed, NOISE, step).to(batch.codes.device)
        return grpo.corrupt(batch.codes, self.tune.context_noise, self.policy.vocab, keys)

    def predict(self, policy: Policy, condition: Tensor, context: Tensor) -> Prediction:
        """Teacher-forced log-probabilities."""

        def head(features: Tensor) -> Tensor:
            with models.autocast(self.precision, self.policy.device):
                return grpo.log_probs(policy.predict(features))

        with models.autocast(self.precision, self.policy.device):
            features = policy.features(condition, context)
        return Prediction(features, head, policy.vocab)

    @torch.no_grad()
    def surety(self, predicted: Prediction, codes: Tensor, step: int) -> Terms:
        """Cross-entropy and entropy of a prediction: how well, and how surely, it names the true codes (B, T)."""

        def both(log_probs: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
            return grpo.chosen(log_probs, codes), grpo.entropy(log_probs)

        true, entropy = predicted.ask(both, codes[..., None])
        return finite({"ce": grpo.prior_ce(true), "entropy": entropy.mean()}, step)

    @torch.no_grad()
    def draw(self, predicted: Prediction, group: int, keys: Tensor) -> Tensor:
        """Token maps (B, G, T) from a prediction (eq. 7), G of an image by its key (B,)."""
        uniforms = grpo.uniforms(keys, group, predicted.shape[1])
        (codes,) = predicted.ask(lambda log_probs, u: (grpo.draw(log_probs, self.tune.temperature, u),), uniforms.mT)
        return codes.mT

    def chosen(self, predicted: Prediction, codes: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T) of the true codes, and of G draws at the temperature at which they were drawn, (B, G, T)."""

        def both(log_probs: Tensor, codes: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
            return grpo.chosen(log_probs, codes), grpo.chosen(grpo.tempered(log_probs, self.tune.temperature), draws)

        true, drawn = predicted.ask(both, codes[..., None], draws.mT)
        return true[..., 0], drawn.mT

    @torch.no_grad()
    def rollout(self, predicted: Prediction, batch: Batch, context: Tensor, step: int) -> Rollout:
        """Draw G token maps per image and reward them, unless the prior alone is wanted."""
        tune, terms = self.tune, self.surety(predicted, batch.codes, step)
        if tune.policy_weight == 0:
            return Rollout(None, terms)
        codes = self.draw(predicted, tune.group_size, grpo.keys(batch.rows, tune.seed, DRAW, step).to(batch.codes.device))
        draws, found = self.judged(codes, batch, step)
        if self.base is not None:
            draws.base = self.chosen(self.predict(self.base, batch.condition, context), batch.codes, codes)[1]
        return Rollout(draws, terms | found)

    def judged(self, codes: Tensor, batch: Batch, step: int) -> tuple[Draws, Terms]:
        """Token maps (B, G, T) with their advantages, and what the rewards were."""
        rewards, parts = self.score(codes, batch.images, self.side, batch.asked)
        terms = finite({**named_means(parts), "reward": rewards.mean()}, step)
        draws = Draws(codes, self.advantages(rewards))
        return draws, terms | {"reward_std": _of_images(rewards).std(1).mean(), "advantage_std": draws.advantages.std(1).mean()}

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of draws (B, G), or of their codes (B, G, T), as rewards are told."""
        tune, local = self.tune, rewards.dim() > 2
        rewards = grpo.around(rewards, tune.credit_radius) if local else rewards
        if tune.baseline == "leave_one_out":
            return grpo.leave_one_out(rewards, tune.advantage_clip)
        return (grpo.local_advantages if local else grpo.advantages)(rewards, tune.advantage_clip)

    def score(self, codes: Tensor, targets: Tensor, side: int = 0, asked: Asked = ()) -> tuple[Tensor, Terms]:
        """Reward (B, G) of token maps (B, G, T) against their images, or for what was ``asked``, and its parts: most of a step's work.
        With ``side``, that of the images' codes, on so many rows: (B, G, T)."""
        blocks = self.blocks(*codes.shape[:2])

        def one(block: tuple[slice, slice]) -> tuple[Tensor, Terms]:
            return self.reward_of(self.decoded(codes[block]), targets[block[0]], side, asked[block[0]])

        scored = list(self.map(one, blocks))

        def whole(values: list[Tensor]) -> Tensor:
            result = values[0].new_empty((*codes.shape[:2], *values[0].shape[2:]))
            for block, value in zip(blocks, values, strict=True):
                result[block] = value
            return result

        parts = {name: whole([theirs[name] for _, theirs in scored]) for name in scored[0][1]}
        return whole([total for total, _ in scored]), parts

    def blocks(self, count: int, group: int) -> list[tuple[slice, slice]]:
        """Images and draws of at most ``images_per_reward`` pictures each; whole groups where they fit, since a group
        shares the features of its image."""
        size = self.tune.images_per_reward
        many, few = max(1, size // group), min(group, size)
        return [(slice(b, b + many), slice(g, g + few)) for b in range(0, count, many) for g in range(0, group, few)]

    @torch.no_grad()
    def decoded(self, codes: Tensor) -> Tensor:
        """Token maps (B, G, T) of one block as images (B, G, 3, H, W). Runs in a thread of its own."""
        with models.autocast(self.precision, self.policy.device):
            return self.policy.decode(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])

    @torch.no_grad()
    def reward_of(self, images: Tensor, targets: Tensor, side: int = 0, asked: Asked = ()) -> tuple[Tensor, Terms]:
        """Reward (B, G) of one block of decoded images against their targets (B, 3, H, W), and its parts. See ``score``."""
        with models.autocast(self.precision, self.policy.device):
            return self.reward.score(images, targets, side, asked)

    def loss(self, predicted: Prediction, codes: Tensor, draws: Draws | None, step: int, terms: Terms) -> tuple[Tensor, Terms]:
        """Equation 11: the clipped policy term plus beta times the prior. True codes (B, T)."""
        tune = self.tune
        true, new = self.chosen(predicted, codes, codes.new_empty(len(codes), 0, codes.shape[1]) if draws is None else draws.codes)
        prior = ce = grpo.prior_ce(true)
        terms = {**terms, "ce": ce.detach()}
        loss = torch.zeros_like(ce)
        if draws is not None:
            draws.old = new.detach() if draws.old is None else draws.old  # those of the first update, for the next
            policy, clipped = grpo.policy_term(new, draws.old, draws.advantages, tune.ratio_clip)
            terms |= {"policy": policy.detach(), "clip_fraction": clipped}
            loss = loss + tune.policy_weight * policy
            if draws.base is not None:
                prior = grpo.prior_kl(new, draws.base)
                terms["kl"] = prior.detach()
        if tune.prior_weight > 0:
            loss = loss + tune.prior_weight * prior
        return loss, finite({**terms, "loss": loss.detach()}, step)

    @torch.no_grad()
    def look(self, batch: Batch, step: int) -> dict[str, float]:
        """Reward, its parts, cross-entropy, entropy and the codes in use, over all processes' images, with noise and draws that
        never change."""
        totals: Terms = {}
        counts = torch.zeros(self.policy.vocab, dtype=torch.int64, device=self.policy.device)
        for share, part in self.parts(batch):
            noise, draw = (grpo.keys(part.rows, HOLDOUT, purpose).to(part.codes.device) for purpose in (NOISE, DRAW))
            context = grpo.corrupt(part.codes, self.tune.context_noise, self.policy.vocab, noise)
            predicted = self.predict(self.policy, part.condition, context)
            terms = self.surety(predicted, part.codes, step)
            drawn = self.tried(predicted, part, draw)
            rewards, parts = self.score(drawn, part.images, asked=part.asked)
            _add(totals, terms | {"reward": rewards.mean(), **named_means(parts)}, share)
            counts += drawn.flatten().bincount(minlength=self.policy.vocab) * (share > 0)
        self.world.sum([counts])
        return _summed(totals, self.world) | grpo.usage(counts)

    def tried(self, predicted: Prediction, batch: Batch, keys: Tensor) -> Tensor:
        """What the held-out images are followed by: token maps (B, G, T)."""
        return self.draw(predicted, HOLDOUT_DRAWS, keys)


def _parallel_map(device: torch.device) -> Callable[..., Iterable[Any]]:
    """``map`` over independent blocks of work. On a CPU one thread each, instead of all threads in every
    operation: these are small, and the slowest thread would hold up each of them."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return map
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)).map


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, for the KL prior; the frozen tokenizer is shared."""
    base = copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})
    base.generator.requires_grad_(False)
    return base


@contextlib.contextmanager
def _dropout(policy: Policy, seed: int) -> Iterator[None]:
    """Train mode with masks that follow from ``seed``."""
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed)
        policy.generator.train()
        yield
        policy.generator.eval()


def _of_images(rewards: Tensor) -> Tensor:
    """(B, G) or (B, G, T) -> (B, G)."""
    return rewards.flatten(2).mean(-1) if rewards.dim() > 2 else rewards


def named_means(parts: Terms) -> Terms:
    return {f"reward_{name}": part.mean() for name, part in parts.items()}


def finite(terms: Terms, step: int) -> Terms:
    for name, value in terms.items():
        if not value.isfinite():
            raise ValueError(
                f"step {step}: {name} is {value.item()}; stopped before the update. "
                "A smaller tune.lr, a larger tune.prior_weight or model.precision float32 may help"
            )
    return terms


def _add(totals: Terms, terms: Terms, share: float) -> None:
    for name, value in terms.items():
        totals[name] = totals.get(name, 0.0) + share * value.double()


def optimizer_of(network: nn.Module, tune: TuneConfig) -> torch.optim.AdamW:
    """AdamW with a constant rate; weight decay on parameters with two or more dimensions."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": tune.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=tune.lr, betas=(tune.beta1, tune.beta2))


def _summed(totals: Terms, world: World) -> dict[str, float]:
    """Sums over all processes, as plain numbers."""
    values = torch.stack(list(totals.values()))
    world.sum([values])
    return dict(zip(totals, values.tolist(), strict=True))


def update(objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> dict[str, float]:
    """One step: rollouts, and ``updates_per_rollout`` optimizer steps on them; means of all terms over these and over all processes'
    images. ``batch`` is this process's part.

    Raises ValueError, before that optimizer step, if a number is not finite.
    """
    made: Rollouts = {}
    found = []
    for _ in range(objective.tune.updates_per_rollout):
        found.append(_updated(objective, optimizer, batch, step, made))
        for rollout in made.values():
            rollout.updates += 1
    return {name: statistics.fmean(values[name] for values in found) for name in found[0]}


def _updated(objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, step: int, made: Rollouts) -> dict[str, float]:
    totals: Terms = {}
    optimizer.zero_grad(set_to_none=True)
    for share, loss, terms in objective.pieces(batch, step, made):
        (share * loss).backward()
        _add(totals, terms, share)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # sharded gradients were summed while they were made
    objective.world.sum([p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)])
    norm = clip_grad_norm_(parameters, objective.tune.max_grad_norm or float("inf"))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite({"grad_norm": norm}, step)
    optimizer.step()
    return _summed(totals, objective.world) | {"grad_norm": norm.item()}
