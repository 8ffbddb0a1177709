"""The released algorithm as its authors run it, written for clarity: the yardstick of tests and benchmarks.

What ``vapi.tune`` does in one forward per image happens here in the order of the released C2I script
(described in docs, no code of it is used): the old policy in a forward of its own, every image
copied G times, a forward and backward for every copy, the reference's features computed again for
every draw, and, if one is given, a frozen base model whose divergence is measured and never used.
With dropout off, gradient and loss equal those of the shared step; with the network in train mode
the copies get masks of their own, which is what the released run did.

Nothing is imported from ``vapi.grpo``: an error there must not hide here.

Shapes: B images, G group, N = B x G, T codes, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi.models import Policy

RewardFunction = Callable[[Tensor, Tensor], Tensor]  # (N, 3, H, W) twice -> (N,), higher is better


def sample(logits: Tensor, group: int, temperature: float) -> Tensor:
    """G draws per position, softmax computed anew for each: (B, T, V) -> (B, G, T)."""
    draws = []
    for _ in range(group):
        probabilities = (logits / temperature).softmax(-1)  # (B, T, V)
        draws.append(torch.multinomial(probabilities.flatten(0, 1), 1).view(logits.shape[:2]))
    return torch.stack(draws, dim=1)


@torch.no_grad()
def rewards(policy: Policy, actions: Tensor, images: Tensor, functions: Mapping[RewardFunction, float], chunk: int = 8) -> Tensor:
    """Decode all draws and compare each with its own copy of the image: (B, G, T) -> (B, G)."""
    targets = images.repeat_interleave(actions.shape[1], dim=0)  # (N, 3, H, W)
    values = []
    for codes, target in zip(actions.flatten(0, 1).split(chunk), targets.split(chunk)):
        decoded = policy.decode(codes)
        values.append(torch.stack([weight * function(decoded, target) for function, weight in functions.items()]).sum(0))
    return torch.cat(values).view(actions.shape[:2])


def step(
    policy: Policy,
    images: Tensor,
    codes: Tensor,
    condition: Tensor,
    functions: Mapping[RewardFunction, float],
    group: int = 8,
    temperature: float = 1.0,
    ratio_clip: float = 0.2,
    advantage_clip: float = 5.0,
    prior_weight: float = 0.1,
    context: Tensor | None = None,
    actions: Tensor | None = None,
    values: Tensor | None = None,
    base: Policy | None = None,
    train: bool = False,
) -> dict[str, float]:
    """Accumulate the gradient of one VA-pi step in ``policy.generator``; returns the means of its terms.

    images (B, 3, H, W), codes (B, T), condition (B,). ``context`` (default: the codes), ``actions``
    (B, G, T) and their rewards ``values`` (B, G) can be given instead of made here, so that two
    implementations see the same.
    """
    context = codes if context is None else context
    with torch.no_grad():  # the old policy, in eval mode
        logits = policy.logits(condition, context)
    actions = sample(logits, group, temperature) if actions is None else actions
    values = rewards(policy, actions, images, functions) if values is None else values
    spread = values - values.mean(dim=1, keepdim=True)
    advantages = (spread / (values.std(dim=1, keepdim=True) + 1e-8)).clamp(-advantage_clip, advantage_clip)

    totals = {"loss": 0.0, "policy": 0.0, "ce": 0.0, "clip_fraction": 0.0}
    policy.generator.train(train)
    for b in range(len(images)):  # a micro-batch is the G copies of one image
        rows = [b] * group
        old = (logits[b] / temperature).log_softmax(-1).expand(group, -1, -1).gather(-1, actions[b, :, :, None])[..., 0]
        new_logits = policy.logits(condition[rows], context[rows])  # (G, T, V)
        new = (new_logits / temperature).log_softmax(-1).gather(-1, actions[b, :, :, None])[..., 0]  # (G, T)
        if base is not None:
            with torch.no_grad():
                base.logits(condition[rows], context[rows]).log_softmax(-1)
        ratio = (new - old).exp()
        advantage = advantages[b, :, None].to(ratio.dtype)
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * advantage)
        policy_loss = -gain.mean(dim=1).mean()
        ce = F.cross_entropy(new_logits.flatten(0, 1), codes[rows].flatten())
        loss = policy_loss + prior_weight * ce
        (loss / len(images)).backward()
        clipped = ((ratio - 1).abs() > ratio_clip).float().mean()
        for name, term in (("loss", loss), ("policy", policy_loss), ("ce", ce), ("clip_fraction", clipped)):
            totals[name] += term.item() / len(images)
    policy.generator.eval()
    return totals
