"""The released algorithm as its authors run it, written for clarity: the yardstick of tests and benchmarks.

What ``vapi.tune`` does in one forward per image happens here in the order of the released C2I script
(described in docs, no code of it is used): the old policy in a forward of its own, every image
copied G times, a forward and backward for every copy, the reference's features computed again for
every draw, and, if one is given, a frozen base model whose divergence is measured and never used.
With dropout off, gradient and loss equal those of the shared step; with the network in train mode
the copies get masks of their own, which is what the released run did.

``generate`` samples as LlamaGen's own loop does: a cache as long as the sequence, of which every code reads the
whole under a mask, sorting for top-k and top-p, and one draw by ``multinomial``.

Nothing is imported from ``vapi.grpo`` or ``vapi.models.sampler``: an error there must not hide here.

Shapes: B images, G group, N = B x G, T codes, V codebook, R rows (2 B with guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vapi.models import Policy
from vapi.models.gpt import Block, Transformer

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

    images (B, 3, H, W), codes (B, T), condition (B, ...). ``context`` (default: the codes), ``actions``
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


@torch.no_grad()
def generate(
    model: Transformer, condition: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, guidance: float = 1.0
) -> Tensor:
    """Draw codes (B, T) for class ids (B,) or captions (B, S, C + 1), one position at a time; randomness is torch's own."""
    codes, heads, kind = model.config.codes, model.config.heads, condition.device.type
    length = model.config.prefix + codes - 1
    rows = torch.cat([condition, _nothing(model, condition)]) if guidance != 1 else condition
    mask = _mask(rows, length)
    shape = (model.config.layers, 2, len(rows), heads, length, model.config.dim // heads)
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.output.weight.dtype
    cache = torch.zeros(shape, dtype=low, device=condition.device)
    drawn = torch.empty(len(condition), codes, dtype=torch.long, device=condition.device)
    x, at = model.cls_embedding(rows), 0  # (R, S, D)
    for position in range(codes):
        here = slice(at, at + x.shape[1])
        for block, (keys, values) in zip(model.layers, cache):
            layer = cast(Block, block)
            q, keys[:, :, here], values[:, :, here] = layer.attention.qkv(layer.attention_norm(x), model.rotary[here])
            y = F.scaled_dot_product_attention(q.to(low), keys, values, attn_mask=mask[..., here, :])
            x = x + layer.attention.wo(y.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        logits = model.output(model.norm(x[:, -1])).float()  # (R, V)
        if guidance != 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        probabilities = _filtered(logits / temperature, top_k, top_p).softmax(-1)
        drawn[:, position] = torch.multinomial(probabilities, 1)[:, 0]
        x, at = model.tok_embeddings(drawn[:, position].repeat(len(rows) // len(condition)))[:, None], here.stop
    return drawn


def _nothing(model: Transformer, condition: Tensor) -> Tensor:
    """The null class, or the null caption behind each caption's mask."""
    if not model.config.caption_dim:
        return torch.full_like(condition, model.config.classes)
    nothing = cast(Tensor, model.cls_embedding.uncond_embedding)
    return torch.cat([torch.zeros_like(condition[..., :-1]) + nothing, condition[..., -1:]], dim=-1)


def _mask(rows: Tensor, length: int) -> Tensor:
    """Causal; in captions, padding is seen by itself alone: (P, P) or (R, 1, P, P)."""
    mask = torch.ones(length, length, dtype=torch.bool, device=rows.device).tril()
    if not rows.is_floating_point():
        return mask
    mask = mask.repeat(len(rows), 1, 1, 1)
    mask[..., : rows.shape[1]] &= rows[:, None, None, :, -1] == 1
    return mask | torch.eye(length, dtype=torch.bool, device=rows.device)


def _filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """All but the ``top_k`` likeliest, and those beyond probability ``top_p``, at -inf: (B, V) -> (B, V)."""
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > top_p
        beyond[:, 1:], beyond[:, 0] = beyond[:, :-1].clone(), False  # the one that passes it stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits
